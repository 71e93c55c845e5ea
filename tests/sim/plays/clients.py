"""Plays of clients that leave, or lose their connection, in the middle of a request: the request is
cancelled (``engine.export``), and what the node had begun for all goes to its end (I8, I2)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from nbdmirror.codec import record as codec
from nbdmirror.engine.batch import Changes
from nbdmirror.engine.rescue import READ_ERRORS_MAX
from nbdmirror.engine.snapshotexport import SnapshotExports
from nbdmirror.engine.volume import Change
from tests.sim.directed import directed
from tests.sim.faults import Fault, Kind
from tests.sim.oracle import Violation, pattern
from tests.sim.plays.log import HOT
from tests.sim.plays.stage import (
    FAR,
    SLOW,
    SLOW_SECONDS,
    either,
    moment,
    only_remote,
    slow_at,
    strikes,
    within,
    without_log,
)
from tests.sim.script import BLOCK, SYNC_SECONDS, Script

PATIENCE_SECONDS = 600.0


def _asks(s: Script, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A request of a client, in a task of the primary's that can be cancelled."""
    return s.world.loop.spawn(s.world.a.life, work)


async def _left_while_forced(s: Script) -> None:
    """The log is in memory, and a write to a new extent has a remote that is away forced out of it
    first. The client leaves meanwhile: the log is given back, and the remote comes back."""
    world, a, cell = s.world, s.world.a, s.world.options.cell
    await without_log(s)
    s.link(up=False)
    for extent in (*range(HOT - 1), FAR // 2):
        await s.write(0, 2 * extent)
    node, remote = await s.primary(), await only_remote(s)
    assert node.primary is not None
    saving = slow_at(s, a, "overflow", "sync", "/state/superblock")
    value = world.content.value()
    write = world.content.begin(0, (FAR - 10) * cell, cell, value)
    change = Change(codec.WRITE, 0, (FAR - 10) * cell, cell, memoryview(pattern(value, cell)))
    written = node.primary.group.write_batch(node.volumes[0], Changes([change]))
    assert written is not None
    request = _asks(s, written)
    await saving.wait()
    request.cancel()
    await asyncio.sleep(2 * SLOW_SECONDS)
    world.content.end(write, acked=False)
    s.link(up=True)
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            for turn in range(40):
                await s.write(0, turn % 4 * BLOCK, count=BLOCK, pause=0.02)
    except TimeoutError:
        raise Violation("writes wait for ever for space in the log (I8)") from None
    await s.in_sync()
    if remote.state != "synchronised":
        raise Violation("a remote that was forced out of the log never comes back (I2)")


async def _left_while_facet_fails(s: Script) -> None:
    """Reads fail on one of two facets until it leaves service; the client of the last one leaves
    while that is saved. The disk is good again: the facet comes back by itself."""
    a, size = s.world.a, s.world.options.cell
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    node = await s.primary()
    volume = node.volumes[0]
    facet = volume.facets[0]
    saving = asyncio.Event()

    def bad(operation: str, path: str, nth: int) -> Fault | None:
        reads = operation in ("read", "pread", "try_pread")
        return Fault(Kind.ERROR) if reads and path == facet.path else None

    failed = strikes(
        "sync", "/state/superblock", SLOW, saving, when=lambda: facet.failed is not None
    )
    a.disk.faults = either(failed, bad)
    while not saving.is_set():
        facet.next_offset = 0  # it is the one that is chosen
        request = _asks(s, volume.read(0, size))
        while not (request.done() or saving.is_set()):
            await asyncio.sleep(0.001)
        if facet.read_errors > READ_ERRORS_MAX:
            break
    request.cancel()
    await asyncio.sleep(2 * SLOW_SECONDS)
    a.disk.faults = None
    await s.write(0, 0)
    await asyncio.sleep(PATIENCE_SECONDS)
    if not facet.in_service:
        raise Violation("a facet does not come back by itself (I2)")


async def _left_while_given_up(s: Script) -> None:
    """What a client wrote into a snapshot cannot be synced, so the snapshot is given up; the client
    leaves while that is saved: it is given up all the same, and told."""
    a, size = s.world.a, s.world.options.cell
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    s.world.album.release(uuid)
    node = await s.primary()
    entry = node.snapshots.entry(uuid)
    assert entry is not None
    await s.world.in_life(a, node.people.export(uuid, True))
    writer = SnapshotExports(node.snapshots).serve(entry, 0)
    change = Change(codec.WRITE, 0, 0, size, memoryview(bytes(size)))
    first = writer.write(node.volumes[0], [change])
    assert first is not None
    await s.world.in_life(a, first)
    member = next(one for one in node.snapshots.chains[0].members if one.uuid == uuid)
    assert member.own is not None
    failed, saving = asyncio.Event(), asyncio.Event()
    a.disk.faults = either(
        strikes("sync", node.snapshots.files.path(uuid, 0, own=True), Fault(Kind.LOSE), failed),
        strikes("sync", "/state/superblock", SLOW, saving, when=failed.is_set),
    )
    told = moment(s, a, "snapshot-lost")
    second = writer.write(node.volumes[0], [change], durable=True)
    assert second is not None
    request = _asks(s, second)
    await saving.wait()
    request.cancel()
    await within(told, PATIENCE_SECONDS)
    if not told.is_set():
        raise Violation("a snapshot is given up by half, and goes on to take space (V9)")


LEFT_WHILE_FORCED = directed(_left_while_forced)
LEFT_WHILE_FACET_FAILS = directed(_left_while_facet_fails, facets=2)
LEFT_WHILE_GIVEN_UP = directed(_left_while_given_up)
