"""The active map's file (O1): no extent is hot that would not be found after a power cut."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.codec.mappage import SECTOR_SIZE, SLOTS
from nbdmirror.config import LogConfig
from nbdmirror.engine.activemap import FILE_NAME, ActiveMapFile
from nbdmirror.errors import DiskFailed
from tests.sim.disk import SimDisk
from tests.unit.world import STATE, fail, make_disk, run

EXTENT = 1 << 22
PATH = f"{STATE}/{FILE_NAME}"


def load(disk: SimDisk, slots: int = SLOTS, settled: int = 0) -> ActiveMapFile:
    config = LogConfig(extent_size=EXTENT, hot_extents=slots)
    return ActiveMapFile.open(disk, STATE, config, settled)


async def make(disk: SimDisk, slots: int = SLOTS) -> ActiveMapFile:
    await ActiveMapFile.create(disk, STATE, slots)
    await disk.sync_directory(STATE)
    return load(disk, slots)


def found_after_a_cut(disk: SimDisk, slots: int = SLOTS) -> list[int]:
    other = disk.clone("cut")
    other.power_cut()
    active = load(other, slots)
    assert active.damaged is None
    return sorted(active.hot)


def test_activated_means_durable() -> None:
    async def main() -> None:
        disk = make_disk()
        active = await make(disk, 3 * SLOTS)
        await active.activate([5, 900, 5])
        assert found_after_a_cut(disk, 3 * SLOTS) == [5, 900]
        await active.activate(list(range(1000, 1100)))
        assert set(found_after_a_cut(disk, 3 * SLOTS)) >= {5, 900, *range(1000, 1100)}

    run(main())


def test_hot_never_runs_ahead_of_the_disk() -> None:
    """O1 under load: at every moment what is hot would be found."""

    async def main() -> None:
        disk = make_disk()
        active = await make(disk)
        seq = 0
        active.safe_seq = lambda: seq

        async def writer(first: int) -> None:
            nonlocal seq
            for key in range(first, first + 60):
                await active.activate([key])
                seq += 1
                active.hot[key] = seq

        writers = [asyncio.ensure_future(writer(1000 * n)) for n in range(4)]
        while not all(task.done() for task in writers):
            assert set(active.hot) <= set(found_after_a_cut(disk))
            await asyncio.sleep(0.0005)
        await asyncio.gather(*writers)
        assert len(active.hot) <= SLOTS

    run(main())


def test_a_full_map_asks_for_safety_and_waits() -> None:
    async def main() -> None:
        disk = make_disk()
        active = await make(disk)
        await active.activate(list(range(SLOTS)))
        for key in range(SLOTS):
            active.hot[key] = 10
        safe, asked = 9, 0
        active.safe_seq = lambda: safe

        async def make_safe() -> None:
            nonlocal safe, asked
            asked += 1
            await asyncio.sleep(0.01)
            safe = 10

        active.make_safe = make_safe
        await active.activate([5000])
        assert asked == 1 and 5000 in active.hot

    run(main())


@pytest.mark.parametrize("operation", ["pwrite", "sync"])
def test_a_disk_error_leaves_the_extent_cold(operation: str) -> None:
    async def main() -> None:
        disk = make_disk()
        active = await make(disk)
        disk.faults = fail(operation)
        with pytest.raises(DiskFailed, match="active map"):
            await active.activate([7])
        assert 7 not in active.hot
        if operation == "pwrite":  # after a failed sync no later one succeeds (O16)
            await active.activate([7])
            assert found_after_a_cut(disk) == [7]
        else:
            with pytest.raises(DiskFailed):
                await active.activate([7])

    run(main())


def test_a_cancelled_activation_can_be_repeated() -> None:
    async def main() -> None:
        disk = make_disk()
        active = await make(disk)
        task = asyncio.ensure_future(active.activate([7]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert 7 not in active.hot
        await active.activate([7])
        assert found_after_a_cut(disk) == [7]

    run(main())


def test_settle_makes_a_killed_process_s_marks_durable() -> None:
    """O1, m6: on disk by luck is not durable."""

    async def main() -> None:
        lost = 0
        for seed in range(20):
            disk = make_disk(seed)
            active = await make(disk)
            task = asyncio.ensure_future(active.activate([7]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            again = load(disk, SLOTS)
            assert list(again.hot) == [7]
            lost += found_after_a_cut(disk) == []
            await again.settle()
            assert found_after_a_cut(disk) == [7]
            task.cancel()
        assert lost, "the test never saw the danger"

    run(main())


def test_damage_is_remembered_and_the_rest_kept() -> None:
    async def main() -> None:
        disk = make_disk()
        active = await make(disk, 2 * SLOTS)
        await active.activate(list(range(2 * SLOTS)))
        disk.flip(PATH, SECTOR_SIZE + 100)
        again = load(disk, 2 * SLOTS)
        assert again.damaged is not None and len(again.hot) == SLOTS

    run(main())


def test_a_lowered_limit_counts_as_damage_if_something_was_there() -> None:
    async def main() -> None:
        disk = make_disk()
        active = await make(disk, 2 * SLOTS)
        assert load(disk, SLOTS).damaged is None
        await active.activate(list(range(2 * SLOTS)))
        assert load(disk, SLOTS).damaged is not None

    run(main())


def test_what_was_settled_and_is_gone_is_damage() -> None:
    """Fault 16: a file that was cut short, or whose sectors read as zeros, proves nothing; a raised
    limit is none."""

    async def main() -> None:
        disk = make_disk()
        active = await make(disk, 2 * SLOTS)
        await active.settle()
        assert load(disk, 3 * SLOTS, settled=2).damaged is None
        file = disk.open(PATH)
        whole = file.pread(0, 2 * SECTOR_SIZE)
        for slots in (2 * SLOTS, SLOTS):
            for size in (SECTOR_SIZE, SECTOR_SIZE + 100, 0):
                file.truncate(size)
                assert load(disk, slots, settled=2).damaged == f"{PATH} was cut short"
            file.truncate(2 * SECTOR_SIZE)
            assert load(disk, slots, settled=2).damaged == f"{PATH}: map page 1 is gone"
            assert load(disk, slots, settled=0).damaged is None
            file.pwrite(0, whole)
            assert load(disk, slots, settled=2).damaged is None

    run(main())


def test_a_clean_stop_empties_it() -> None:
    async def main() -> None:
        disk = make_disk()
        active = await make(disk)
        await active.activate([1, 2, 3])
        active.hot[2] = 9
        active.safe_seq = lambda: 5
        await active.drop_safe()
        assert found_after_a_cut(disk) == [2]

    run(main())


def test_one_sync_serves_all_who_wait() -> None:
    """A burst of writes into cold extents costs few syncs, not one for each."""

    async def main() -> None:
        disk = make_disk()
        active = await make(disk)
        syncs: list[str] = []

        def watch(operation: str, path: str, nth: int) -> None:
            if operation == "sync":
                syncs.append(path)

        disk.faults = watch
        await asyncio.gather(*(active.activate([key, key + 100]) for key in range(20)))
        assert len(syncs) <= 3  # the first asks alone
        assert set(found_after_a_cut(disk)) == {*range(20), *range(100, 120)}
        # They do not crowd each other out: a quarter of them is enough for the map.
        await asyncio.gather(*(active.activate([1000 + key]) for key in range(4 * SLOTS)))
        assert len(active.hot) <= SLOTS

    run(main())


def test_others_extents_do_not_crowd_out_one_of_many() -> None:
    """A TRIM of many extents of which most are in; others wait for as many. (Seed 6002428.)"""

    async def main() -> None:
        disk = make_disk()
        active = await make(disk)
        active.safe_seq = lambda: 0
        many = list(range(SLOTS // 2 + 3))
        await active.activate(many[:-1])

        async def make_safe() -> None:
            raise AssertionError("all that is in is safe")

        active.make_safe = make_safe
        active._wanted.update(dict.fromkeys(range(8000, 8040)))  # who waits behind it
        await active.activate(many)
        assert active.hot.keys() >= {*many}

    run(main())


def test_likely_extents_come_along_where_there_is_room() -> None:
    """They cost no sync of their own, and crowd nobody out."""

    async def main() -> None:
        disk = make_disk()
        active = await make(disk)
        active.safe_seq = lambda: 0
        await active.activate([5], along=range(6, 6 + 2 * SLOTS))
        assert 5 in active.hot and len(active.hot) == SLOTS
        assert found_after_a_cut(disk) == sorted(active.hot)
        for key in active.hot:
            active.hot[key] = 1  # not safe yet
        active.hot[7] = 0
        await active.activate([1000], along=range(2000, 2010))
        assert 1000 in active.hot and 7 not in active.hot and 2000 not in active.hot

    run(main())
