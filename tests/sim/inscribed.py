"""What people write into snapshots (V9), and what a snapshot may then hold.

Each node's snapshot is its own: what is written into one is in no other, nor in the volume, unless
somebody restores it (V10). A write that was not flushed may be lost with the host's power; what was
restored may not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdmirror.codec import record as codec
from nbdmirror.engine.node import Node
from nbdmirror.engine.volume import Change
from tests.sim.oracle import ID_BYTES, Violation, pattern

if TYPE_CHECKING:
    from tests.sim.host import Host
    from tests.sim.world import World

WRITES_MAX = 3
Entry = dict[str, Any]
Place = tuple[str, int, str]
"""A host, which disk of it, and the uuid of a snapshot."""


@dataclass(slots=True)
class Cell:
    """The values that a cell has had, in their order; those before ``floor`` are overwritten for
    good, ``last`` is the last one that was acknowledged, in which life of the node."""

    values: list[int]
    floor: int = 0
    last: int = 0
    life: int = 0

    def acknowledged(self, place: int, life: int) -> None:
        """The value at ``place`` was; it is lost with the node, or not, unless it is flushed."""
        self.last, self.life = place, life

    def flushed(self, life: int) -> None:
        """What was acknowledged in this life is durable."""
        if self.life == life:
            self.floor = self.last


class Inscribed:
    """Writes into snapshots, one after the other."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.rng = random.Random(f"{world.seed}:inscribed")
        self._cells: dict[Place, dict[tuple[int, int], Cell]] = {}
        self._taken: dict[str, dict[int, bytes]] = {}
        """By uuid: what was in it when it was last restored on the primary, by volume."""
        self.busy = False
        """Somebody writes into one, or restores one."""
        self.count = 0
        """Of beginnings and ends of that, and of each write and flush."""

    async def once(self, host: Host, node: Node, entry: Entry, images: Sequence[bytes]) -> None:
        """Writes into a snapshot of which ``images`` are what it was taken of."""
        if self.busy:
            return
        self.busy = True
        self.count += 1
        try:
            await self._world.in_life(host, self._write(host, node, entry, images))
        finally:
            self.busy = False
            self.count += 1

    async def _write(self, host: Host, node: Node, entry: Entry, images: Sequence[bytes]) -> None:
        rng, world = self.rng, self._world
        await node.people.export(entry["uuid"], True)
        at = rng.randrange(len(entry["volumes"]))
        index, image = entry["volumes"][at], images[at]
        served = node.people._exports.serve(entry, index)
        size = world.options.cell
        for _ in range(rng.randint(1, WRITES_MAX)):
            count = rng.randint(1, min(2 * world.options.write_cells, len(image) // size))
            first = rng.randrange(len(image) // size - count + 1)
            value = world.content.value() if rng.random() < 0.8 else 0
            touched = [
                self._cell(host, entry, index, n, image) for n in range(first, first + count)
            ]
            for cell in touched:
                cell.values.append(value)
            places = [len(cell.values) - 1 for cell in touched]
            durable = rng.random() < 0.2
            data = pattern(value, count * size)
            if value:
                change = Change(codec.WRITE, 0, first * size, len(data), data)
                rest = served.write(served, [change], durable=durable)
                assert rest is not None
                await rest
            else:
                change = Change(codec.ZERO, 0, first * size, len(data), None)
                await served.clear(served, change, durable=durable)
            for cell, place in zip(touched, places, strict=True):
                cell.acknowledged(place, host.life.number)
                if durable:
                    cell.flushed(host.life.number)
            self.count += 1
            if bytes(await served.read(first * size, len(data))) != data:
                raise Violation(f"{served.name} on {host.name} does not hold what was written (V9)")
            what = f"write {value} into {served.name} on {host.name}"
            world.trace("people", f"{what}: {first} {count}{' FUA' if durable else ''}")
            world.fired["written into a snapshot"] += 1
        if rng.random() < 0.5:
            await served.flush()
            world.trace("people", f"flushed {served.name} on {host.name}")
            self._flushed(host, entry, index)
            self.count += 1

    def _cell(self, host: Host, entry: Entry, index: int, number: int, image: bytes) -> Cell:
        cells = self._cells.setdefault((host.name, host.replaced, entry["uuid"]), {})
        if (index, number) not in cells:
            at = number * self._world.options.cell
            cells[index, number] = Cell([int.from_bytes(image[at : at + ID_BYTES], "little")])
        return cells[index, number]

    def _flushed(self, host: Host, entry: Entry, index: int) -> None:
        for (volume, _), cell in self._cells[host.name, host.replaced, entry["uuid"]].items():
            if volume == index:
                cell.flushed(host.life.number)

    def wanted(
        self, host: Host, entry: Entry, images: Sequence[bytes], found: Sequence[bytes], since: int
    ) -> list[bytes]:
        """What a snapshot has to be: ``images``, but for what was written into it, which may be
        any of what ``found`` may have there. ``since``: the count when that began to be read."""
        cells = self._cells.get((host.name, host.replaced, entry["uuid"]))
        if not cells:
            return list(images)
        result = [bytearray(image) for image in images]
        size = self._world.options.cell
        for (index, number), cell in cells.items():
            volume, at = entry["volumes"].index(index), number * size
            value = int.from_bytes(found[volume][at : at + ID_BYTES], "little")
            allowed = cell.values[cell.floor if since == self.count else 0 :]
            if value not in allowed:
                value = allowed[-1]
            result[volume][at : at + size] = pattern(value, size)
        return [bytes(one) for one in result]

    # -- restores ----------------------------------------------------------------------------

    async def take(self, host: Host, node: Node, entry: Entry, images: Sequence[bytes]) -> None:
        """What is in it now is what a restore on the primary brings back."""
        found = []
        for index in entry["volumes"]:
            chain = node.snapshots.chains[index]
            found.append(bytes(await chain.read(entry["uuid"], 0, chain.volume.size)))
        wanted = self.wanted(host, entry, images, found, self.count)
        if found != wanted:
            raise Violation(f"snapshot {entry['number']} does not hold what was written (V9)")
        self._taken[entry["uuid"]] = dict(zip(entry["volumes"], found, strict=True))

    def restored(self, host: Host, entry: Entry, places: Sequence[int]) -> None:
        """Whoever asked for the restore was told that it is complete: it is durable (V12)."""
        cells = self._cells.get((host.name, host.replaced, entry["uuid"]), {})
        for (index, number), cell in cells.items():
            if index in places:
                at = number * self._world.options.cell
                data = self._taken[entry["uuid"]][index][at : at + ID_BYTES]
                cell.values, cell.floor, cell.last = [int.from_bytes(data, "little")], 0, 0

    def shown(self, uuid: str, images: dict[int, bytes]) -> dict[int, bytes]:
        """What a restore of it on the primary brings back, by volume."""
        return self._taken.get(uuid, images)
