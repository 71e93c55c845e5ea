"""Range locks: who must wait while a range of a volume is being read or changed off the loop.

Requests that complete within one step of the event loop need no lock: they are ordered by it.
Only what is awaited (a hole being punched, a region being read for a resync, O13) holds one, so
the table is almost always empty and the check for it costs nothing. Waiting is the caller's:
``conflict`` names the lock to wait for.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class RangeLock(Generic[T]):
    """A held range; ``waiter`` is whatever the engine waits on."""

    __slots__ = ("end", "exclusive", "start", "waiter")

    def __init__(self, start: int, end: int, exclusive: bool, waiter: T) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.waiter = waiter


class RangeLocks(Generic[T]):
    """The locks held on one volume."""

    def __init__(self) -> None:
        self.held: list[RangeLock[T]] = []

    def conflict(self, start: int, end: int, *, exclusive: bool) -> RangeLock[T] | None:
        """The first held lock that [start, end) has to wait for; two readers never conflict."""
        for lock in self.held:
            if lock.start < end and start < lock.end and (exclusive or lock.exclusive):
                return lock
        return None

    def hold(self, start: int, end: int, *, exclusive: bool, waiter: T) -> RangeLock[T]:
        """Takes the range, which must be free of conflicts."""
        assert self.conflict(start, end, exclusive=exclusive) is None
        lock = RangeLock(start, end, exclusive, waiter)
        self.held.append(lock)
        return lock

    def release(self, lock: RangeLock[T]) -> None:
        """Gives the range back; the caller wakes who waits on it."""
        self.held.remove(lock)
