"""Plays of what a primary knows of its remotes: their maps, where their streams begin, who serves
them (O12, T7, M17)."""

from __future__ import annotations

import asyncio

from nbdmirror.errors import VolumeFailed
from tests.sim.directed import directed
from tests.sim.faults import Fault, Kind, Miswrites
from tests.sim.oracle import Violation
from tests.sim.plays.stage import (
    FAR,
    LARGE,
    NEVER_SECONDS,
    READ_BACK,
    SLOW_SECONDS,
    all_is_there,
    either,
    killed,
    only_remote,
    power_loss,
    slow,
    slow_at,
    strikes,
    without_facet,
)
from tests.sim.script import BLOCK, OPTIONS, Script

RUNS = 4
"""That a primary remembers, and forks that a HELLO may tell of."""


async def _filled_twice(s: Script) -> None:
    """Two fill a map at the same time, and the one who began is cancelled: the other's word holds,
    and changes are marked."""
    remote = await only_remote(s)
    syncing = slow(s.world.a, "sync", "/state/dcm", 1.0)

    async def fill() -> None:
        first = asyncio.ensure_future(remote.fill("one"))
        await syncing.wait()
        remote.drop.set()
        second = asyncio.ensure_future(remote.fill("two"))
        await asyncio.sleep(0)
        first.cancel()
        await second
        if remote.tracking and remote not in remote.group.trackers:
            raise Violation("what is written is not marked for a remote in its map (O12)")

    s.link(up=False)
    await s.world.in_life(s.world.a, fill())
    await s.write(0, 0)
    s.link(up=True)
    await s.in_sync()


async def _rotten_in_a_resync(s: Script) -> None:
    """A record that a remote needs is not in the log while a resync is under way in order: as its
    map is filled, nothing of it is cleared that the records behind would be needed for."""
    world, a = s.world, s.world.a
    (b,) = world.remotes
    world.astray_on = a
    remote = await only_remote(s)
    s.link(up=False)
    while not remote.tracking:
        await s.write(1, 0, count=BLOCK, pause=0.02)
    await s.until(lambda node: remote.marked_seq is None and node.log.ring.used == 0)
    placing = slow_at(s, b, "snapshot", "sync", "/facets")
    s.link(up=True)
    await placing.wait()
    assert not remote.tracking and remote.dirty_regions
    filling, longer = asyncio.Event(), Fault(Kind.STALL, seconds=4 * SLOW_SECONDS)
    a.disk.faults = either(
        Miswrites("/state/log", Fault(Kind.DROP)), strikes("sync", "/state/dcm", longer, filling)
    )
    await s.write(0, 0)
    await filling.wait()
    await asyncio.sleep(2 * SLOW_SECONDS)
    await s.write(0, FAR)
    await asyncio.sleep(3 * SLOW_SECONDS)
    await s.in_sync()
    world.astray_on = None


async def _ahead(s: Script) -> None:
    """The remote has more than the primary, which loses power, and writes before the two meet."""
    a = s.world.a
    await s.write(0, 0, fua=True)
    await s.in_sync()
    slow(a, "sync", "/state/log", NEVER_SECONDS)
    await s.write(0, 0)
    await s.until(all_is_there)
    s.link(up=False)
    await power_loss(s, a)
    await s.write(0, FAR)
    s.link(up=True)
    await s.in_sync()


async def _added_while_moved(s: Script) -> None:
    """A remote is added while the log is moved: one session serves it, not two."""
    _, c = s.world.remotes
    await s.remote("remove", c)
    adding = slow(s.world.a, "sync", "/state/dcm/c")
    s.world.spawn(s.remote("add", c))
    await adding.wait()
    await s.replace_log("/state/moved")
    await asyncio.sleep(SLOW_SECONDS)
    await s.in_sync()
    connected: list[str] = []
    s.world.on_moment.append(lambda host, kind: connected.append(kind))
    await asyncio.sleep(5.0)
    if "connected" in connected:
        raise Violation("two sessions take turns at a remote")


async def _removed_while_filled(s: Script) -> None:
    """A remote is removed while its maps are filled, for all of it is to be compared: what is
    written then is not marked in maps that are closed."""
    a = s.world.a
    (b,) = s.world.remotes
    remote = await only_remote(s)
    filling = slow(a, "sync", "/state/dcm/b")
    resync = s.world.spawn(s.full_resync())
    await filling.wait()
    a.disk.faults = None
    await s.remote("remove", b)
    await resync
    if remote in remote.group.trackers:
        raise Violation("changes are marked for a remote that was removed (M17)")
    await s.write(0, 0)
    await s.remote("add", b)
    await s.in_sync()


async def _paused_both(s: Script) -> None:
    """A volume has no facet, and two remotes follow it. One is paused, and somebody asks for the
    other too: then nobody would answer."""
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    await without_facet(s)
    node = await s.primary()
    assert node.primary is not None
    for remote in node.primary.remotes:
        await s._command(node.pause(remote.name))
    before = s.succeeded
    await s.read(0, 0, 1)
    if s.succeeded == before:
        raise Violation("a volume is read from remotes, and all of them are paused (M11)")
    await s.pause(on=False)


async def _paused_and_lost(s: Script) -> None:
    """A remote is paused as a volume's only facet is lost: it does not stand in, over a restart
    either, until it is resumed. Somebody may restore what he likes there meanwhile (V14). Another
    volume, and a snapshot of this one, come to no harm."""
    path = "/facets/v0.0"
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.in_sync()
    await s.pause(on=True)
    before = s.succeeded
    s.spoil(path)
    await s.write(0, FAR)
    await killed(s, s.world.a)
    await s.write(0, 0)
    await s.read(0, 0, 1)
    if s.succeeded != before:
        raise Violation("a paused remote was gone on with (M11)")
    await s.write(1, 0)
    await s.flush()
    if s.succeeded != before + 2:
        raise Violation("a volume that is well cannot be flushed, for another has nobody (I8)")
    await s.pause(on=False)
    await s.until(lambda node: node.primary is not None and bool(node.primary.remotes[0].reads))
    await s.write(0, 0)
    await s.read(0, 0, 1)
    if s.succeeded != before + 4:
        raise Violation("a volume is not gone on with, though its remote was resumed (M11)")
    s.mend(path)
    await s.facet("online", path)
    await s.facets_back()
    await s.in_sync()
    node = await s.primary()
    try:
        await s.world.in_life(
            s.world.a, node.snapshots.chains[0].read(uuid, 0, s.world.options.cell)
        )
    except VolumeFailed as error:
        raise Violation(f"a write that was refused cost a snapshot: {error.message} (V9)") from None


async def _often_without_power(s: Script) -> None:
    """The primary loses power more often than forks can be told of: a remote that was there is
    served all the same. One that missed too many of its runs is compared, for nothing tells any
    more which records of its last run count."""
    a = s.world.a
    for _ in range(RUNS + 2):
        await s.write(0, 0)
        await power_loss(s, a)
        await s.in_sync()
        if (await only_remote(s)).state != "synchronised":
            raise Violation("a primary that lost power often is not followed any more")
    slow(a, "sync", "/state/log", NEVER_SECONDS)
    await s.write(0, 0)
    await s.until(all_is_there)
    s.link(up=False)
    for turn in range(RUNS + 2):
        await power_loss(s, a)
        await s.write(0, FAR + turn)
    s.world.astray_on = a  # it is no defect that all is compared
    s.link(up=True)
    await s.in_sync()
    s.world.astray_on = None


async def _tried_first(s: Script) -> None:
    """A synchronous remote without which writes fail is well again as it is resumed, and as the
    primary is started: no write fails before it was tried."""
    a = s.world.a
    remote = await only_remote(s)
    await s.in_sync()
    s.link(up=False)
    await s.until(lambda _: remote.link != "connected")
    await s.pause(on=True)
    s.link(up=True)
    before = s.succeeded
    await s.pause(on=False)
    await s.write(0, 0)
    await s.in_sync()
    await s.stop(a)
    await s.world.start(a)
    await s.write(0, 0)
    if s.succeeded != before + 2:
        raise Violation("writes fail for want of a remote that nobody has tried yet (M17, X7)")
    await s.in_sync()


FILLED_TWICE = directed(_filled_twice)
ROTTEN_IN_A_RESYNC = directed(_rotten_in_a_resync, constants=READ_BACK, **LARGE)
AHEAD = directed(_ahead)
ADDED_WHILE_MOVED = directed(_added_while_moved, remotes=2)
PAUSED_AND_LOST = directed(_paused_and_lost, facets=1, last_facet=True)
PAUSED_BOTH = directed(_paused_both, facets=1, last_facet=True, remotes=2)
REMOVED_WHILE_FILLED = directed(_removed_while_filled)
TRIED_FIRST = directed(_tried_first, mode="sync", on_link_loss="fail")
OFTEN_WITHOUT_POWER = directed(
    _often_without_power,
    constants={
        **OPTIONS.constants,
        "engine.recovery.RUNS_MAX": RUNS,
        "codec.fields.ENTRIES_MAX": RUNS,
    },
)
