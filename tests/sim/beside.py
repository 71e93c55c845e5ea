"""Changes that go by the write path: somebody writes into a facet, and tells the node so (V13).

Between the write and the answer to ``changed`` nothing is promised about the ranges; from the
answer on they are part of the group's history like anything else, at the seq of the mark. If the
node dies in between, the person says it again, before anybody else writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING

from nbdmirror.engine.node import Node
from nbdmirror.errors import NbdmirrorError, Refused
from tests.sim.oracle import Write, pattern

if TYPE_CHECKING:
    from tests.sim.world import World

RANGES_MAX = 3


class Beside:
    """The one change that is under way, if there is one."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.rng = random.Random(f"{world.seed}:beside")
        self._volume = 0
        self._source = ""
        """The facet that was written to."""
        self._ranges: list[tuple[int, int]] = []
        self._writes: list[Write] = []
        self.pending = False
        """It is in a facet, and nobody was told that it was taken in."""
        self._restarted = False
        self._undone = False
        """The facet has left service, and may be back without it: it has to be written again."""
        self._hidden: list[tuple[int, int | None]] = []
        """Behind which record, up to which mark, a node may have the ranges as they were at one
        time or another: a resync may have come by meanwhile."""
        self._seq = 0

    def hides(self, seq: int) -> bool:
        """Whether nothing is promised of the group after that record."""
        return any(a <= seq and (b is None or seq < b) for a, b in self._hidden)

    async def once(self) -> None:
        """Writes into a facet, and says so."""
        from tests.sim.world import Gone

        world = self._world
        node = world.a.node
        if node is None:
            return
        with contextlib.suppress(Gone, NbdmirrorError):  # Gone: it is said again at the next start
            await world.in_life(world.a, self._change_and_say(node))
        while self.pending and world.a.node is node:
            await asyncio.sleep(0.1)
            with contextlib.suppress(Gone, NbdmirrorError):
                await world.in_life(world.a, self.say(node))

    async def _change_and_say(self, node: Node) -> None:
        """In one step: nobody writes there, or takes a snapshot, in between."""
        if self._quiet(node):
            self.change(node)
            await self.say(node)

    def _quiet(self, node: Node) -> bool:
        """Whether it is known what each facet holds, and who may be asked for it."""
        world = self._world
        if self.pending or world.options.last_facet or world.a.disk.faults is not None:
            return False
        if node.snapshots.busy is not None or node.snapshots.lock.locked() or world.fresh:
            return False
        assert node.facets is not None
        self._volume = self.rng.randrange(len(node.volumes))
        for one in node.facets.members:
            if one.saved["offline"] and one.facet.is_open:
                return False  # somebody is just taking it out
            if not (one.saved["offline"] or one.facet.in_service):
                return False  # it comes back by itself, and counts as much as the one written to
        volume = node.volumes[self._volume]
        flying = volume.locks.held or any(facet.pending for facet in volume.facets)
        return bool(volume.in_service()) and not flying and node.log.failed is None

    def change(self, node: Node) -> None:
        """Writes into a facet."""
        world, rng = self._world, self.rng
        cell, size = world.options.cell, world.options.sizes[self._volume]
        self._ranges, self._writes = [], []
        self._hidden.append((world.history.head, None))
        self.pending = True
        for _ in range(rng.randint(1, RANGES_MAX)):
            count = rng.randint(1, min(4 * world.options.write_cells, size // cell))
            offset, length = rng.randrange(size // cell - count + 1) * cell, count * cell
            self._ranges.append((offset, length))
        self._scribble(node)
        world.fired["changed beside the write path"] += 1

    def _scribble(self, node: Node) -> None:
        world = self._world
        for write in self._writes:
            world.content.end(write, acked=False)
        self._source, self._writes = node.volumes[self._volume].source().path, []
        for offset, length in self._ranges:
            write = world.content.begin(self._volume, offset, length, world.content.value())
            self._writes.append(write)
            world.a.disk.scribble(self._source, offset, pattern(write.value, length))
        world.trace("people", f"change {self._source} {self._ranges}")

    async def say(self, node: Node) -> None:
        """Tells the node; raises what ``changed`` raises, or Gone if it dies first."""
        world, volume = self._world, node.volumes[self._volume]
        # It has left with what was written to it; or another one is what the node came back with.
        possible = volume.in_service()[: 1 if self._restarted else None]
        if self._undone or not any(facet.path == self._source for facet in possible):
            self._scribble(node)
        self._restarted = self._undone = False
        try:
            await node.people.changed(volume.name, self._ranges, self._source, True)
        except Refused as error:
            self._undone = "has left service" in error.message
            raise
        for write in self._writes:
            world.content.end(write, acked=True, durable=True)
        self._hidden = [(a, self._seq if b is None else b) for a, b in self._hidden]
        self.pending = False
        world.trace("people", "it was taken in")

    def logged(self, seq: int) -> None:
        """Its mark is in the log: the volume stands still, and is what its facet holds."""
        world = self._world
        content = world.a.disk.content(self._source)
        image = bytearray(world.history.lines[-1].image(seq)[self._volume])
        for offset, length in self._ranges:
            data = content[offset : offset + length]
            world.content.check(
                self._volume,
                offset,
                data,
                since=world.content.now,
                crashed=False,
                what="what was changed (V13)",
            )
            image[offset : offset + length] = data
        world.history.restored(seq, {self._volume: bytes(image)})
        self._seq = seq

    def died(self, head: int, end_seq: int) -> None:
        """The primary died after record ``head`` and came back after ``end_seq``, whatever became
        of the change."""
        self._restarted = True
        if self.pending:
            self._hidden = [(a, head + 1 if b is None else b) for a, b in self._hidden]
            self._hidden.append((end_seq, None))
