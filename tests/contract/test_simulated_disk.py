"""The simulated disk: what it may do to a node, and that it does it.

A simulator that never tears a write or loses a name would pass every check of the product.
"""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Callable

import pytest

from nbdmirror.config import KIB
from tests.contract.simulated import run
from tests.sim.clock import SimClock
from tests.sim.disk import SimDisk
from tests.sim.faults import Fault, Kind, Timing
from tests.sim.file import SimFile
from tests.sim.loop import Incarnation, NodeDead, SimLoop


def once(operation: str, fault: Fault) -> Callable[[str, str, int], Fault | None]:
    """An injector for the first operation of that name."""
    left = [fault]
    return lambda op, _path, _nth: left.pop() if op == operation and left else None


def durable_file(disk: SimDisk, content: bytes, path: str = "/file") -> SimFile:
    async def main() -> SimFile:
        file = disk.open(path, create=True)
        file.pwrite(0, content)
        await file.sync()
        await disk.sync_directory("/")
        return file

    made = run(main())
    assert isinstance(made, SimFile)
    return made


class TestPowerCut:
    def test_synced_bytes_stay_and_others_tear_by_sector(self) -> None:
        """Faults 2, 3, 4."""
        versions = [bytes((n,)) * 4 * KIB for n in range(1, 4)]
        seen: Counter[bytes] = Counter()
        torn = 0
        for seed in range(200):
            disk = SimDisk("alpha", seed)
            file = durable_file(disk, versions[0] * 2)
            for version in versions[1:]:
                file.pwrite(0, version)
            assert disk.content("/file")[: 4 * KIB] == versions[-1]
            disk.power_cut()
            content = disk.content("/file")
            assert content == disk.durable_content("/file")
            assert content[4 * KIB :] == versions[0], "synced and not written since"
            sectors = [content[i : i + 512] for i in range(0, 4 * KIB, 512)]
            assert all(sector in [v[:512] for v in versions] for sector in sectors)
            seen.update(sectors)
            torn += len(set(sectors)) > 1
        assert len(seen) == 3, "versions in between land too"
        assert torn > 50

    def test_writes_during_a_sync_are_unsynced(self) -> None:
        lost = 0
        for seed in range(50):
            disk = SimDisk("alpha", seed)
            file = durable_file(disk, b"a" * 512)

            async def main(file: SimFile = file) -> None:
                file.pwrite(0, b"b" * 512)
                sync = asyncio.ensure_future(file.sync())
                await asyncio.sleep(0)
                file.pwrite(0, b"c" * 512)
                await sync

            run(main())
            assert disk.durable_content("/file") == b"b" * 512
            disk.power_cut()
            lost += disk.content("/file") == b"b" * 512
        assert 0 < lost < 50

    def test_an_unfinished_sync_promises_nothing(self) -> None:
        disk = SimDisk("alpha", 1, timing=Timing(sync=(5.0, 6.0)))
        file = durable_file(disk, b"a" * 512)

        async def main() -> None:
            file.pwrite(0, b"b" * 512)
            sync = asyncio.ensure_future(file.sync())
            await asyncio.sleep(1)
            assert disk.durable_content("/file") == b"a" * 512
            sync.cancel()
            await asyncio.sleep(10)
            assert disk.durable_content("/file") == b"b" * 512, "the kernel goes on"

        run(main())

    def test_length_and_punches_are_unsynced_too(self) -> None:
        sizes: set[int] = set()
        punched: set[bool] = set()
        for seed in range(100):
            disk = SimDisk("alpha", seed)
            file = durable_file(disk, b"a" * 8192)
            run(file.punch(0, 4096))
            file.truncate(6000)
            file.pwrite(10_000, b"b")
            disk.power_cut()
            content = disk.content("/file")
            sizes.add(len(content))
            punched.add(content[:4096] == bytes(4096))
            assert content[:4096] in (bytes(4096), b"a" * 4096)
            assert len(content) <= 10_000 or content[10_000:] in (b"b", b"\0")
        assert sizes == {8192, 6000, 10_001}
        assert punched == {True, False}

    def test_names_are_lost_until_the_directory_is_synced(self) -> None:
        """O18."""
        outcomes: Counter[str] = Counter()
        for seed in range(100):
            disk = SimDisk("alpha", seed)
            durable_file(disk, b"old", "/state")

            async def main(disk: SimDisk = disk) -> None:
                file = disk.open("/next", create=True)
                file.pwrite(0, b"new")
                await file.sync()
                disk.rename("/next", "/state")

            run(main())
            disk.power_cut()
            outcomes[disk.content("/state").decode()] += 1
            outcomes["next"] += disk.exists("/next")
        assert set(outcomes) == {"old", "new", "next"} and min(outcomes.values()) > 0

    def test_synced_names_stay(self) -> None:
        for seed in range(20):
            disk = SimDisk("alpha", seed)
            durable_file(disk, b"old", "/state")
            durable_file(disk, b"new", "/next")
            disk.rename("/next", "/state")
            run(disk.sync_directory("/"))
            disk.power_cut()
            assert disk.list("/") == ["state"] and disk.content("/state") == b"new"

    def test_a_kill_keeps_the_cache_and_ends_the_handles(self) -> None:
        """Fault 1."""
        disk = SimDisk("alpha", 1)
        loop = SimLoop()
        life = Incarnation("alpha")
        files: list[SimFile] = []

        async def node() -> None:
            files.append(disk.open("/file", create=True))
            files[0].pwrite(0, b"unsynced")

        async def main() -> None:
            await loop.spawn(life, node())
            life.kill()
            with pytest.raises(NodeDead):
                files[0].pread(0, 1)
            assert disk.open("/file").pread(0, 8) == b"unsynced"

        run(main(), loop)
        assert disk.boots == 1

    def test_boot_id_and_handles_change_with_the_power(self) -> None:
        disk = SimDisk("alpha", 1)
        clock = SimClock(SimLoop(), disk)
        before = clock.boot_id()
        file = durable_file(disk, b"x")
        assert clock.boot_id() == before
        disk.power_cut()
        assert clock.boot_id() != before
        with pytest.raises(NodeDead):
            file.pread(0, 1)

    def test_power_can_be_cut_at_every_operation(self) -> None:
        """The sweep that recovery is tested with: each change is once the last that happened."""

        def survivors(nth: int) -> int:
            disk = SimDisk("alpha", nth)
            loop = SimLoop()
            life = Incarnation("alpha")

            def cut(_op: str, _path: str, count: int) -> None:
                if count == nth:
                    life.kill()
                    disk.power_cut()

            async def node() -> None:
                file = disk.open("/file", create=True)
                for number in range(5):
                    file.pwrite(0, bytes((number,)))
                    await file.sync()
                await disk.sync_directory("/")

            async def main() -> None:
                loop.spawn(life, node())
                await asyncio.sleep(10)

            disk.faults = cut
            run(main(), loop)
            assert disk.operations == min(nth, 12)
            return disk.boots

        assert [survivors(nth) for nth in range(1, 14)] == [2] * 12 + [1]

    def test_a_clone_goes_its_own_way(self) -> None:
        disk = SimDisk("alpha", 1)
        file = durable_file(disk, b"a" * 512)
        file.pwrite(0, b"b" * 512)
        clones = [disk.clone(seed) for seed in range(30)]
        for clone in clones:
            clone.power_cut()
        assert {clone.content("/file")[:1] for clone in clones} == {b"a", b"b"}
        assert disk.content("/file") == b"b" * 512 and disk.boots == 1
        run(file.sync())
        assert disk.durable_content("/file") == b"b" * 512


class TestDiskFaults:
    def test_a_failed_sync_loses_what_later_syncs_pass_over(self) -> None:
        """O16, faults 8, 9: the second handle's sync succeeds and the data is not there."""
        lost = 0
        for seed in range(20):
            disk = SimDisk("alpha", seed)
            file = durable_file(disk, b"a" * 512)
            file.pwrite(0, b"b" * 512)
            disk.faults = once("sync", Fault(Kind.LOSE))
            with pytest.raises(OSError):
                run(file.sync())
            run(disk.open("/file").sync())
            disk.power_cut()
            lost += disk.content("/file") == b"a" * 512
            assert disk.fired["sync lose EIO"] == 1
        assert lost > 5

    def test_a_write_that_is_refused_later_is_told_by_a_sync(self) -> None:
        """O16: once to each who has the file open, and to who opens it before anybody was told."""

        async def main() -> None:
            disk = SimDisk("alpha", 1)
            file, other = disk.open("/file", create=True), disk.open("/file")
            file.pwrite(0, b"old")
            await file.sync()
            disk.faults = once("pwrite", Fault(Kind.REFUSED))
            file.pwrite(0, b"new")
            assert file.pread(0, 3) == b"old", "nobody can tell"
            for one in (file, other, disk.open("/file")):
                with pytest.raises(OSError):
                    await one.sync()
            await disk.open("/file").sync()

        run(main())

    def test_a_lying_disk(self) -> None:
        disk = SimDisk("alpha", 1, lying=True)
        durable_file(disk, b"data")
        assert disk.durable_content("/file") == b""
        assert disk.fired["sync lie"] == 1

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
    def test_short_and_failed_writes(self, number: int) -> None:
        """Faults 10, 11."""
        for kind in (Kind.ERROR, Kind.SHORT):
            disk = SimDisk("alpha", 3)
            file = durable_file(disk, b"a" * 65536)
            disk.faults = once("pwrite", Fault(kind, number))
            with pytest.raises(OSError) as caught:
                file.pwrite(0, b"b" * 65536)
            assert caught.value.errno == number
            landed = disk.content("/file").count(b"b")
            assert landed % 512 == 0
            assert 0 < landed < 65536 if kind is Kind.SHORT else landed == 0

    def test_flips_on_the_way_and_at_rest(self) -> None:
        """Fault 15."""
        disk = SimDisk("alpha", 1)
        file = durable_file(disk, bytes(100))
        disk.faults = once("pread", Fault(Kind.FLIP))
        assert sum(byte.bit_count() for byte in file.pread(0, 100)) == 1
        assert file.pread(0, 100) == bytes(100)
        disk.flip("/file", 7)
        disk.power_cut()
        assert disk.content("/file")[7] == 1

    def test_stalls(self) -> None:
        """Fault 17."""
        disk = SimDisk("alpha", 1)
        loop = SimLoop()
        file = durable_file(disk, b"x")

        async def main() -> None:
            disk.stall(60)
            await file.read(0, 1)
            assert loop.time() >= 60
            disk.faults = once("sync", Fault(Kind.STALL, seconds=30))
            await file.sync()
            assert loop.time() >= 90

        run(main(), loop)

    def test_a_fault_that_cannot_be_is_a_mistake(self) -> None:
        disk = SimDisk("alpha", 1)
        disk.faults = once("create", Fault(Kind.FLIP))
        with pytest.raises(AssertionError):
            disk.open("/file", create=True)
