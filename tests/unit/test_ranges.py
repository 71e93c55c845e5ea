"""Range locks (O13): who waits for whom."""

from __future__ import annotations

import pytest

from nbdmirror.core.ranges import RangeLocks


@pytest.mark.parametrize(
    ("start", "end", "exclusive", "held_exclusive", "waits"),
    [
        (0, 10, True, True, False),
        (0, 11, True, True, True),
        (20, 30, True, True, False),
        (19, 30, True, True, True),
        (12, 13, True, True, True),
        (0, 99, True, True, True),
        (12, 13, False, False, False),
        (12, 13, True, False, True),
        (12, 13, False, True, True),
    ],
)
def test_conflict(start: int, end: int, exclusive: bool, held_exclusive: bool, waits: bool) -> None:
    locks: RangeLocks[str] = RangeLocks()
    lock = locks.hold(10, 20, exclusive=held_exclusive, waiter="w")
    found = locks.conflict(start, end, exclusive=exclusive)
    assert (found is lock) is waits
    locks.release(lock)
    assert locks.conflict(0, 99, exclusive=True) is None


def test_readers_share_and_a_writer_waits_for_each() -> None:
    locks: RangeLocks[int] = RangeLocks()
    first = locks.hold(0, 10, exclusive=False, waiter=1)
    second = locks.hold(5, 15, exclusive=False, waiter=2)
    assert locks.conflict(6, 7, exclusive=True) is first
    locks.release(first)
    assert locks.conflict(6, 7, exclusive=True) is second
    with pytest.raises(AssertionError):
        locks.hold(6, 7, exclusive=True, waiter=3)
