"""How a facet comes back (M8, I5)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from nbdmirror.config import SnapshotConfig, VolumeConfig
from nbdmirror.errors import StateError
from tests.sim.faults import Fault, Kind
from tests.unit.primary import REGION, Primary
from tests.unit.world import make_disk, run

REGIONS = 64
FACETS = ("/facets/v0", "/facets/v1")


class Host(Primary):
    """A primary of one volume with two facets."""

    def __init__(self) -> None:
        super().__init__(make_disk(), SnapshotConfig())
        volume = VolumeConfig("v", REGIONS * REGION, FACETS, REGION)
        self.config = replace(self.config, volumes=(volume,))

    def die(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def in_service(self) -> list[str]:
        return [facet.path for facet in self.node.volumes[0].in_service()]


def play(test: Callable[[Host], Awaitable[None]], *, devices: bool = False) -> None:
    async def main() -> None:
        host = Host()
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
