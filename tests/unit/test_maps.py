"""DCMs on disk (V1, O12, O16): a mark that was synced is found again, a doubt is a full map."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from nbdmirror.codec.mappage import BITS, PAGE_SIZE
from nbdmirror.engine.maps import DcmFile, dirty_runs
from nbdmirror.errors import DiskFailed
from tests.sim.disk import SimDisk
from tests.sim.faults import Fault, Kind
from tests.unit.world import STATE, fail, make_disk, run

PATH = f"{STATE}/dcm/beta.vol"
REGION = 65536
REGIONS = BITS + 50


def opened(disk: SimDisk, default: bool = False, regions: int = REGIONS) -> DcmFile:
    dcm = DcmFile(disk, PATH, regions, REGION)
    dcm.open(default)
    return dcm


async def fresh(disk: SimDisk) -> DcmFile:
    """A map as after a first full resync: nothing marked, default 0, durable."""
    dcm = opened(disk, True)
    dcm.clear()
    await dcm.sync()
    return dcm


def after_a_cut(disk: SimDisk, default: bool = False) -> DcmFile:
    other = disk.clone(disk.random.random())
    other.power_cut()
    return opened(other, default)


def test_marks_survive_the_process_at_once_and_the_machine_after_sync() -> None:
    async def main() -> None:
        disk = make_disk()
        dcm = await fresh(disk)
        dcm.mark(REGION - 1, 2)
        dcm.mark(BITS * REGION, 1)
        assert list(opened(disk).map.runs()) == [(0, 2), (BITS, 1)]
        await dcm.sync()
        assert list(after_a_cut(disk).map.runs()) == [(0, 2), (BITS, 1)]

    run(main())


def test_a_sync_that_joins_a_running_one_still_covers_its_own_marks() -> None:
    """O12, O15: log space is given away on the word of this call."""

    async def main() -> None:
        disk = make_disk()
        dcm = await fresh(disk)
        dcm.mark(0, 1)
        first = asyncio.ensure_future(dcm.sync())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await dcm.sync()
        assert after_a_cut(disk).map.is_marked(0), "the second call returned before the first"
        dcm.mark(REGION, 1)
        await dcm.sync()
        assert after_a_cut(disk).map.is_marked(1)
        await first

    run(main())


def test_after_a_failed_sync_no_later_one_succeeds() -> None:
    """O16: a session that tries again must not be told that the marks are durable."""

    async def main() -> None:
        disk = make_disk()
        dcm = await fresh(disk)
        dcm.mark(0, 1)
        disk.faults = fail("sync")
        for _ in range(3):
            with pytest.raises(DiskFailed, match="map"):
                await dcm.sync()

    run(main())


def test_a_mark_that_could_not_be_written_is_written_by_the_next() -> None:
    """Fault 12: the client's second try must not find the bit set in memory and go on."""

    async def main() -> None:
        disk = make_disk()
        dcm = await fresh(disk)
        disk.faults = fail("pwrite", 2, number=28)
        for _ in range(2):
            with pytest.raises(DiskFailed):
                dcm.mark(0, 1)
        dcm.mark(0, 1)
        assert opened(disk).map.is_marked(0)
        disk.faults = fail("pwrite")
        with pytest.raises(DiskFailed):
            dcm.mark(REGION, 1)
        await dcm.sync()
        assert after_a_cut(disk).map.is_marked(1)

    run(main())


def test_what_a_killed_process_left_in_the_cache_is_synced_by_the_next() -> None:
    """O12: process death, restart, release of the log, power loss."""

    async def main() -> None:
        for seed in range(10):
            disk = make_disk(seed)
            dcm = await fresh(disk)
            dcm.mark(0, 1)
            again = opened(disk)
            again.mark(0, 1)
            await again.sync()
            found = after_a_cut(disk)
            assert found.damage is None and found.map.is_marked(0)

    run(main())


def damage_flip(disk: SimDisk) -> None:
    disk.flip(PATH, 100)


def damage_unlink(disk: SimDisk) -> None:
    disk.unlink(PATH)


def damage_cut(disk: SimDisk) -> None:
    disk.open(PATH).truncate(0)


@pytest.mark.parametrize("damage", [damage_flip, damage_unlink, damage_cut])
def test_a_map_that_is_damaged_or_gone_is_full(damage: Callable[[SimDisk], None]) -> None:
    """X1, I5, "stale label and zero bitmap": no map must never read as "nothing differs"."""

    async def main() -> None:
        disk = make_disk()
        dcm = await fresh(disk)
        dcm.mark(0, 1)
        await dcm.sync()
        damage(disk)
        again = opened(disk)
        assert again.damage is not None and PATH in again.damage
        assert again.map.count == REGIONS and again.map.default
        for _ in range(2):
            again = opened(disk)
            assert again.map.is_marked(0), "also while the new default is not saved"
            await again.sync()
        assert after_a_cut(disk).map.is_marked(0)

        again = opened(disk, True)
        await again.sync()
        assert again.damage is None and again.map.count == REGIONS
        again.clear()
        await again.sync()
        assert after_a_cut(disk).map.count == 0, "a resync mends it"

    run(main())


def test_the_name_of_a_new_map_is_durable() -> None:
    """O18."""

    async def main() -> None:
        for seed in range(10):
            disk = make_disk(seed)
            await fresh(disk)
            disk.power_cut()
            assert disk.exists(PATH)
            assert opened(disk).damage is None

    run(main())


def test_the_name_that_a_killed_process_left_is_durable_with_the_next_sync() -> None:
    """O18: it may be in the page cache only, as marks may. (Seed 4001627: a restore's map.)"""

    async def main() -> None:
        for seed in range(10):
            disk = make_disk(seed)
            opened(disk, True)
            again = opened(disk, True)
            again.clear()
            await again.sync()
            disk.power_cut()
            assert disk.exists(PATH)
            assert opened(disk).damage is None

    run(main())


def test_fill_never_reads_as_fewer_marks_whatever_lands() -> None:
    async def main() -> None:
        for seed in range(30):
            disk = make_disk(seed)
            dcm = await fresh(disk)
            dcm.mark(3 * REGION, 1)
            await dcm.sync()
            dcm.fill()
            assert after_a_cut(disk, False).map.is_marked(3), "default not saved yet"
            await dcm.sync()
            assert after_a_cut(disk, True).map.count == REGIONS, "default saved"

    run(main())


def test_a_full_resync_clears_region_by_region_and_ends_with_a_small_file() -> None:
    async def main() -> None:
        disk = make_disk()
        dcm = opened(disk, True)
        for region in range(0, REGIONS, 10):
            dcm.map.begin(region, min(10, REGIONS - region), 1)
        for region in range(0, REGIONS, 10):
            dcm.finish(region, min(10, REGIONS - region), 1)
        assert dcm.map.count == 0 and dcm.map.default
        await dcm.sync()
        assert after_a_cut(disk, True).map.count == 0
        dcm.clear()
        await dcm.sync()
        assert after_a_cut(disk, False).map.count == 0
        assert after_a_cut(disk, True).map.count == REGIONS, "the default is the caller's to save"

    run(main())


def test_a_torn_page_is_a_full_map() -> None:
    """O17: eight sectors, any of them old; what was marked before is marked after."""

    async def main() -> None:
        outcomes = set()
        for seed in range(40):
            disk = make_disk(seed)
            dcm = await fresh(disk)
            dcm.mark(0, 1)
            await dcm.sync()
            dcm.mark(REGION * 8 * 2000, REGION)
            found = after_a_cut(disk)
            assert found.map.is_marked(0)
            outcomes.add(found.damage is not None)
        assert outcomes == {False, True}

    run(main())


def test_a_failing_disk_while_filling_keeps_the_marks_in_memory() -> None:
    async def main() -> None:
        disk = make_disk()
        dcm = await fresh(disk)
        dcm.mark(0, 1)
        disk.faults = lambda op, path, nth: Fault(Kind.ERROR) if op == "pwrite" else None
        with pytest.raises(DiskFailed):
            dcm.fill()
        assert dcm.map.is_marked(0)

    run(main())


@pytest.mark.parametrize(
    ("offset", "length", "pieces"),
    [
        (0, 40, [(0, 20, False), (20, 10, True), (30, 10, False)]),
        (25, 2, [(25, 2, True)]),
        (25, 10, [(25, 5, True), (30, 5, False)]),
        (0, 20, [(0, 20, False)]),
        (20, 10, [(20, 10, True)]),
        (15, 50, [(15, 5, False), (20, 10, True), (30, 20, False), (50, 15, True)]),
        (95, 10, [(95, 5, False), (100, 3, True), (103, 2, False)]),
    ],
)
def test_dirty_runs(offset: int, length: int, pieces: list[tuple[int, int, bool]]) -> None:
    disk = make_disk()
    dcm = DcmFile(disk, PATH, 103, 1)
    dcm.open(True)
    dcm.clear()
    for first, count in ((20, 10), (50, 20), (100, 3)):
        dcm.map.mark(first, first + count - 1)
    assert dirty_runs(dcm.map, 1, offset, length) == pieces
    assert dcm.dirty_runs(offset, length) == pieces


def test_unlink_removes_it() -> None:
    disk = make_disk()
    dcm = opened(disk, True)
    dcm.close(unlink=True)
    assert not disk.exists(PATH)


def test_the_file_is_sparse_and_sized_by_pages() -> None:
    """I7."""
    disk = make_disk()
    opened(disk, True, regions=(1 << 40) // 4096)
    file = disk.open(PATH)
    assert file.size() == -(-((1 << 40) // 4096) // BITS) * PAGE_SIZE
    assert list(file.data_ranges(0, file.size())) == []
