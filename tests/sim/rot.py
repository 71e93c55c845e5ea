"""Facets that hold something else than was written to them, and the verify that has to find and to
repair it (X6, faults 15 and 16): bits that rotted, and writes that a disk lost or misplaced.

Only where nothing else goes on: whoever reads such content before a verify does is told the wrong
thing.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from nbdmirror.engine.node import Node
from tests.sim.faults import Fault, Kind, Miswrites
from tests.sim.oracle import Moot, Violation, compare

if TYPE_CHECKING:
    from nbdmirror.engine.events import Event
    from tests.sim.host import Host
    from tests.sim.world import World

REGIONS_MAX = 3
VERIFY_SECONDS = 300.0


class Rot:
    """What is wrong with facets, and what a verify told of it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(f"{world.seed}:rot")
        self._losses = random.Random(f"{world.seed}:lost writes")
        self.wanted: dict[tuple[str, int], None] = {}
        """(volume, offset) of regions that hold the wrong thing."""
        self._found: dict[tuple[str, int], None] = {}
        self.spoilt = False
        """From when something is wrong until all of it is mended."""

    def told(self, host: Host, event: Event) -> None:
        """A verify says that a region differs; Violation if nothing is wrong there, and its facets
        could be read."""
        volume, offset = event["volume"], event["offset"]
        paths = event["rotten"] or []
        node = host.node
        facets = [f for v in node.volumes for f in v.facets if f.path in paths] if node else []
        unreadable = bool(facets) and all(facet.errors for facet in facets)
        if (volume, offset) not in self.wanted and not unreadable:
            raise Violation(f"a verify found what is not there: {volume} at {offset}")
        self._found[volume, offset] = None

    async def run(self) -> None:
        """Now and then: something is wrong with one copy, and is found and repaired."""
        world = self._world
        for rng, chance, spoil in (
            (self._random, world.options.rot, self._flip),
            (self._losses, world.options.astray, self._lose),
        ):
            node = world.a.node
            if node is None or rng.random() >= chance or world.options.snapshot_gap:
                continue  # a snapshot would keep what is wrong
            remote = rng.choice(world.remotes)
            index = rng.randrange(len(node.volumes))
            facets = node.volumes[index].facets
            if len(facets) > 1 and rng.random() < 0.5:
                host, path = world.a, rng.choice(facets).path
            else:
                host, path = remote, remote.config.volumes[index].facets[0]
            await self._rest(node)
            await spoil(rng, node, index, host, path)
            self.expect(node, index, host, path)
            await self.verify(node, remote.name)
            await self.check_mended()

    async def _rest(self, node: Node) -> None:
        """A verify that runs already may be past what is spoilt next, and one that is still wanted,
        of whatever remote, would find it before it is said to be wrong."""
        await self._world.in_life(self._world.a, node.wait("verified", None, VERIFY_SECONDS))
        self.spoilt = True

    async def _flip(
        self, rng: random.Random, node: Node, index: int, host: Host, path: str
    ) -> None:
        volume = node.volumes[index]
        rotten: dict[int, None] = {}
        for _ in range(rng.randint(1, REGIONS_MAX)):
            offset = rng.randrange(volume.regions) * volume.region_size
            if offset not in rotten:
                rotten[offset] = None
                length = min(volume.region_size, volume.size - offset)
                host.disk.flip(path, offset + rng.randrange(length))
        self._world.fired["rot that a verify has to find"] += 1

    async def _lose(
        self, rng: random.Random, node: Node, index: int, host: Host, path: str
    ) -> None:
        """Writes of a client that the facet's disk loses, or puts somewhere else in it."""
        from tests.sim.script import Script

        world, size, cell = self._world, node.volumes[index].size, self._world.options.cell
        script = Script(world, lambda: None)
        overflows = world.fired["event overflow"]
        for _ in range(rng.randint(1, REGIONS_MAX)):
            count = rng.randint(1, min(world.options.write_cells, size // cell // 2))
            first, landing = rng.sample(range(size // cell - count + 1), 2)
            kind = rng.choice([Kind.DROP, Kind.STRAY])
            # A synchronous remote that is away may fail the write.
            await world.in_life(world.a, node.wait("in-sync", None, VERIFY_SECONDS))
            faults = Miswrites(path, Fault(kind, shift=(landing - first) * cell))
            host.disk.faults = faults
            await script.write(index, first, count=count)
            await world.in_life(world.a, node.wait("in-sync", None, VERIFY_SECONDS))
            host.disk.faults = None
            assert faults.struck, f"{path} was not written to"
            world.fired[f"{kind.value} that a verify has to find"] += 1
        if host is world.a and world.fired["event overflow"] > overflows:
            raise Moot("a resync has read what the disk lost, and the remote has it")

    def expect(self, node: Node, index: int, host: Host, path: str) -> None:
        """A verify has to find where that copy of a volume is not what it should be."""
        volume, line = node.volumes[index], self._world.history.lines[-1]
        wanted, found = line.image(line.head)[index], host.disk.content(path)
        for offset in range(0, volume.size, volume.region_size):
            region = slice(offset, min(offset + volume.region_size, volume.size))
            if found[region] != wanted[region]:
                self.wanted[volume.name, offset] = None
        self._world.trace("world", f"wrong in {path} on {host.name}: {list(self.wanted)}")

    async def verify(self, node: Node, remote: str) -> None:
        """Has what is wrong found and repaired; Violation if it is not."""
        world = self._world
        await world.in_life(world.a, node.verify(remote, True))
        await world.in_life(world.a, node.wait("verified", remote, VERIFY_SECONDS))
        await world.in_life(world.a, node.wait("in-sync", None, VERIFY_SECONDS))
        if missed := [place for place in self.wanted if place not in self._found]:
            raise Violation(f"a verify of {remote} did not find {missed} (X6)")

    async def check_mended(self) -> None:
        """Everybody has what was written, and nothing else."""
        world = self._world
        node, line = world.a.node, world.history.lines[-1]
        assert node is not None
        for host in world.hosts.values():
            compare(host.images(), line.image(line.head), f"{host.name} after a repair (X6)")
        world.witness.check_facets(world.a, node)
        self.wanted, self._found = {}, {}
        # The image from before the repair holds what was wrong.
        while any(host.node and host.node.snapshots.usable() for host in world.remotes):
            await asyncio.sleep(0.1)
        self.spoilt = False
