"""Memory that clients make the node hold: one budget for all of them (I6).

Counts what is large and can be held long: buffers of long requests, requests under way, replies
that a client does not read. What a connection always has, its small buffers, is bounded by the
number of connections. Nobody is starved: who holds nothing may always begin something small, and
when somebody waits for room, the largest holder whose client has not moved for a while loses its
connection. Not one whose requests wait for us, as for room in the log or for a remote: its client
is not at fault (I8), and what they wait for needs none of this memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SMALL_BYTES = 1 << 20
"""What a connection that holds nothing may take even if the budget is spent."""


class Holder:
    """One connection's part. ``end`` closes it; ``resume`` tells it that there is room again."""

    __slots__ = ("_budget", "_long", "_unread", "_working", "bytes", "end", "moved_at", "resume")

    def __init__(
        self, budget: Budget, end: Callable[[], object], resume: Callable[[], None]
    ) -> None:
        self._budget = budget
        self.end = end
        self.resume = resume
        self.bytes = 0
        self.moved_at = 0.0
        self._long = 0
        self._unread = 0
        self._working = 0

    @property
    def delayed(self) -> int:
        """Of its bytes, those that wait for its client."""
        return self.bytes - self._working

    def receiving(self, length: int) -> bool:
        """The buffer of the request that is being received is so long (0: it has none of its
        own). False: there is no room for it now, ``resume`` tells when to ask again."""
        more = length - self._long
        if more > 0 and not self.fits(more):
            self.wait()
            return False
        self._long = length
        self.change(more)  # by 0 too: it moves
        return True

    def unread(self, length: int) -> None:
        """So much of its replies is waiting for the client to read it."""
        more, self._unread = length - self._unread, length
        if more:
            self.change(more)

    def fits(self, more: int) -> bool:
        """Whether it may hold so much more now."""
        return more <= self._budget.free or (not self.bytes and more <= SMALL_BYTES)

    def change(self, by: int) -> None:
        """It holds so much more, or less."""
        self.bytes += by
        assert self.bytes >= 0
        self._budget.changed(self, by)

    def work(self, by: int) -> None:
        """The same of requests under way: they wait for us."""
        self._working += by
        self.change(by)

    def wait(self) -> None:
        """Calls ``resume`` when there is more room."""
        self._budget.wait(self)

    def leave(self) -> None:
        """The connection is over."""
        self._long = self._unread = self._working = 0
        self._budget.leave(self)


class Budget:
    """``total`` bytes for all holders; who stands still for ``patience`` seconds may lose its
    part to others."""

    def __init__(self, total: int, patience: float) -> None:
        self.total = total
        self.used = 0
        self.ended = 0
        self._patience = patience
        self._holders: dict[Holder, None] = {}
        self._waiting: dict[Holder, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def free(self) -> int:
        """Bytes that nobody holds."""
        return self.total - self.used

    def changed(self, holder: Holder, by: int) -> None:
        """Called by ``Holder.change``."""
        self.used += by
        holder.moved_at = asyncio.get_running_loop().time()
        if holder.bytes:
            self._holders[holder] = None
        else:
            self._holders.pop(holder, None)
        if by < 0:
            self._wake()

    def wait(self, holder: Holder) -> None:
        """Called by ``Holder.wait``."""
        self._waiting[holder] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._patience, self._make_room)

    def leave(self, holder: Holder) -> None:
        """Called by ``Holder.leave``."""
        self._waiting.pop(holder, None)
        if holder.bytes:
            holder.change(-holder.bytes)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for holder in waiting:
            asyncio.get_running_loop().call_soon(holder.resume)

    def _make_room(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        since = loop.time() - self._patience
        still = [h for h in self._holders if h.delayed and h.moved_at <= since]
        if still:
            self.ended += 1
            max(still, key=lambda holder: holder.delayed).end()
        if self._waiting:
            self._timer = loop.call_later(self._patience, self._make_room)
