"""A client that knows what it was promised, and what an image may hold after a crash.

Owns: stamped sectors, the journal of what was issued, acknowledged and made durable, and the
judgement of an image by it. Speaks NBD through ``rawnbd``; knows nothing of nodes. Used by every
fault test.

A sector of the image is right if it holds the last promised value or one that was issued later.
What counts as promised depends on the crash: the death of a process keeps all that was
acknowledged, a power loss all that a FLUSH or FUA made durable.
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.integration import rawnbd
from tests.integration.process import wait_until
from tests.integration.rawnbd import RawClient

SECTOR = 512
BATCH_MAX = 6
NEVER = 1 << 62
_HEAD = struct.Struct("<QQ")
_ZEROS = bytes(SECTOR)


class Broken(Exception):
    """The connection ended: what was in flight may be there or not."""


@dataclass(slots=True)
class Change:
    """One value of one sector; positions are the journal's clock when it came to be so."""

    stamp: int
    """Number of the request, in the order of issue; all sectors of a request share it."""
    batch: int
    """Requests of one batch were in flight together: they may take effect in any order."""
    zero: bool
    issued: int
    acknowledged: int = NEVER
    durable: int = NEVER

    def content(self, sector: int) -> bytes:
        """What the sector then holds."""
        return _ZEROS if self.zero else _HEAD.pack(self.stamp, sector) * (SECTOR // _HEAD.size)


class Journal:
    """The history of every sector of one volume. ``clock`` gives the position of each step, for
    judging images of an earlier moment (``at``); without one all steps are at 0."""

    def __init__(self, size: int, clock: Callable[[], int] = lambda: 0) -> None:
        self.sectors = size // SECTOR
        self.clock = clock
        self.stamp = 0
        self.batch = 0
        self._histories: dict[int, list[Change]] = {}

    def issue(self, first: int, count: int, *, zero: bool) -> Change:
        """A request is about to be sent."""
        self.stamp += 1
        change = Change(self.stamp, self.batch, zero, self.clock())
        for sector in range(first, first + count):
            self._histories.setdefault(sector, []).append(change)
        return change

    def check(self, image: bytes, *, durable: bool = False, at: int = NEVER - 1) -> None:
        """AssertionError unless each sector may hold what it holds; ``durable``: after a power
        loss, which happened when the clock showed ``at``."""
        assert len(image) == self.sectors * SECTOR
        wrong = [s for s in range(self.sectors) if not self._allowed(s, image, durable, at)]
        if wrong:
            raise AssertionError(self._describe(wrong, image, durable, at))

    def _allowed(self, sector: int, image: bytes, durable: bool, at: int) -> bool:
        found = image[sector * SECTOR : (sector + 1) * SECTOR]
        for change in reversed(self._histories.get(sector, [])):
            if change.issued > at:
                continue
            if found == change.content(sector):
                return True
            if (change.durable if durable else change.acknowledged) <= at:
                return False
        return found == _ZEROS

    def _describe(self, wrong: list[int], image: bytes, durable: bool, at: int) -> str:
        sector = wrong[0]
        found = image[sector * SECTOR : (sector + 1) * SECTOR]
        stamp, place = _HEAD.unpack_from(found)
        whole = found == _HEAD.pack(stamp, place) * (SECTOR // _HEAD.size)
        return (
            f"{len(wrong)} sectors hold what they must not; sector {sector} holds "
            f"{'stamp' if whole else 'a mix that begins with stamp'} {stamp} of sector {place}; "
            f"position {at}, promised are {'durable' if durable else 'acknowledged'} of "
            f"{self._histories.get(sector, [])[-6:]}"
        )

    def settle(self, image: bytes) -> None:
        """From now on the image is the truth: a node that recovered has made up its mind."""
        kept: dict[int, list[Change]] = {}
        for sector, history in self._histories.items():
            found = image[sector * SECTOR : (sector + 1) * SECTOR]
            for change in reversed(history):
                if found == change.content(sector):
                    kept[sector] = [Change(change.stamp, 0, change.zero, 0, 0, 0)]
                    break
        self._histories = kept

    def check_prefix(self, image: bytes) -> int:
        """AssertionError unless the image is the state after some record (I1): whole batches, and
        of one more any requests, each whole; returns that batch. For one connection only."""
        stamps = [_HEAD.unpack_from(image, sector * SECTOR)[0] for sector in range(self.sectors)]
        newest = max(stamps)
        batches = {c.stamp: c.batch for history in self._histories.values() for c in history}
        least = batches[newest] if newest else 0
        # Zeros leave no stamp: batches of nothing else behind the newest stamp may be in.
        for last in range(least, min(self.batch, least + 4) + 1):
            if self._is_prefix(last, image):
                return last
        raise AssertionError(f"the image, with stamps up to {newest}, is no prefix of the writes")

    def _is_prefix(self, last: int, image: bytes) -> bool:
        arrived: dict[int, bool] = {}
        for sector in range(self.sectors):
            found = image[sector * SECTOR : (sector + 1) * SECTOR]
            history = [c for c in self._histories.get(sector, []) if c.batch <= last]
            newest = history.pop() if history and history[-1].batch == last else None
            before = history[-1].content(sector) if history else _ZEROS
            if newest is None or newest.content(sector) == before:
                allowed = found == before
            else:  # all of the request or nothing of it
                there = found == newest.content(sector)
                allowed = there or found == before
                allowed &= arrived.setdefault(newest.stamp, there) == there
            if not allowed:
                return False
        return True


@dataclass(slots=True)
class Failure:
    """An error that the server replied with."""

    command: int
    number: int


class Load:
    """One connection that sends batches of requests, several in flight, and keeps the journal.

    A context manager; ``run`` works in the caller, ``Background`` in a thread."""

    def __init__(
        self,
        path: Path,
        journal: Journal,
        *,
        volume: str = "data",
        seed: int = 1,
        sectors_max: int = 64,
        flush_every: int = 5,
        fua: float = 0.1,
        timeout: float = 60.0,
    ) -> None:
        self.journal = journal
        self.failures: list[Failure] = []
        self.successes_after_failure = 0
        """Requests that were acknowledged although something had failed before they were sent."""
        self.batches = 0
        self._random = random.Random(seed)
        self._sectors_max = sectors_max
        self._flush_every = flush_every
        self._fua = fua
        try:
            self._client = RawClient(path, timeout=timeout)
            self._client.go(volume)
        except (OSError, EOFError) as error:
            raise Broken(str(error)) from error
        self._undurable: list[Change] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._client.socket.close()

    def run(self, batches: int) -> None:
        """Sends so many batches; Broken when the connection ends."""
        for _ in range(batches):
            self.batch()

    def wait(self, batches: int) -> None:
        """Returns when a ``Background`` has sent so many more."""
        since = self.batches
        wait_until("the load runs", lambda: self.batches >= since + batches)

    def batch(self) -> None:
        """A few requests at once, then their answers; sometimes a FLUSH behind them."""
        try:
            self._batch()
            if self._random.randrange(self._flush_every) == 0:
                self.flush()
        except (OSError, EOFError) as error:
            raise Broken(str(error)) from error

    def _batch(self) -> None:
        waiting: dict[int, tuple[Change, bool]] = {}
        failed_before = bool(self.failures)
        self.journal.batch += 1
        for first, count in self._ranges():
            fua = self._random.random() < self._fua
            flags = rawnbd.FUA if fua else 0
            command = self._random.choices(
                (rawnbd.WRITE, rawnbd.WRITE_ZEROES, rawnbd.TRIM), (90, 6, 4)
            )[0]
            change = self.journal.issue(first, count, zero=command != rawnbd.WRITE)
            sectors = range(first, first + count)
            payload = b"" if change.zero else b"".join(map(change.content, sectors))
            cookie = self._client.request(command, first * SECTOR, count * SECTOR, flags, payload)
            waiting[cookie] = (change, fua)
        while waiting:
            cookie, error, _ = self._client.answer()
            change, fua = waiting.pop(cookie)
            if error:
                self.failures.append(Failure(rawnbd.WRITE, error))
                continue
            self.successes_after_failure += failed_before
            change.acknowledged = self.journal.clock()
            if fua:
                change.durable = change.acknowledged
            else:
                self._undurable.append(change)
        self.batches += 1

    def _ranges(self) -> Iterable[tuple[int, int]]:
        """Ranges of one batch; none overlaps another, for NBD gives no order within a batch."""
        taken: list[tuple[int, int]] = []
        for _ in range(self._random.randint(1, BATCH_MAX)):
            count = self._random.choice((1, 1, 3, 8, 8, 8, self._sectors_max))
            first = self._random.randrange(self.journal.sectors - count)
            if all(first + count <= low or low + size <= first for low, size in taken):
                taken.append((first, count))
        return taken

    def flush(self) -> None:
        """FLUSH; all that was acknowledged before is durable if it succeeds."""
        covered, self._undurable = self._undurable, []
        error = self._client.ask(rawnbd.FLUSH, 0, 0)
        if error:
            self.failures.append(Failure(rawnbd.FLUSH, error))
            return
        self.successes_after_failure += bool(self.failures)
        now = self.journal.clock()
        for change in covered:
            change.durable = now

    def read(self) -> bytes:
        """The whole volume."""
        size = self.journal.sectors * SECTOR
        parts = []
        for offset in range(0, size, 4 << 20):
            length = min(4 << 20, size - offset)
            self._client.request(rawnbd.READ, offset, length)
            _, error, data = self._client.answer(length)
            assert error == 0, f"read at {offset} failed with error {error}"
            parts.append(data)
        return b"".join(parts)


class Background:
    """Runs a load in a thread until it is left; a context manager. Broken ends it quietly if
    ``may_break``."""

    def __init__(self, load: Load, *, may_break: bool = False, pause_s: float = 0.0) -> None:
        self.load = load
        self._may_break = may_break
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="load", daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self.load

    def __exit__(self, kind: object, *_exc: object) -> None:
        self._stop.set()
        self._thread.join(60)
        if kind is None:
            assert not self._thread.is_alive(), "a request hangs"
            if self._error is not None:
                raise self._error

    def _work(self) -> None:
        try:
            while not self._stop.wait(self._pause_s):
                self.load.batch()
        except Broken as error:
            if not self._may_break:
                self._error = error
        except BaseException as error:
            self._error = error
