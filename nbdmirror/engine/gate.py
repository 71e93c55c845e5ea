"""Synchronous remotes: what a client's reply waits for (V3, I3).

A write is replied to when each synchronous remote has received it, a FLUSH or FUA when it has it
on disk. What holds while a remote cannot be reached is ``on_link_loss``:

    continue  nothing is waited for; what it lacks is in the log, past that in its DCM. It counts
              again once it has nearly caught up, so that no client waits for a backlog
    hold      writes wait until it is back
    fail      writes get EIO, before anything is changed

Where this node itself ended the stream, to begin it anew (a restore, a resync), that is no loss;
nor is it where nobody has tried yet (a start, a remote that is added, or resumed). Writes wait for
the attempt that follows, which has an end, and the policy is for what comes of it.
A remote that a person paused is waited for by nobody. A write from before the stream's beginning
is at the remote when the resync that carries it has ended.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

from nbdmirror.errors import VolumeFailed

NEAR_BYTES = 1 << 20
"""A remote that has no more than this to receive is waited for again."""

POLICIES = ("continue", "hold", "fail")
EIO = 5

_Heap = list[tuple[int, int, "asyncio.Future[None]"]]


class SyncGate:
    """One synchronous remote, as the data path sees it."""

    def __init__(self, name: str, policy: str, behind: Callable[[int], int]) -> None:
        """``behind``: about how many bytes of log lie from a seq to its head."""
        assert policy in POLICIES
        self.name = name
        self.policy = policy
        self._behind = behind
        self.streaming = False
        self.engaged = False
        """Replies wait for it."""
        self.renewing = True
        """A stream is about to begin: none was tried yet, or this side ended the last one."""
        self.excused = False
        """Paused by a person, or removed."""
        self.consistent = True
        """Nothing from before the stream is missing there."""
        self._base_seq = 0
        self._received_seq = self._durable_seq = 0
        self._received: _Heap = []
        self._durable: _Heap = []
        self._number = itertools.count()
        self._changed = asyncio.Event()
        self._told = False
        self.on_change: Callable[[bool], None] = lambda engaged: None
        """Called when replies begin, or cease, to wait for it; and when it is found to be lost as
        it is tried first."""

    # -- what the link tells -------------------------------------------------------------------

    def opened(self, seq: int, consistent: bool) -> None:
        """A stream begins with record ``seq``."""
        self.streaming, self.consistent, self._base_seq = True, consistent, seq
        self.renewing = False
        self._received_seq = self._durable_seq = seq - 1
        self._engage()
        self._wake_all()

    def moved(self, received: int, durable: int) -> None:
        """The remote acknowledges more."""
        self._received_seq, self._durable_seq = received, durable
        _wake(self._received, received)
        _wake(self._durable, durable)
        if not self.engaged:
            self._engage()

    def completed(self) -> None:
        """The remote is consistent: it has all from before the stream."""
        self.consistent = True
        if not self.engaged:
            self._engage()
        self._wake_all()

    def lost(self, *, renewing: bool = False) -> None:
        """The stream has ended, or did not begin; ``renewing``: another attempt follows at once,
        because this side wanted it so."""
        self.streaming, self.renewing = False, renewing
        if self.engaged or not (self._told or renewing):
            self.engaged, self._told = False, True
            self.on_change(False)
        self._wake_all()

    def excuse(self, excused: bool) -> None:
        """A person pauses the remote, or ends that."""
        self.excused = excused
        if not excused:
            self.renewing = True
        self._wake_all()

    def _engage(self) -> None:
        caught_up = self.consistent or self.policy != "continue"
        if self.streaming and caught_up and self._behind(self._received_seq + 1) <= NEAR_BYTES:
            if not self.engaged:
                self.on_change(True)
            self.engaged = self._told = True

    def _wake_all(self) -> None:
        _wake(self._received, None)
        _wake(self._durable, None)
        self._changed.set()
        self._changed.clear()

    # -- what the data path asks ---------------------------------------------------------------

    @property
    def shut(self) -> bool:
        """Whether no write may be begun now."""
        return self.policy != "continue" and not self.streaming and not self.excused

    async def admit(self) -> None:
        """Returns when a write may be begun; VolumeFailed if the policy is to fail it."""
        while self.shut:
            if self.policy == "fail" and not self.renewing:
                raise self._failure()
            await self._changed.wait()

    async def wait(self, seq: int, durable: bool) -> None:
        """Returns when record ``seq`` is received there, or ``durable``; VolumeFailed if the link
        is lost and the policy is to fail."""
        while not self._passed(seq, durable):
            if self.policy == "fail" and not (self.streaming or self.renewing):
                raise self._failure()
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heap = self._durable if durable else self._received
            heapq.heappush(heap, (seq, next(self._number), future))
            await future

    def _passed(self, seq: int, durable: bool) -> bool:
        if self.excused or (self.policy == "continue" and not self.engaged):
            return True
        position = self._durable_seq if durable else self._received_seq
        return self.streaming and position >= seq and (seq >= self._base_seq or self.consistent)

    def _failure(self) -> VolumeFailed:
        return VolumeFailed(
            f"the synchronous remote {self.name} cannot be reached",
            number=EIO,
            hint="mend the link; or pause the remote, then writes go on without it",
        )


def _wake(heap: _Heap, upto: int | None) -> None:
    """Wakes those who wait for a seq up to ``upto``; ``None``: all, to look again."""
    while heap and (upto is None or heap[0][0] <= upto):
        _, _, future = heapq.heappop(heap)
        if not future.done():
            future.set_result(None)
