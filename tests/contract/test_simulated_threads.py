"""What the simulated disk does in threads: at no moment, but between two, and to its end."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from nbdmirror.config import KIB
from tests.contract.simulated import run
from tests.sim.disk import SimDisk
from tests.sim.faults import Timing
from tests.sim.file import SimFile
from tests.sim.loop import INCARNATION, Incarnation, SimLoop

SLOW = Timing(sync=(0.1, 0.1), read=(0.1, 0.1), write=(0.1, 0.1))
OLD, NEW = b"o" * 4 * KIB, b"n" * 4 * KIB


def filled(disk: SimDisk, content: bytes = OLD) -> SimFile:
    file = disk.open("/file", create=True)
    file.pwrite(0, content)
    return file


def test_a_read_beside_a_write_sees_it_or_not_or_a_part() -> None:
    """O13: who may not see that holds the range; nothing else keeps a thread from it."""
    seen = set()

    async def main(seed: int) -> None:
        file = filled(SimDisk("alpha", seed, timing=SLOW))
        read = asyncio.ensure_future(file.read(0, len(OLD)))
        await asyncio.sleep(0.05)
        file.pwrite(0, NEW)
        data = await read
        seen.add("old" if data == OLD else "new" if data == NEW else "both")
        assert data == OLD[: data.count(b"o")] + NEW[data.count(b"o") :]
        assert data.count(b"o") % 512 == 0

    for seed in range(40):
        run(main(seed))
    assert seen == {"old", "new", "both"}


@pytest.mark.parametrize("name", ["punch", "zero", "allocate"])
def test_a_kill_finds_a_clearing_half_done(name: str) -> None:
    """Fault 1: so is what a process leaves that was filling its log."""
    seen = set()

    for seed in range(40):
        disk, life, loop = SimDisk("alpha", seed, timing=SLOW), Incarnation("alpha"), SimLoop()

        async def work(disk: SimDisk = disk) -> None:
            file = filled(disk, b"" if name == "allocate" else 4 * OLD)
            await (
                file.allocate(16 * KIB) if name == "allocate" else getattr(file, name)(0, 16 * KIB)
            )

        async def main(life: Incarnation = life, loop: SimLoop = loop) -> None:
            loop.spawn(life, work())
            await asyncio.sleep(0.05)
            loop.cut(life)
            await asyncio.sleep(1)

        run(main(), loop)
        content = disk.content("/file")
        seen.add(len(content) if name == "allocate" else content.count(b"o"))
    assert len(seen) > 2 and max(seen) <= 16 * KIB


def test_a_closed_file_is_claimed_until_its_threads_have_done() -> None:
    """M8: the kernel lets go of the lock with the descriptor, and that is closed last."""
    disk = SimDisk("alpha", 1, timing=SLOW)
    disk.exclusive = True
    life, loop = Incarnation("alpha"), SimLoop()

    async def node() -> None:
        file = filled(disk)
        sync = asyncio.ensure_future(file.sync())
        write = asyncio.ensure_future(file.write(0, NEW))
        await asyncio.sleep(0.05)
        file.close()
        write.cancel()
        with pytest.raises(BlockingIOError):
            disk.open("/file")
        await sync  # it was under way
        await asyncio.sleep(0.1)
        other = disk.open("/file")
        assert other.pread(0, 4 * KIB) == NEW, "and so was the write that nobody waits for"

    async def main() -> None:
        await loop.spawn(life, node())

    run(main(), loop)
    assert INCARNATION.get().alive


def test_a_device_is_claimed_too_and_tells_no_more_than_it_can() -> None:
    """M1: it has no holes, no length to be set, and nothing that tells it from another one."""
    disk = SimDisk("alpha", 1)
    disk.exclusive = True
    disk.add_block_device("/dev/disk", 64 * KIB)
    life, loop = Incarnation("alpha"), SimLoop()

    async def node() -> None:
        device = disk.open("/dev/disk")
        with pytest.raises(BlockingIOError):
            disk.open("/dev/disk")
        assert device.identity() == ""
        assert list(device.data_ranges(0, 64 * KIB)) == [(0, 64 * KIB)]
        with pytest.raises(OSError, match="length"):
            device.truncate(0)
        with pytest.raises(OSError, match="space"):
            device.pwrite(64 * KIB - 1, b"ab")
        device.close()
        disk.open("/dev/disk").close()

    async def main() -> None:
        await loop.spawn(life, node())

    run(main(), loop)


def test_a_removal_that_nobody_waits_for_goes_on() -> None:
    """Whoever makes a file of that name meanwhile loses it."""
    disk = SimDisk("alpha", 3)

    async def main() -> None:
        filled(disk).close()
        removal = asyncio.ensure_future(disk.remove("/file"))
        await asyncio.sleep(0)
        removal.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await removal
        await asyncio.sleep(0.02)
        assert not disk.exists("/file")

    run(main())
