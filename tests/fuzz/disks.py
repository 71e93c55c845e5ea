"""A node's whole state, rotten: whatever its disk gives back, it starts, or says why it does not.

Four disks are made once by the engine itself, of a primary and of a secondary, stopped cleanly and
cut down: with records in the log, marks in the maps, regions in the layers of snapshots. A run
damages a copy as its input says, and starts a node on it (I9, X6).
"""

from __future__ import annotations

import asyncio
import functools
import random
import struct
from collections.abc import Iterator

from nbdmirror.codec import record, repl
from nbdmirror.codec.repl import Type
from nbdmirror.engine.create import create
from nbdmirror.engine.node import Node
from nbdmirror.engine.volume import Change
from nbdmirror.errors import NbdmirrorError
from nbdmirror.ports import Env
from tests.fuzz import nodes
from tests.sim.clock import SimClock
from tests.sim.disk import SimDisk
from tests.sim.inode import Inode
from tests.sim.loop import SimLoop

SECTOR = 512
_DAMAGE = struct.Struct("<BBHHB")
CLEAN, CRASHED = 0, 1
SEEDS = (
    b"\0" + _DAMAGE.pack(0, 0, 0, 9, 1) + _DAMAGE.pack(1, 0, 1, 70, 255),
    b"\1" + _DAMAGE.pack(2, 1, 0, 0, 0),
    b"\2" + _DAMAGE.pack(3, 2, 0, 100, 0),
    b"\3" + _DAMAGE.pack(4, 3, 0, 5, 0) + _DAMAGE.pack(5, 0, 3, 0, 7),
)


def start(data: bytes) -> None:
    """The first byte chooses the disk; each 7 bytes behind it damage a place of a file."""
    which = data[0] % 4 if data else 0
    role = ("primary", "secondary")[which % 2]
    disk = _image(role, which // 2).clone("copy")
    for at in range(1, len(data) - _DAMAGE.size + 1, _DAMAGE.size):
        _damage(disk, *_DAMAGE.unpack_from(data, at))
    loop = SimLoop()
    try:
        loop.run_until_complete(_start(loop, disk, role))
        assert loop.errors == [], loop.errors
    finally:
        loop.close()


async def _start(loop: SimLoop, disk: SimDisk, role: str) -> None:
    node = _node(loop, disk, role)
    try:
        await node.start()
    except NbdmirrorError as error:
        assert error.message
        return
    node.status()
    for export in node.exports.exports() if node.exports else []:
        volume = node.exports.volume(export.name) if node.exports else None
        if volume is not None:
            try:
                assert len(await volume.read(0, export.size)) == export.size
            except NbdmirrorError as error:
                assert error.message
    await asyncio.sleep(1.0)
    await node.stop()


def _damage(disk: SimDisk, which: int, how: int, sector: int, at: int, value: int) -> None:
    """Flips a byte, zeroes a sector, copies one over another, or cuts the file there."""
    files = sorted(disk._names)
    if not files:
        return
    inode = disk._names[files[which % len(files)]]
    used = list(_used(inode))
    if not used:
        return
    place = used[sector % len(used)]
    for image in (inode.cache, inode.durable):
        if how % 4 == 0:
            byte = place + at % SECTOR
            image.write(byte, bytes([image.read(byte, 1)[0] ^ (value or 1)]))
        elif how % 4 == 1:
            image.write(place, bytes(SECTOR))
        elif how % 4 == 2:
            image.write(place, image.read(used[at % len(used)], SECTOR))
        else:
            image.resize(place + at % SECTOR)


def _used(inode: Inode) -> Iterator[int]:
    """Sectors that hold anything."""
    content = inode.cache.read(0, inode.cache.size)
    for place in range(0, len(content) - SECTOR + 1, SECTOR):
        if content.count(0, place, place + SECTOR) < SECTOR:
            yield place


@functools.cache
def _image(role: str, end: int) -> SimDisk:
    loop = SimLoop()
    try:
        image: SimDisk = loop.run_until_complete(_make(loop, role, end))
        return image
    finally:
        loop.close()


def _node(loop: SimLoop, disk: SimDisk, role: str) -> Node:
    env = Env(disk, nodes.Doorkeeper(), SimClock(loop, disk), random.Random(1))
    return Node(env, nodes.config_of(role))


async def _make(loop: SimLoop, role: str, end: int) -> SimDisk:
    disk = SimDisk("n", 0)
    env = Env(disk, nodes.Doorkeeper(), SimClock(loop, disk), random.Random(0))
    await create(env, nodes.config_of(role), role, force=False)
    node = _node(loop, disk, role)
    await node.start()
    if role == "primary":
        for number in range(3):
            await _write(node, number)
            await node.people.create(None, False)
        await _write(node, 3)
    else:
        await _replicate(node)
    crashed = disk.clone("crashed")
    await node.stop()
    return crashed if end == CRASHED else disk


async def _write(node: Node, number: int) -> None:
    assert node.primary is not None
    group = node.primary.group
    payload = bytes([1 + number]) * 4096
    changes = [Change(record.WRITE, 0, at, 4096, payload) for at in (0, 70_000 * number)]
    waits = group.write(group.volumes[0], changes, durable=True)
    if waits is not None:
        await waits


async def _replicate(node: Node) -> None:
    """What a primary sends: a start, a write and the marker of a snapshot; then it is gone."""
    network = node.env.network
    assert isinstance(network, nodes.Doorkeeper)
    protocol = network.factories["unix:/peer"]()
    protocol.connection_made(nodes.Recorder())
    for piece in (
        nodes.json_frame(Type.HELLO, nodes.SESSION, nodes.HELLO),
        nodes.json_frame(Type.START, nodes.SESSION, {**nodes.START, "resync": False}),
        b"".join(map(bytes, repl.encode(Type.RECORDS, nodes.SESSION, [nodes.RECORDS]))),
    ):
        room = memoryview(protocol.get_buffer(-1))
        room[: len(piece)] = piece
        protocol.buffer_updated(len(piece))
        await asyncio.sleep(1.0)
    protocol.connection_lost(None)
    await asyncio.sleep(1.0)
    assert node.log.next_seq == 3, "the secondary did not take what it was sent"
