"""Clients: what an NBD connection would ask of the primary, one request at a time each.

They call the group and the volumes as the export does, in the node's own life, and tell the
oracle what they asked and what they were told.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from typing import Any

from nbdmirror.codec import batch as codec_batch
from nbdmirror.codec import nbd
from nbdmirror.codec import record as codec
from nbdmirror.engine.batch import Batch, Changes, Received
from nbdmirror.engine.node import Node
from nbdmirror.engine.volume import Change
from nbdmirror.errors import DiskFailed, VolumeFailed
from tests.sim.oracle import Write, pattern
from tests.sim.world import Gone, World, clearing


class Clients:
    """All clients of a run; they share a number of operations."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._left = world.options.operations

    async def run(self) -> None:
        """Returns when all operations were issued and answered."""
        tasks = [
            self._world.spawn(self._client(random.Random(f"{self._world.seed}:client:{number}")))
            for number in range(self._world.options.clients)
        ]
        await asyncio.wait(tasks)

    async def _client(self, rng: random.Random) -> None:
        world = self._world
        options = world.options
        while self._left > 0 and world.violation is None:
            self._left -= 1
            if options.pause:
                await asyncio.sleep(options.pause * rng.random() ** 3 * 3)
            while world.a.node is None:
                await world.serving.wait()
            world.requests += 1
            try:
                await self._operation(rng, world.a.node)
            finally:
                world.requests -= 1

    async def _operation(self, rng: random.Random, node: Node) -> None:
        options = self._world.options
        draw = rng.random()
        if draw < options.flush:
            await self._flush(node)
        elif draw < options.flush + 0.1:
            await self._read(rng, node)
        elif draw < options.flush + 0.1 + options.clear:
            await self._clear(rng, node)
        else:
            await self._write(rng, node)

    def _range(self, rng: random.Random, volume: int, cells_max: int) -> tuple[int, int]:
        """(offset, length) of whole cells."""
        options = self._world.options
        cells = options.sizes[volume] // options.cell
        count = rng.randint(1, min(cells_max, cells))
        first = rng.randrange(min(cells, options.hot_cells))
        if rng.random() < 0.1:
            first = rng.randrange(cells)
        first = min(first, cells - count)
        return first * options.cell, count * options.cell

    async def _attempt(self, work: Coroutine[Any, Any, Any]) -> bool:
        world = self._world
        try:
            await world.in_life(world.a, work)
        except Gone:
            return False
        except VolumeFailed as error:
            world.trace("client", f"error: {error}")
            world.fired["client error"] += 1
            return False
        except DiskFailed as error:  # the answer is EIO (``export``), and the node ends
            node = world.a.node
            if node is not None and node.failed is not None and not node.failed.done():
                raise
            world.trace("client", f"error: {error}")
            return False
        return True

    async def _write(self, rng: random.Random, node: Node) -> None:
        world = self._world
        content = world.content
        assert node.primary is not None
        group = node.primary.group
        volume = rng.randrange(len(node.volumes))
        changes: list[Change] = []
        writes: list[Write] = []
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            offset, length = self._range(rng, volume, world.options.write_cells)
            value = content.value()
            writes.append(content.begin(volume, offset, length, value))
            payload = memoryview(pattern(value, length))
            changes.append(Change(codec.WRITE, 0, offset, length, payload))
        durable = len(writes) == 1 and rng.random() < world.options.fua
        what = [(w.value, c.offset, c.length) for w, c in zip(writes, changes, strict=True)]
        world.trace("client", f"write {volume} {what}{' FUA' if durable else ''}")

        async def work() -> None:
            batch = Changes(changes) if durable else as_received(changes)
            rest = group.write_batch(node.volumes[volume], batch, durable=durable)
            if rest is not None:
                await rest

        acked = await self._attempt(work())
        for write in writes:
            content.end(write, acked=acked, durable=durable)
        world.trace("client", f"wrote {[w.value for w in writes]} {acked}")

    async def _clear(self, rng: random.Random, node: Node) -> None:
        world = self._world
        assert node.primary is not None
        group = node.primary.group
        volume = rng.randrange(len(node.volumes))
        offset, length = self._range(rng, volume, 4 * world.options.write_cells)
        write = world.content.begin(volume, offset, length, 0)
        name = rng.choice(["trim", "zero", "zero keeping space"])
        kind, flags = clearing(name)
        durable = rng.random() < world.options.fua
        world.trace("client", f"{name} {volume} {offset} {length}{' FUA' if durable else ''}")
        change = Change(kind, flags, offset, length, None)
        acked = await self._attempt(group.clear(node.volumes[volume], change, durable=durable))
        world.content.end(write, acked=acked, durable=durable)
        world.trace("client", f"cleared {acked}")

    async def _flush(self, node: Node) -> None:
        world = self._world
        assert node.primary is not None
        issued = world.content.flush_issued()
        world.trace("client", f"flush {issued}")
        if await self._attempt(node.primary.group.flush()):
            world.content.flushed(issued)
            world.trace("client", f"flushed {issued}")
            world.on_flushed()

    async def _read(self, rng: random.Random, node: Node) -> None:
        world = self._world
        volume = rng.randrange(len(node.volumes))
        offset, length = self._range(rng, volume, 4 * world.options.write_cells)
        found: list[bytes] = []

        async def work() -> None:
            data = node.volumes[volume].try_read(offset, length)
            if data is None:
                data = await node.volumes[volume].read(offset, length)
            found.append(bytes(data))

        with world.content.reading() as since:
            if await self._attempt(work()):
                world.content.check(
                    volume, offset, found[0], since=since, crashed=False, what="a client's read"
                )


def as_received(changes: Sequence[Change]) -> Batch:
    """Writes as a client's requests bring them, where they are plain ones."""
    data = b"".join(
        nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.WRITE, cookie, change.offset, change.length)
        + bytes(change.payload or b"")
        for cookie, change in enumerate(changes)
    )
    limits = codec_batch.LENGTH_MAX, 1 << 40
    stop, places, replies, longest = codec_batch.take_writes(data, 0, len(data), *limits)
    if stop < len(data):  # too long
        return Changes(changes)
    writes = codec_batch.Writes(memoryview(data), places, replies, len(data), longest)
    return Received(writes)
