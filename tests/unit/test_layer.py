"""A layer on disk (O21, X6): what was kept is kept, what was not is not believed."""

from __future__ import annotations

import asyncio
import random

import pytest

from nbdmirror.engine.layer import LayerFile
from nbdmirror.errors import FormatError
from tests.sim.disk import SimDisk
from tests.unit.world import STATE, fail, make_disk, run

PATH = f"{STATE}/layer"
UUID = "0123456789abcdef" * 2
REGION = 4096
SIZE = 100 * REGION - 512


async def fresh(disk: SimDisk) -> LayerFile:
    layer = await LayerFile.create(disk, PATH, UUID, SIZE, REGION)
    await disk.sync_directory(STATE)
    return layer


def content(region: int) -> bytes:
    return random.Random(region).randbytes(min(REGION, SIZE - region * REGION))


async def reopened(disk: SimDisk) -> LayerFile:
    layer = await LayerFile.open(disk, PATH, UUID, SIZE, REGION)
    await layer.prove()
    return layer


def test_what_was_kept_survives_a_power_cut() -> None:
    """O21: durable by the one sync of ``keep``, the last, short region too."""

    async def main() -> None:
        disk = make_disk()
        layer = await fresh(disk)
        await layer.keep([(3, content(3)), (99, content(99)), (64, None)], [7])
        disk.power_cut()
        again = await reopened(disk)
        assert bytes(await again.read(3)) == content(3)
        assert bytes(await again.read(99)) == content(99)
        assert bytes(await again.read(64)) == bytes(REGION)
        assert again.map.kept.count == 4
        with pytest.raises(FormatError, match="could not be read"):
            await again.read(7)

    run(main())


def test_keeping_costs_one_sync() -> None:
    """The bar: taking a snapshot adds at most one disk sync to any request."""

    async def main() -> None:
        disk = make_disk()
        layer = await fresh(disk)
        syncs = []
        disk.faults = lambda operation, path, nth: (
            syncs.append(path) if operation == "sync" else None
        )
        await layer.keep([(region, content(region)) for region in range(50)])
        assert len(syncs) == 1

    run(main())


def test_after_a_cut_in_the_middle_each_region_is_right_or_absent() -> None:
    """O21: the disk orders the two halves of a ``keep`` as it likes; the checksum decides."""

    async def main() -> None:
        kept = 0
        for seed in range(60):
            disk = make_disk(seed)
            layer = await fresh(disk)
            await layer.keep([(5, content(5))])
            disk.faults = fail("sync", path=PATH)
            with pytest.raises(OSError):
                await layer.keep([(4, content(4)), (6, content(6)), (70, content(70))])
            assert layer.map.kept.count == 1
            disk.faults = None
            disk.power_cut()
            again = await reopened(disk)
            assert bytes(await again.read(5)) == content(5)
            for region in (4, 6, 70):
                if again.map.kept.is_marked(region):
                    assert bytes(await again.read(region)) == content(region)
                    kept += 1
            # And what was not believed stays so: it may be kept with other content now.
            disk.power_cut()
            assert (await reopened(disk)).map.kept.count == again.map.kept.count
        assert 0 < kept < 180

    run(main())


@pytest.mark.parametrize("seed", range(40))
def test_a_cut_while_it_is_proved_leaves_nothing_that_is_believed_unproved(seed: int) -> None:
    """A process died before the one sync of ``keep`` had ended; the power fails while the next one
    proves what is in the page cache only."""

    async def main() -> None:
        disk = make_disk(seed)
        layer = await fresh(disk)
        keeping = asyncio.ensure_future(layer.keep([(3, content(3)), (5, content(5))]))
        await asyncio.sleep(0)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        proving = asyncio.ensure_future(reopened(disk))
        await asyncio.sleep(0.000_1 * (1 + seed % 10))
        proving.cancel()
        await asyncio.gather(proving, return_exceptions=True)
        disk.power_cut()
        again = await reopened(disk)
        for region in (3, 5):
            if again.map.kept.is_marked(region):
                assert bytes(await again.read(region)) == content(region)

    run(main())


def test_rot_is_told() -> None:
    """X6."""

    async def main() -> None:
        disk = make_disk()
        layer = await fresh(disk)
        await layer.keep([(1, content(1))])
        await layer.settle()
        layer.close()
        file = disk.open(PATH)
        at = file.size() - SIZE + REGION
        file.pwrite(at + 100, b"rot")
        file.close()
        again = await reopened(disk)
        with pytest.raises(FormatError, match="region 1 does not match"):
            await again.read(1)

    run(main())


def test_a_damaged_sector_or_another_snapshots_file_is_refused() -> None:
    async def main() -> None:
        disk = make_disk()
        layer = await fresh(disk)
        await layer.keep([(1, content(1))])
        layer.close()
        with pytest.raises(FormatError, match="not the layer"):
            await LayerFile.open(disk, PATH, UUID[::-1], SIZE, REGION)
        file = disk.open(PATH)
        file.pwrite(4096 + 100, b"\1")
        file.close()
        with pytest.raises(FormatError, match="map page 0"):
            await LayerFile.open(disk, PATH, UUID, SIZE, REGION)

    run(main())


def test_what_is_written_into_a_snapshot_is_there_after_a_sync() -> None:
    async def main() -> None:
        disk = make_disk()
        layer = await fresh(disk)
        layer.put(2, content(2))
        layer.pwrite(2, 512, b"x" * 512)
        await layer.sync()
        layer.put(3, content(3))
        disk.power_cut()
        again = await reopened(disk)
        assert bytes(await again.read(2)) == content(2)[:512] + b"x" * 512 + content(2)[1024:]
        assert not again.map.kept.is_marked(3)

    run(main())
