"""The log (V2, O5, O10, O15-O18): appends, wraps, reads back, and recovers a prefix."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.codec.record import HEADER_SIZE
from nbdmirror.core.ring import INDEX_STEP
from nbdmirror.engine.housekeeper import releasable
from nbdmirror.engine.log import RING_AT, Cursor, Log
from nbdmirror.errors import DiskFailed, FormatError, StateError
from tests.sim.faults import Fault, Kind
from tests.unit.loghelp import CAPACITY, PATH, append, make, read_all, release, reopened
from tests.unit.world import fail, make_disk, run


def test_near_and_far_readers_see_the_same() -> None:
    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        written = append(log, [10, 4096, 0]) + append(log, [100]) + append(log, [5000, 64])
        assert await read_all(log, Cursor(1)) == written
        log._recent.clear()
        for size_max in (64, 200, 4096, 1 << 20):
            for first in range(1, 7):
                assert await read_all(log, Cursor(first), size_max) == written[first - 1 :]

    run(main())


def test_a_far_reader_stops_where_memory_takes_over() -> None:
    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        written = append(log, [100, 100]) + append(log, [100])
        del log._recent[1]
        chunk = await log.read(cursor := Cursor(1))
        assert (chunk.first_seq, chunk.last_seq) == (1, 2)
        assert await log.read(cursor) is log.near(3)
        assert cursor.seq == 4 and len(written) == 3

    run(main())


def test_the_ring_wraps_with_a_fill_that_readers_never_see() -> None:
    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        written = append(log, [20_000]) + append(log, [20_000])
        await release(log, 3)
        written += append(log, [10_000, 20_000, 3000])
        assert log.ring.head > log.capacity
        log._recent.clear()
        assert await read_all(log, Cursor(3)) == written[2:]
        tail = (log.ring.tail, log.ring.tail_seq)
        again, found = reopened(disk, tail)
        assert found == written[2:]
        assert (again.ring.head, again.next_seq) == (log.ring.head, log.next_seq)

    run(main())


def test_a_record_that_ends_with_the_ring_needs_no_fill() -> None:
    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [CAPACITY // 2 - HEADER_SIZE])
        await release(log, 2)
        append(log, [CAPACITY // 2 - HEADER_SIZE])
        assert log.ring.head == CAPACITY
        await release(log, 3)
        written = append(log, [100])
        assert log.ring.head == CAPACITY + 64 + 128
        log._recent.clear()
        assert await read_all(log, Cursor(3)) == written

    run(main())


def test_space_is_used_again_only_after_the_tail_is_durable() -> None:
    """O5."""

    async def main() -> None:
        log = await make(make_disk())
        append(log, [60_000])
        assert not log.fits(10_000, 10_000)
        log.release(2, await log.position_of(2))
        assert not log.fits(10_000, 10_000), "the superblock still names the old tail"
        log.confirm_tail(log.ring.tail)
        assert log.fits(10_000, 10_000)

    run(main())


def test_fits_is_exact_enough_never_to_overrun() -> None:
    async def main() -> None:
        for size in range(64, 9000, 192):
            log = await make(make_disk(), 8192)
            total = 0
            while log.fits(size, size):
                append(log, [size - 64])
                total += size
                if total > 100_000:
                    await release(log, log.next_seq)
                    break
                if log.next_seq % 3 == 0:
                    await release(log, log.next_seq)

    run(main())


def test_sync_covers_what_was_appended_before() -> None:
    async def main() -> None:
        for seed in range(20):
            disk = make_disk(seed)
            log = await make(disk)
            written = append(log, [3000, 100])
            await log.sync(2)
            assert log.durable_seq == 2
            append(log, [5000])
            disk.power_cut()
            _, found = reopened(disk, (0, 1))
            assert found[:2] == written

    run(main())


def test_an_append_during_a_sync_is_not_claimed() -> None:
    """O15."""

    async def main() -> None:
        log = await make(make_disk())
        append(log, [100])
        syncing = asyncio.ensure_future(log.sync(1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        append(log, [100])
        await syncing
        assert log.durable_seq == 1
        await log.sync(2)
        assert log.durable_seq == 2

    run(main())


def test_a_sync_that_a_reset_overtook_claims_nothing_of_the_new_stream() -> None:
    async def main() -> None:
        log = await make(make_disk())
        append(log, [100, 100, 100])
        syncing = asyncio.ensure_future(log._commit())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        log.reset(2)
        await syncing
        assert log.durable_seq == 1

    run(main())


@pytest.mark.parametrize("operation", ["pwritev", "sync"])
def test_an_error_is_final_for_the_log(operation: str) -> None:
    """O16, faults 8, 9, 10."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100])
        disk.faults = fail(operation)
        with pytest.raises(DiskFailed, match="log"):
            append(log, [100])
            await log.sync(2)
        disk.faults = None
        with pytest.raises(DiskFailed):
            append(log, [100])
        with pytest.raises(DiskFailed):
            await log.sync(1)
        assert log.durable_seq == 0

    run(main())


def test_a_batch_that_goes_round_the_end_is_appended_as_a_whole_or_not_at_all() -> None:
    """I2: a record of it that readers saw would be at a remote, and in no facet here."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        written = append(log, [20_000]) + append(log, [20_000])
        await release(log, 3)
        head, left = log.ring.head, [2]

        def second(name: str, path: str, nth: int) -> Fault | None:
            left[0] -= name == "pwrite" and path == PATH
            return Fault(Kind.ERROR) if not left[0] else None

        disk.faults = second
        with pytest.raises(DiskFailed, match="log"):
            append(log, [10_000, 20_000, 30])
        assert (log.ring.head, log.ring.next_seq) == (head, len(written) + 1)
        assert left == [0]

    run(main())


@pytest.mark.parametrize("at", [0, 8, 20, 40, 100])
def test_rot_in_the_log_is_named_not_sent(at: int) -> None:
    """Fault 15, X6."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100, 100, 100])
        log._recent.clear()
        disk.flip(PATH, RING_AT + 192 + at)
        cursor = Cursor(1)
        chunk_seqs = []
        with pytest.raises(FormatError, match="record 2"):
            while True:
                chunk_seqs += [r.seq for r in (await log.read(cursor, 192)).parsed()]
        assert chunk_seqs == [1]

    run(main())


def test_rot_never_ends_in_a_wrong_position() -> None:
    """A tail saved at a wrong place would be a log that recovers to nothing."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100, 100, 100])
        for at in range(HEADER_SIZE):
            disk.flip(PATH, RING_AT + at)
            with pytest.raises(FormatError):
                await log.position_of(3)
            disk.flip(PATH, RING_AT + at)
        assert await log.position_of(3) == 384

    run(main())


def test_a_rotten_header_holds_up_the_release_no_longer_than_it_must() -> None:
    """Fault 15: no further than the index knows until it is past that place, and no failure."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk, 4 * INDEX_STEP)
        for _ in range(20):
            append(log, [8000])
        step = -(-INDEX_STEP // codec.stored_size(codec.WRITE, 8000))
        for rotten in (3, step + 3):
            disk.flip(PATH, RING_AT + await log.position_of(rotten))
        assert await releasable(log, 3) == (3, await log.position_of(3))
        assert await releasable(log, 5) == (1, 0)
        where = step + 1, await log.position_of(step + 1)
        assert await releasable(log, step + 2) == (step + 2, await log.position_of(step + 2))
        assert await releasable(log, step + 6) == where
        end = await releasable(log, log.next_seq)
        assert end == (log.next_seq, log.ring.head)

    run(main())


def test_a_read_error_is_a_record_that_cannot_be_read_back() -> None:
    """So that whoever reads falls back to the facets instead of trying for ever."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100, 100])
        log._recent.clear()
        disk.faults = fail("read", 2)
        with pytest.raises(FormatError, match="read failed"):
            await log.read(Cursor(1))
        with pytest.raises(FormatError, match="read failed"):
            await log.position_of(2)

    run(main())


def test_a_reset_goes_on_with_another_seq_and_finds_it_again() -> None:
    """What lies behind the head after a reset is of another stream, with lower and higher seqs."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        append(log, [100] * 6, epoch=1)
        log.reset(4)
        tail = (log.ring.tail, log.ring.tail_seq)
        assert tail == (6 * 192, 4) and log.durable_seq == 3
        written = append(log, [50, 60], epoch=2)
        assert await read_all(log, Cursor(4)) == written
        _, found = reopened(disk, tail, 2, [(1, 3)])
        assert found == written

    run(main())


@pytest.mark.parametrize(("offset", "value"), [(0, b"X"), (8, bytes(8)), (8, b"\xff" * 8)])
def test_a_file_that_is_no_log_is_refused(offset: int, value: bytes) -> None:
    async def main() -> None:
        disk = make_disk()
        with pytest.raises(StateError, match="missing"):
            Log.open(disk, PATH, 0, 1)
        await make(disk)
        disk.open(PATH).pwrite(offset, value)
        with pytest.raises(StateError, match="not a log"):
            Log.open(disk, PATH, 0, 1)

    run(main())


def test_no_room_on_the_disk_is_found_at_creation() -> None:
    """O18, fault 11."""

    async def main() -> None:
        with pytest.raises(OSError, match="space"):
            await make(make_disk(capacity=CAPACITY // 2))

    run(main())


def test_memory_for_near_readers_is_bounded() -> None:
    """I6."""

    async def main() -> None:
        log = await make(make_disk(), 64 << 20)
        for _ in range(50):
            append(log, [1 << 20])
        assert sum(chunk.size for chunk in log._recent.values()) <= 32 << 20
        assert log.near(50) is not None and log.near(1) is None

    run(main())


def test_bytes_between_counts_from_a_record_to_the_head() -> None:
    async def main() -> None:
        log = await make(make_disk())
        append(log, [0, 0])
        append(log, [128])
        assert [log.bytes_between(seq) for seq in (0, 1, 3, 4)] == [0, 320, 192, 0]

    run(main())


def test_an_append_is_filled_up_to_its_page_but_never_into_live_records() -> None:
    """A page written in part may have to be read first; what is still needed lies behind it."""

    async def main() -> None:
        disk = make_disk()
        log = await make(disk)
        file = disk.open(PATH, read_only=True)
        append(log, [100] * 8)  # up to the middle of the second record's page
        written = append(log, [3000] * 20)
        await release(log, written[0].seq)
        while log.fits(164, 164):  # into the page where the oldest record begins
            written += append(log, [100])
            head, tail = log.ring.head % log.capacity, log.ring.durable_tail % log.capacity
            if tail // 4096 != head // 4096:
                rest = file.pread(RING_AT + head, -head % 4096)
                assert rest == bytes(len(rest))
        log._recent.clear()
        assert await read_all(log, Cursor(written[0].seq)) == written

    run(main())
