"""Bit rot at the end of a run, and the verify that has to find and to repair it (X6).

Only where nothing else goes on: what rots is content that no client wrote, and whoever reads it
before a verify does is told the wrong thing.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from nbdmirror.engine.node import Node
from tests.sim.oracle import Violation, compare

if TYPE_CHECKING:
    from nbdmirror.engine.events import Event
    from tests.sim.host import Host
    from tests.sim.world import World

REGIONS_MAX = 3
VERIFY_SECONDS = 300.0


class Rot:
    """What has rotted, and what a verify told of it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(f"{world.seed}:rot")
        self.wanted: dict[tuple[str, int], None] = {}
        """(volume, offset) of regions that rotted."""
        self._found: dict[tuple[str, int], None] = {}

    def told(self, host: Host, event: Event) -> None:
        """A verify says that a region differs; Violation if none rotted there, and its facets could
        be read."""
        volume, offset = event["volume"], event["offset"]
        paths = event["rotten"] or []
        node = host.node
        facets = [f for v in node.volumes for f in v.facets if f.path in paths] if node else []
        unreadable = bool(facets) and all(facet.errors for facet in facets)
        if (volume, offset) not in self.wanted and not unreadable:
            raise Violation(f"a verify found what is not there: {volume} at {offset}")
        self._found[volume, offset] = None

    async def run(self) -> None:
        """Now and then: rots some regions of one copy, and has them found and repaired."""
        world, rng = self._world, self._random
        node = world.a.node
        if node is None or rng.random() >= world.options.rot or world.options.snapshot_gap:
            return  # a snapshot would keep what rotted
        remote = rng.choice(world.remotes)
        index = rng.randrange(len(node.volumes))
        facets = node.volumes[index].facets
        if len(facets) > 1 and rng.random() < 0.5:
            host, path = world.a, rng.choice(facets).path
        else:
            host, path = remote, remote.config.volumes[index].facets[0]
        volume = node.volumes[index]
        for _ in range(rng.randint(1, REGIONS_MAX)):
            region = rng.randrange(volume.regions)
            place = volume.name, region * volume.region_size
            if place not in self.wanted:
                self.wanted[place] = None
                length = min(volume.region_size, volume.size - place[1])
                host.disk.flip(path, place[1] + rng.randrange(length))
        world.trace("world", f"rot in {path} on {host.name}: {list(self.wanted)}")
        world.fired["rot that a verify has to find"] += 1
        await self._verify(node, remote.name)
        self.wanted = {}

    async def _verify(self, node: Node, remote: str) -> None:
        world = self._world
        await world.in_life(world.a, node.verify(remote, True))
        await world.in_life(world.a, node.wait("verified", remote, VERIFY_SECONDS))
        await world.in_life(world.a, node.wait("in-sync", None, VERIFY_SECONDS))
        if missed := [place for place in self.wanted if place not in self._found]:
            raise Violation(f"a verify of {remote} did not find {missed} (X6)")
        line = world.history.lines[-1]
        for host in world.hosts.values():
            compare(host.images(), line.image(line.head), f"{host.name} after a repair (X6)")
        world.witness.check_facets(world.a, node)
        # The image from before the repair holds what had rotted.
        while any(host.node and host.node.snapshots.usable() for host in world.remotes):
            await asyncio.sleep(0.1)
