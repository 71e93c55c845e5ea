"""How a facet comes back (M8, I5)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.config import LogConfig, SnapshotConfig, VolumeConfig
from nbdmirror.engine.create import create
from nbdmirror.engine.node import Node
from nbdmirror.engine.volume import Change
from nbdmirror.errors import StateError
from nbdmirror.ports import Env
from tests.sim.clock import SimClock
from tests.sim.clone import Nobody
from tests.sim.disk import SimDisk
from tests.sim.faults import Fault, Kind
from tests.unit.primary import Primary
from tests.unit.world import make_disk, run

REGION, REGIONS = 4096, 64
FACETS = ("/facets/v0", "/facets/v1")


class Host:
    """A primary of one volume with two facets, one life after the other on one disk."""

    def __init__(self) -> None:
        self.disk: SimDisk = make_disk()
        self.config = replace(
            Primary(self.disk, SnapshotConfig()).config,
            volumes=(VolumeConfig("v", REGIONS * REGION, FACETS, REGION),),
            log=LogConfig(size=1 << 20, hot_extents=61),
        )
        self.lives = 0

    async def start(self) -> None:
        self.lives += 1
        clock = SimClock(asyncio.get_running_loop(), self.disk)  # type: ignore[arg-type]
        env = Env(self.disk, Nobody(), clock, random.Random(self.lives))
        if self.lives == 1:
            await create(env, self.config, "primary")
        self.node = Node(env, self.config)
        await self.node.start(nbd=False)

    def die(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def write(self, region: int, fill: int) -> None:
        data = bytes([fill]) * REGION
        change = Change(codec.WRITE, 0, region * REGION, REGION, data)
        assert self.node.primary is not None
        rest = self.node.primary.group.write(self.node.volumes[0], [change])
        if rest is not None:
            await rest

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
