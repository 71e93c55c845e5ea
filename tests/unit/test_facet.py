"""A local facet (O5, O16, O22): what a sync covers, what the log still has to keep for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.codec.record import Record
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.errors import DiskFailed, StateError
from tests.sim.disk import SimDisk
from tests.unit.world import STATE, fail, make_disk, run

PATH = f"{STATE}/facet"
SIZE = 1 << 20


def make(disk: SimDisk) -> LocalFacet:
    if not disk.exists(PATH):
        disk.open(PATH, create=True).truncate(SIZE)
    return LocalFacet.open(disk, PATH, SIZE, FacetState.SYNCHRONISED)


def write(seq: int, offset: int, data: bytes) -> Record:
    return Record(codec.WRITE, 0, 1, 0, seq, offset, len(data), 0, data)


def clear(seq: int, kind: int, offset: int, length: int, flags: int = 0) -> Record:
    return Record(kind, flags, 1, 0, seq, offset, length, 0, None)


def test_records_are_applied_as_they_say() -> None:
    async def main() -> None:
        disk = make_disk()
        facet = make(disk)
        await facet.apply(write(1, 0, b"a" * 8192))
        await facet.apply(clear(2, codec.TRIM, 0, 4096))
        await facet.apply(clear(3, codec.ZERO, 4096, 100, codec.NO_HOLE))
        data = await facet.read(0, 8192)
        assert bytes(data) == bytes(4196) + b"a" * (8192 - 4196)
        assert facet.written_seq == 3

    run(main())


def test_floor_is_what_a_sync_made_safe() -> None:
    async def main() -> None:
        facet = make(make_disk())
        assert facet.floor(5) == 5, "nothing was written here: another volume's records go"
        facet.pwrite(0, b"x")
        facet.written_seq = 7
        assert facet.floor(9) == 0
        await facet.sync()
        assert (facet.synced_seq, facet.floor(9)) == (7, 9)

    run(main())


def test_a_sync_does_not_cover_what_is_still_being_cleared() -> None:
    """O5, O22: record 4 is in the file only when its punch has returned."""

    async def main() -> None:
        facet = make(make_disk())
        facet.written_seq = 3
        punching = asyncio.ensure_future(facet.clear(4, 0, 4096, keep_space=False))
        await asyncio.sleep(0)
        facet.pwrite(8192, b"x")
        facet.written_seq = 5
        syncing = asyncio.ensure_future(facet.sync())
        assert facet.floor(5) == 0
        await asyncio.gather(punching, syncing)
        assert facet.synced_seq == 3
        assert facet.floor(5) == 3, "5 was written: the sync began before 4 was in"
        await facet.sync()
        assert facet.floor(5) == 5

    run(main())


def test_the_log_keeps_a_clear_that_is_not_in_yet() -> None:
    async def main() -> None:
        facet = make(make_disk())
        facet.written_seq = facet.synced_seq = 3
        punching = asyncio.ensure_future(facet.clear(4, 0, 4096, keep_space=False))
        await asyncio.sleep(0)
        assert facet.floor(4) == 3
        await punching
        assert facet.floor(4) == 3
        await facet.sync()
        assert facet.floor(4) == 4

    run(main())


def test_a_write_during_a_sync_is_not_covered() -> None:
    async def main() -> None:
        facet = make(make_disk())
        facet.written_seq = 1
        syncing = asyncio.ensure_future(facet.sync())
        await asyncio.sleep(0)
        facet.pwrite(0, b"x")
        facet.written_seq = 2
        await syncing
        assert facet.synced_seq == 1 and facet.floor(2) == 1

    run(main())


def test_what_is_written_beside_the_log_is_unsynced_until_a_sync_that_began_after_it() -> None:
    """O16: copies, restores and mends; none of it makes the log wait."""

    async def main() -> None:
        facet = make(make_disk())
        writes: list[Callable[[], object]] = [
            lambda: facet.copy(0, b"x"),
            lambda: facet.punch(0, 4096),
            lambda: facet.pwrite(0, b"x"),
            facet.changed_beside,
        ]
        for write_beside in writes:
            assert not facet.unsynced
            syncing = asyncio.ensure_future(facet.sync())
            await asyncio.sleep(0)
            written = write_beside()
            if asyncio.iscoroutine(written):
                await written
            await syncing
            assert facet.unsynced and not facet.dirty
            await facet.sync()
        assert not facet.unsynced

    run(main())


def test_a_failed_sync_is_final() -> None:
    """O16, faults 8 and 9."""

    async def main() -> None:
        disk = make_disk()
        facet = make(disk)
        facet.written_seq = 4
        disk.faults = fail("sync")
        for _ in range(3):
            with pytest.raises(DiskFailed, match="facet"):
                await facet.sync()
            assert facet.synced_seq == 0 and not facet.in_service

    run(main())


def test_the_sync_of_a_facet_that_left_before_its_turn_promises_nothing() -> None:
    """M8: who syncs several awaits each in turn. (Seed 4001101: a restore, ``offline``.)"""

    async def main() -> None:
        facet = make(make_disk())
        facet.written_seq = 4
        facet.leave()
        facet.close()
        with pytest.raises(DiskFailed, match="was closed"):
            await facet.sync()
        assert facet.synced_seq == 0 and facet.failed is None

    run(main())


def test_a_failed_clear_leaves_nothing_pending_and_holds_the_log() -> None:
    """O5: the record of a clear that failed, perhaps half done, is not released."""

    async def main() -> None:
        disk = make_disk()
        facet = make(disk)
        disk.faults = fail("punch")
        with pytest.raises(OSError):
            await facet.apply(clear(2, codec.TRIM, 0, 4096))
        assert facet.pending == {}
        assert facet.floor(2) == 0

    run(main())


@pytest.mark.parametrize("state", list(FacetState))
def test_only_a_synchronised_facet_is_in_service(state: FacetState) -> None:
    """M6, I5."""
    disk = make_disk()
    make(disk)
    facet = LocalFacet.open(disk, PATH, SIZE, state)
    assert facet.in_service is (state is FacetState.SYNCHRONISED)


def test_missing_or_small_is_refused() -> None:
    disk = make_disk()
    with pytest.raises(StateError, match="missing"):
        LocalFacet.open(disk, PATH, SIZE, FacetState.SYNCHRONISED)
    disk.open(PATH, create=True).truncate(SIZE - 1)
    with pytest.raises(StateError, match="bytes, the volume"):
        LocalFacet.open(disk, PATH, SIZE, FacetState.SYNCHRONISED)


def test_a_sync_says_nothing_of_a_stream_that_began_after_it() -> None:
    """O5: a stream of lower numbers, of which the facet has nothing durable yet."""

    async def main() -> None:
        facet = make(make_disk())
        facet.written_seq = 9
        syncing = asyncio.ensure_future(facet.sync())
        await asyncio.sleep(0)
        facet.restart(5)
        facet.write(5, 0, b"x")
        await syncing
        assert facet.floor(5) == 4
        await facet.sync()
        assert facet.floor(5) == 5

    run(main())


def test_a_copy_that_is_given_up_is_not_over_what_is_written_next() -> None:
    """O13, F1: a thread writes on though who waits for it is cancelled."""

    async def main() -> None:
        disk = make_disk()
        facet = make(disk)
        copying = asyncio.ensure_future(facet.copy(0, b"old" * 1000))
        await asyncio.sleep(0)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
        facet.write(1, 0, b"new" * 1000)
        await asyncio.sleep(60.0)
        assert facet.file.pread(0, 3000) == b"new" * 1000

    run(main())
