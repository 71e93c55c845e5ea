"""What a scan of the log takes for records, and where it stops (O10, O15)."""

from __future__ import annotations

from typing import Any

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.codec.record import Record
from nbdmirror.engine.log import RING_AT
from nbdmirror.engine.recovery import RUNS_MAX, forget_oldest
from tests.sim.disk import SimDisk
from tests.unit.loghelp import PATH, append, make, record, release, reopened
from tests.unit.world import make_disk, run


def scan_stops_at(
    disk: SimDisk, expected: int, *, epoch: int = 9, forks: list[tuple[int, int]] | None = None
) -> None:
    _, found = reopened(disk, (0, 1), epoch, forks)
    assert [r.seq for r in found] == list(range(1, expected + 1))


def test_a_scan_stops_at_a_flipped_bit_anywhere_in_a_record() -> None:
    """O10, w8."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100, 100, 100])
        for at in (0, 5, 17, 60, 64, 163):
            disk.flip(PATH, RING_AT + 192 + at)
            scan_stops_at(disk, 1)
            disk.flip(PATH, RING_AT + 192 + at)
        scan_stops_at(disk, 3)

    run(main())


def test_a_scan_does_not_take_a_former_lap_s_records() -> None:
    """O10, w7: the bytes behind the head are whole, valid records."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk, 8192)
        for _ in range(7):
            append(log, [1024 - 64])
        await release(log, 8)
        append(log, [1024 - 64, 1024 - 64])
        tail = (log.ring.tail, log.ring.tail_seq)
        assert log.ring.head == 9 * 1024
        _, found = reopened(disk, tail)
        assert [r.seq for r in found] == [8, 9]

    run(main())


def overwrite(disk: SimDisk, position: int, *records: Record) -> None:
    disk.open(PATH).pwrite(RING_AT + position, b"".join(b"".join(codec.encode(r)) for r in records))


def test_the_survivor_of_a_lost_tail_is_not_taken() -> None:
    """O10, w10: 2 was lost and written anew in a later epoch; 3 is of the former one."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100, 100, 100], epoch=1)
        overwrite(disk, 192, record(2, 100, 2))
        scan_stops_at(disk, 2)

    run(main())


def test_records_beyond_a_fork_are_not_taken() -> None:
    """O10: 3 is next and its epoch does not go back, but its epoch had ended at 2."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100, 100, 100], epoch=1)
        scan_stops_at(disk, 2, forks=[(1, 2)])
        scan_stops_at(disk, 3, forks=[(1, 3)])
        overwrite(disk, 384, record(3, 100, 2))
        scan_stops_at(disk, 3, forks=[(1, 2)])
        scan_stops_at(disk, 2, forks=[(1, 2), (2, 2)])

    run(main())


def test_the_last_fork_stands_for_those_that_are_forgotten() -> None:
    """O10: many starts after its epoch ended, what lies beyond is still not taken."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100, 100, 100], epoch=2)
        starts = [[epoch, "run"] for epoch in range(1, RUNS_MAX + 9)]
        state: dict[str, Any] = {"runs": starts, "ends": [[3, 3], [9, 4]]}
        state["forks"] = [[1, 1], [2, 2]]
        forget_oldest(state)
        assert len(state["runs"]) == RUNS_MAX
        assert (state["forks"], state["ends"]) == ([[2, 2]], [[9, 4]])
        scan_stops_at(disk, 2, forks=[(epoch, end) for epoch, end in state["forks"]])

    run(main())


def test_what_lies_behind_a_cut_can_be_made_to_prove_nothing() -> None:
    """Of 3..5 all but 3 came to the disk; once that is known it is no damage (fault 15)."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100] * 5)
        disk.flip(PATH, RING_AT + 2 * 192)
        log, found = reopened(disk, (0, 1))
        assert [r.seq for r in found] == [1, 2] and log.seq_behind([]) == 4
        await log.forget_behind()
        disk.power_cut()
        log, found = reopened(disk, (0, 1))
        append(log, [100])
        log, found = reopened(disk, (0, 1))
        assert [r.seq for r in found] == [1, 2, 3] and log.seq_behind([]) == 0

    run(main())


def test_what_a_kill_left_of_an_append_is_told_from_what_a_facet_has() -> None:
    """Fault 1: the header of 3 is there, and not all of what it carried; if nothing lies behind it
    and nobody has that, it was never whole."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100, 100, 100])
        payload = disk.content(PATH)[RING_AT + 2 * 192 + 64 :][:100]
        disk.flip(PATH, RING_AT + 2 * 192 + 64 + 80)
        log, _ = reopened(disk, (0, 1))
        found = log.unfinished([])
        assert found is not None and found.record.seq == 3
        assert found.was(payload) and not found.was(payload[:-1] + b"!")
        disk.flip(PATH, RING_AT + 192 + 64)
        log, _ = reopened(disk, (0, 1))
        assert log.unfinished([]) is None, "more lies behind it"
        disk.flip(PATH, RING_AT + 192 + 64)
        disk.flip(PATH, RING_AT + 2 * 192 + 64 + 80)
        log, _ = reopened(disk, (0, 1))
        assert log.unfinished([]) is None, "all is whole"

    run(main())


@pytest.mark.parametrize("place", [1, 17, 40, 60], ids=["magic", "seq", "time", "sum"])
def test_the_last_record_may_be_damaged(place: int) -> None:
    """Fault 15: with nothing behind it, what is left of its header says that the log did not end
    there; where that is to prove nothing, it is gone, and a full ring keeps its tail."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100, 100, 100])
        disk.flip(PATH, RING_AT + 2 * 192 + place)
        log, found = reopened(disk, (0, 1))
        assert [r.seq for r in found] == [1, 2] and log.seq_behind([]) == 3
        await log.forget_behind()
        log, found = reopened(disk, (0, 1))
        assert [r.seq for r in found] == [1, 2] and log.seq_behind([]) == 0

    run(main())


def test_a_fill_that_lost_its_record_is_not_passed() -> None:
    """O10: a power loss leaves a fill and not the record behind it; the epoch ends before both.
    What is appended afterwards must be found by the next recovery."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [20_000, 20_000, 20_000])
        await log.sync(3)
        await release(log, 3)
        tail = (log.ring.tail, 3)
        append(log, [20_000])  # a fill, and this record at the start of the ring
        disk.flip(PATH, RING_AT + 100)
        log, found = reopened(disk, tail, 1)
        assert [r.seq for r in found] == [3]
        append(log, [20_000], epoch=2)
        await log.sync(4)
        _, found = reopened(disk, tail, 2, [(1, 3)])
        assert [(r.seq, r.epoch) for r in found] == [(3, 1), (4, 2)]

    run(main())


def test_a_record_of_an_epoch_to_come_is_not_taken() -> None:
    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100], epoch=1)
        append(log, [100], epoch=4)
        scan_stops_at(disk, 2, epoch=4)
        scan_stops_at(disk, 1, epoch=3)

    run(main())


def test_a_scan_never_passes_the_tail_again() -> None:
    """A ring that is full to the last byte: the scan ends where it began."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk, 4096)
        append(log, [960] * 3)
        append(log, [832])
        assert log.ring.head == 4096 - 128
        again, found = reopened(disk, (0, 1))
        assert len(found) == 4 and again.ring.head == log.ring.head

    run(main())


def test_a_scan_crosses_its_own_windows() -> None:
    async def main() -> None:
        disk = make_disk()
        log = await make(disk, 16 << 20)
        written = []
        for _ in range(12):
            written += append(log, [(1 << 20) - 100])
        _, found = reopened(disk, (0, 1))
        assert found == written

    run(main())
