"""How a facet comes back, or leaves, at a start (M8, M12, I5, I8)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from nbdmirror.config import SnapshotConfig, VolumeConfig
from nbdmirror.engine import recovery
from nbdmirror.errors import StateError
from tests.sim.faults import AllLost, Fault, Kind
from tests.unit.primary import REGION, Primary
from tests.unit.world import make_disk, run

REGIONS = 64
FACETS = ("/facets/v0", "/facets/v1")


class Host(Primary):
    """A primary of one volume with two facets."""

    def __init__(self, spill: int) -> None:
        super().__init__(make_disk(), SnapshotConfig())
        volume = VolumeConfig("v", REGIONS * REGION, FACETS, REGION)
        log = replace(self.config.log, spill_threshold=spill)
        self.config = replace(self.config, volumes=(volume,), log=log)

    def die(self, *, power: bool = False) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        if power:
            self.disk.power_cut(AllLost())

    def in_service(self) -> list[str]:
        return [facet.path for facet in self.node.volumes[0].in_service()]


def play(test: Callable[[Host], Awaitable[None]], *, devices: bool = False, spill: int = 0) -> None:
    async def main() -> None:
        host = Host(spill)
        for path in FACETS if devices else ():
            host.disk.add_block_device(path, REGIONS * REGION)
        await host.start()
        await test(host)
        await host.node.stop()

    run(main())


@pytest.mark.parametrize("clean", [True, False])
def test_a_new_disk_that_says_not_who_it_is_is_compared(clean: bool) -> None:
    """I5: as the hint of a failed facet has it: its disk is replaced, and the node restarted. From
    the log a new disk would get but what was written since it failed."""

    async def test(host: Host) -> None:
        for region in range(32):
            await host.write(region, region + 1)
        await host.node.housekeeper.sync_facets()
        await host.node.housekeeper._release()
        host.disk.broken.add(FACETS[1])
        await host.write(40, 77)
        await asyncio.sleep(1)
        if clean:
            await host.node.stop()
        else:
            host.die()
        host.disk.add_block_device(FACETS[1], REGIONS * REGION)
        host.disk.broken.clear()
        await host.start()
        while len(host.in_service()) < 2:
            await asyncio.sleep(1)
        assert host.disk.content(FACETS[0]) == host.disk.content(FACETS[1])

    play(test, devices=True)


def test_a_command_that_came_too_soon_ends_no_attempts() -> None:
    """M8: ``facet online`` while the disk is not there yet: the facet is tried again, as before."""

    async def test(host: Host) -> None:
        def gone(name: str, path: str, nth: int) -> Fault | None:
            wanted = path == FACETS[1] and name in ("pwrite", "open")
            return Fault(Kind.ERROR) if wanted else None

        host.disk.faults = gone
        await host.write(0, 1)
        await asyncio.sleep(15)
        with pytest.raises(StateError, match="cannot be opened"):
            await host.node.facet("online", FACETS[1])
        host.disk.faults = None
        async with asyncio.timeout(4000):
            while len(host.in_service()) < 2:
                await asyncio.sleep(1)

    play(test)


@pytest.mark.parametrize(
    ("spill", "operation"),
    [
        (0, "try_pread"),
        (0, "pwrite"),
        (0, "sync"),
        (8192, "try_pread"),
        (8192, "write"),
        (8192, "sync"),
    ],
)
def test_one_bad_disk_keeps_no_node_from_recovering(spill: int, operation: str) -> None:
    """I8, M12: after a power loss, or the death of a process whose log was in memory, what was
    active is made equal, or written anew. A facet that cannot do it leaves service, durably."""

    async def test(host: Host) -> None:
        for region in range(8):
            await host.write(region, region + 1)
        host.die(power=not spill)
        if not spill:
            host.disk.scribble(FACETS[1], 3 * REGION, b"torn")

        def bad(name: str, path: str, nth: int) -> Fault | None:
            return Fault(Kind.ERROR) if (name, path) == (operation, FACETS[1]) else None

        host.disk.faults = bad
        await host.start()
        assert host.in_service() == [FACETS[0]]
        host.die()
        await host.start()
        assert host.in_service() == [FACETS[0]]
        host.disk.faults = None
        while len(host.in_service()) < 2:
            await asyncio.sleep(1)
        assert host.disk.content(FACETS[0]) == host.disk.content(FACETS[1])

    play(test, spill=spill)


def test_what_was_taken_from_a_facet_that_fails_then_is_durable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """I3: one facet was made equal to another in part when that failed; it is the last by then, and
    what a client has read of it stays."""
    monkeypatch.setattr(recovery, "LEVEL_BYTES", REGION)

    async def test(host: Host) -> None:
        await host.write(3, 4)
        host.die(power=True)  # of the log too
        host.disk.scribble(FACETS[0], 3 * REGION, b"kept")
        written = False

        def bad(name: str, path: str, nth: int) -> Fault | None:
            nonlocal written
            written = written or (name, path) == ("pwrite", FACETS[1])
            failing = written and (name, path) == ("try_pread", FACETS[0])
            return Fault(Kind.ERROR) if failing else None

        host.disk.faults = bad
        await host.start()
        assert host.in_service() == [FACETS[1]]
        host.die(power=True)
        assert host.disk.content(FACETS[1])[3 * REGION :].startswith(b"kept")
        host.disk.faults = None
        await host.start()

    play(test)
