"""Plays of restores, and of what happens before their copy is through (V11, V12)."""

from __future__ import annotations

import asyncio

from tests.sim.directed import directed
from tests.sim.faults import Fault, Kind
from tests.sim.oracle import Violation
from tests.sim.plays.stage import (
    SLOW_SECONDS,
    all_is_there,
    follower,
    killed,
    moment,
    power_loss,
    slow,
    slow_at,
    strikes,
    within,
    without_facet,
    without_log,
)
from tests.sim.script import BLOCK, Script


async def _restored(s: Script) -> None:
    """The process dies when a restore is complete, and not copied yet."""
    await s.write(0, 0, 30, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, 0, 30, count=BLOCK)
    await s.restore(uuid)
    await killed(s, s.world.a)
    await s.write(0, 0)


async def _restored_without_log(s: Script) -> None:
    """... and the log was in memory: the mark of the restore is gone with it."""
    await without_log(s)
    await _restored(s)


async def _restored_and_written(s: Script) -> None:
    """A region that is restored is written to, and that flushed, as the map of what is left to copy
    is being made durable; then power fails."""
    a = s.world.a
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, 0, count=BLOCK)
    await s.restore(uuid)
    await slow(a, "sync", "/state/restore").wait()
    s.world.spawn(s.write(0, 0))
    await asyncio.sleep(SLOW_SECONDS / 3)
    await s.flush()
    await power_loss(s, a)
    await s.in_sync()
    await s.read(0, 0, 1)


async def _restored_and_removed(s: Script) -> None:
    """Of two remotes one is removed while a restore is marked in their maps: it is in the other's
    all the same."""
    b, _ = s.world.remotes
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    merging = slow_at(s, s.world.a, "overflow", "sync", "/state/dcm/b", nth=2)
    s.world.spawn(s.restore(uuid))
    await merging.wait()
    await s.remote("remove", b)
    await asyncio.sleep(SLOW_SECONDS)
    await s.remote("add", b)
    await s.in_sync()


async def _restored_and_back(s: Script) -> None:
    """A person takes out a facet as the regions of a restore are placed, and has it back as the
    other one is synced."""
    a, away = s.world.a, "/facets/v0.1"
    everywhere = range(0, 4 * BLOCK, BLOCK)
    await s.write(0, *everywhere, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, *everywhere, count=BLOCK)
    await s.in_sync()
    placing = (await s.primary()).volumes[0].beside.locked
    reading = slow(a, "read", "/state/snapshots", when=placing)
    a.disk.timing.miss = 1.0  # nothing of what is read is in memory
    await s.restore(uuid)
    await within(reading, SLOW_SECONDS)
    await s.facet("offline", away)
    a.disk.timing.miss = 0.0
    syncing = slow(a, "sync", "/facets/v0.0", when=lambda: not placing())
    await within(syncing, 2 * SLOW_SECONDS)
    await s.facet("online", away)
    await s.facets_back()
    await s.in_sync()


async def _not_restored(s: Script) -> None:
    """A restore on a secondary whose link is inactive cannot begin, for want of a snapshot of the
    state before, or of the map of what is to be copied: it is as consistent as it was, and goes on
    where it was."""
    (b,) = s.world.remotes
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    await s.pause(on=True)
    await asyncio.sleep(1.0)
    assert b.node is not None
    for operation, path in (("create", "/state/snapshots"), ("sync", "/state/restore")):
        failed = asyncio.Event()
        b.disk.faults = strikes(operation, path, Fault(Kind.ERROR), failed)
        await s._command(b.node.people.restore(uuid, None, False, True, False), b)
        assert failed.is_set() and b.node.store.state.get("restore") is None
        if not b.node.store.state["upstream"]["consistent"]:
            raise Violation("a restore that could not begin was not without consequence (X2)")
    await s.write(0, 0)
    await s.pause(on=False)
    await s.in_sync()


async def _not_restored_delayed(s: Script) -> None:
    """A delayed secondary whose link is inactive is to be restored, which would fail: what the
    delay holds back stays so, unless that is forced."""
    (b,) = s.world.remotes
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.in_sync()
    await s.world.in_life(b, follower(b).applier.change(delay=600.0))
    await s.write(0, 0, BLOCK, count=BLOCK)
    await s.until(all_is_there)
    await s.pause(on=True)
    await asyncio.sleep(1.0)
    assert b.node is not None
    failed = asyncio.Event()
    b.disk.faults = strikes("sync", "/state/restore", Fault(Kind.ERROR), failed)
    await s._command(b.node.people.restore(uuid, None, False, True, False), b)
    if not follower(b).applier.delayed:
        raise Violation("a restore cost a secondary the point at which a delay keeps it (V8)")
    assert not failed.is_set()
    b.disk.faults = None
    restored, b.restored = moment(s, b, "restored"), True
    await s._command(b.node.people.restore(uuid, None, False, True, True), b)
    assert restored.is_set() and not follower(b).applier.delayed
    await s.pause(on=False)
    await s.in_sync()


async def _not_restored_leaning(s: Script) -> None:
    """A volume has no facet, and two remotes follow it; another one is to be restored, for which
    both would have to leave the log. That is refused, and both go on, without a new snapshot."""
    await s.write(0, 0, count=BLOCK)
    await s.write(1, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(1, 0)
    await without_facet(s)
    await s.in_sync()
    node = await s.primary()
    assert node.primary is not None
    there = len(node.store.state["snapshots"])
    await s._command(node.people.restore(uuid, "v1", True, True, False))
    if any(remote.tracking for remote in node.primary.remotes):
        raise Violation("a restore that was refused took a remote out of the log (V14, M11)")
    if len(node.store.state["snapshots"]) != there:
        raise Violation("a restore that was refused left a snapshot behind (V14)")


async def _nothing_left(s: Script) -> None:
    """A restore cannot begin, first on the primary and then on a secondary whose link is inactive,
    for want of the map of what is to be copied: the snapshot of the state before, for which nobody
    asked, is there no more, on either node."""
    a, (b,) = s.world.a, s.world.remotes
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    for host in (a, b):
        if host is b:
            await s.pause(on=True)
            await asyncio.sleep(1.0)
        node = host.node
        assert node is not None
        failed, taken = asyncio.Event(), moment(s, host, "snapshot")
        host.disk.faults = strikes("sync", "/state/restore", Fault(Kind.ERROR), failed)
        await s._command(node.people.restore(uuid, None, True, True, False), host)
        assert failed.is_set() and taken.is_set() and node.store.state.get("restore") is None
        host.disk.faults = None
        if host is a:
            await s.in_sync()
        await asyncio.sleep(1.0)
        for other in (a, b):
            assert other.node is not None
            if [entry["uuid"] for entry in other.node.snapshots.usable()] != [uuid]:
                raise Violation(f"a restore that could not begin left a snapshot at {other.name}")
    await s.pause(on=False)
    await s.in_sync()


async def _never_begun(s: Script) -> None:
    """The node stops, or its process dies, when a restore has taken the snapshot of the state
    before, and has yet to begin: after the start that one is there no more, on either node."""
    a, (b,) = s.world.a, s.world.remotes
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, 0, count=BLOCK)
    for end in (s.stop, s.kill):
        await s.in_sync()
        node, taken = await s.primary(), moment(s, b, "snapshot")
        preparing = slow(a, "sync", "/state/restore", 2 * SLOW_SECONDS)
        s.world.spawn(s._command(node.people.restore(uuid, None, True, True, False)))
        await preparing.wait()
        await taken.wait()
        ended = end(a)
        if ended is not None:
            await ended
        await s.world.start(a)
        await s.in_sync()
        await asyncio.sleep(1.0)
        for host in (a, b):
            assert host.node is not None and host.node.store.state.get("restore") is None
            if [entry["uuid"] for entry in host.node.snapshots.usable()] != [uuid]:
                raise Violation(f"a restore that never began left a snapshot at {host.name} (V14)")


async def _forgotten_and_cut(s: Script) -> None:
    """A restore cannot begin, and power fails as the snapshot of the state before is deleted on the
    primary: the secondary has been told by then."""
    a, (b,) = s.world.a, s.world.remotes
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    node, deleted = await s.primary(), moment(s, a, "snapshot-deleted")
    a.disk.faults = strikes("sync", "/state/restore", Fault(Kind.ERROR), asyncio.Event())
    await s._command(node.people.restore(uuid, None, True, True, False))
    await deleted.wait()
    await power_loss(s, a)
    await s.in_sync()
    await asyncio.sleep(1.0)
    assert b.node is not None
    if [entry["uuid"] for entry in b.node.snapshots.usable()] != [uuid]:
        raise Violation("a restore that could not begin left a snapshot at the secondary (V14)")


RESTORED = directed(_restored)
NOT_RESTORED = directed(_not_restored)
NOTHING_LEFT = directed(_nothing_left)
NEVER_BEGUN = directed(_never_begun)
FORGOTTEN_AND_CUT = directed(_forgotten_and_cut)
NOT_RESTORED_DELAYED = directed(_not_restored_delayed)
NOT_RESTORED_LEANING = directed(_not_restored_leaning, facets=1, last_facet=True, remotes=2)
RESTORED_WITHOUT_LOG = directed(_restored_without_log)
RESTORED_AND_WRITTEN = directed(_restored_and_written)
RESTORED_AND_REMOVED = directed(_restored_and_removed, remotes=2)
RESTORED_AND_BACK = directed(_restored_and_back, facets=2)
