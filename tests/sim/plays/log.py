"""Plays of the log and its disk: it is lost, moved, rotten, or has not what it said (M13, O16, X6),
and what leaves it for a remote's map meanwhile (O12)."""

from __future__ import annotations

import asyncio
import contextvars

from nbdmirror.codec.mappage import SLOTS
from nbdmirror.engine.housekeeper import HIGH_WATER
from nbdmirror.engine.log import PAGE, RING_AT
from tests.sim.directed import directed
from tests.sim.faults import AllKept, Fault, Kind, Miswrites
from tests.sim.host import Host
from tests.sim.oracle import Violation, compare
from tests.sim.plays.stage import (
    FAR,
    LARGE,
    READ_BACK,
    SLOW,
    SLOW_SECONDS,
    either,
    follower,
    killed,
    loses,
    moment,
    power_loss,
    slow,
    slow_at,
    strikes,
    within,
    without_facet,
    without_log,
)
from tests.sim.script import BLOCK, POLL_S, Script

HOT = SLOTS
"""Extents that can be active."""


async def _moved_and_lost(s: Script) -> None:
    """The disk of the log fails while a person moves the log: it stays where that one has put it,
    and what is flushed there is durable."""
    a = s.world.a
    making = slow(a, "allocate", "/state/moved")
    saving = slow_at(s, a, "log-lost", "sync", "/state/superblock")
    moved = moment(s, a, "log-moved")
    s.world.spawn(s.replace_log("/state/moved"))
    await making.wait()
    s.spoil("/state/log")
    s.world.spawn(s.write(0, 0))
    await moved.wait()
    await within(saving, 1.0)
    await s.write(0, 0)
    await asyncio.sleep(2 * SLOW_SECONDS)
    await s.flush()
    await power_loss(s, a, "/state/log")


async def _moved_and_lost_in_step(s: Script) -> None:
    """A write that cannot reach its synchronous remote is to fail, and clients write all the time,
    while a person moves the log, and while its disk is lost: the link is up, and none fails."""

    async def write_until(end: asyncio.Event) -> None:
        while not end.is_set():
            succeeded = s.succeeded
            await s.write(1, 0, pause=0.005)
            if s.succeeded == succeeded:
                raise Violation("a write failed while the log was moved, or lost (I8)")

    moved, lost = moment(s, s.world.a, "log-moved"), moment(s, s.world.a, "log-in-memory")
    s.world.spawn(s.replace_log("/state/moved"))
    await write_until(moved)
    await s.in_sync()
    s.spoil("/state/moved")
    await write_until(lost)
    await s.write(1, 0)
    await s.in_sync()


async def _believed(s: Script) -> None:
    """A sync of a secondary's log fails, and has lost what the next process finds in the page cache
    still: it is applied when it is durable, and not because it is there."""
    (b,) = s.world.remotes
    life = b.life
    loses(b, "/state/log")
    for _ in range(BLOCK):
        await s.write(0, 0, FAR, pause=0.0)
    while b.alive and b.life is life:
        await asyncio.sleep(POLL_S)
    await s.up(b)
    s.world.power_cut(b, AllKept())
    await s.world.start(b)
    assert b.node is not None
    applied, epoch = follower(b).applied_seq, b.node.store.state["epoch"]
    compare(b.images(), s.world.history.image(epoch, applied), "a secondary (I1)")
    await s.in_sync()


async def _ended_epoch(s: Script) -> None:
    """A primary loses its power and a record that was not synced, but not the later ones. It writes
    anew in its place, and its process dies: those that are behind are of an epoch that had ended.
    """
    a = s.world.a
    for _ in range(7):
        await s.write(0, 0)
    await s.flush()
    await s.in_sync()
    s.link(up=False)
    a.disk.faults = Miswrites("/state/log", Fault(Kind.DROP))  # by the power, as it turns out
    for _ in range(3):
        await s.write(0, 0, count=BLOCK, pause=0.0)
    s.world.power_cut(a, AllKept())
    a.disk.faults = None
    await s.world.start(a)
    await s.write(0, 0, count=BLOCK)
    # What is appended is filled up with zeros to the page's end: here there is nothing to fill.
    assert (await s.primary()).log.ring.head % PAGE == 0
    await killed(s, a)
    s.link(up=True)
    await s.in_sync()


async def _log_reverts(s: Script) -> None:
    """The process dies; at the next start a sync of the log fails, and it has lost what was not
    durable, as the facets have not."""
    world, a = s.world, s.world.a
    await s.write(0, 0, fua=True)
    for _ in range(BLOCK):
        await s.write(0, 0, pause=0.0)
    s.kill(a)
    loses(a, "/state/log")
    await world.start(a)
    a.disk.faults = None
    while not a.alive:
        await world.start(a)
        await asyncio.sleep(POLL_S)


async def _rotten_and_stopped(s: Script) -> None:
    """A record that a remote needs is not in the log, so its map is filled; the node is stopped
    before that is durable."""
    world, a = s.world, s.world.a
    world.astray_on = a
    filling = asyncio.Event()
    a.disk.faults = either(
        Miswrites("/state/log", Fault(Kind.DROP)), strikes("sync", "/state/dcm", SLOW, filling)
    )
    await s.write(0, 0)
    await filling.wait()
    await s.write(0, FAR)
    await s.stop(a)
    await world.start(a)
    await s.in_sync()
    world.astray_on = None


async def _only_in_the_cache(s: Script) -> None:
    """A record is not in the log, which the next start sees; the remote gets what it held. Its
    extent leaves the active map, and then power fails before the facet was ever synced."""
    world, a = s.world, s.world.a
    world.astray_on = a
    s.link(up=False)
    a.disk.faults = Miswrites("/state/log", Fault(Kind.DROP))
    await s.write(0, 0)
    a.disk.faults = None
    await s.write(0, FAR)
    await killed(s, a)
    s.link(up=True)
    await s.in_sync()
    for extent in range(1, 90):
        await s.write(0, 2 * extent)
    await power_loss(s, a)
    await s.in_sync()
    world.astray_on = None


async def _forced_out(s: Script, forced: asyncio.Event) -> None:
    """A remote is away, and clients write until it is to be forced out; nobody waits for that."""
    log = (await s.primary()).log
    while log.ring.used <= HIGH_WATER * log.capacity:
        await s.write(0, 0, count=BLOCK)
    await forced.wait()


async def _let_go_too_soon(s: Script) -> None:
    """A remote is being forced out of a log in memory, and not all is in its map yet, when extents
    are to leave the active map; then power fails."""
    a = s.world.a
    await without_log(s)
    s.link(up=False)
    for extent in (*range(HOT - 1), FAR // 2):  # as many as can be active
        await s.write(0, 2 * extent)
    await _forced_out(s, slow_at(s, a, "overflow", "sync", "/state/superblock"))
    s.world.spawn(s.write(0, FAR - 10))
    await asyncio.sleep(SLOW_SECONDS / 3)
    await slow(a, "sync", "/state/dcm").wait()
    await asyncio.sleep(SLOW_SECONDS / 2)
    await power_loss(s, a, "/state/log")
    s.link(up=True)
    await s.in_sync()


async def _stopped_and_forced_out(s: Script) -> None:
    """A remote is being forced out of a log in memory when the node is stopped."""
    a = s.world.a
    await without_log(s)
    s.link(up=False)
    await _forced_out(s, slow_at(s, a, "overflow", "sync", "/state/superblock"))
    await s.stop(a)
    s.mend("/state/log")
    a.disk.faults = None
    await s.world.start(a)
    s.link(up=True)
    await s.in_sync()


async def _killed_appending(s: Script) -> None:
    """A process is killed in the middle of an append, first that of the primary, which has no facet
    of a volume and reads it from the remote, then that of the remote: nothing that anybody was told
    of is lost, and nobody thinks so."""
    world, context = s.world, contextvars.copy_context()
    await without_facet(s)
    for host in (world.a, *world.remotes):
        damaged = moment(s, host, "log-damaged")

        def kill(host: Host = host) -> None:
            context.copy().run(world.kill, host)

        half, struck = Fault(Kind.SHORT, then=kill), asyncio.Event()
        host.disk.faults = strikes("pwritev", "/state/log", half, struck)
        await s.write(0, 0, count=BLOCK)
        await struck.wait()
        host.disk.faults = None
        if host.alive:
            raise Violation("it was not killed")
        await world.start(host)
        await s.read(0, 0, BLOCK)
        await s.in_sync()
        if damaged.is_set():
            raise Violation(f"{host.name} takes what a kill left of an append for damage (I4)")
    s.mend("/facets/v0.0")
    await s.facets_back()


async def _last_one_rots(s: Script) -> None:
    """The last record of the primary's log rots, and the process dies. A facet has what it carried,
    so it was whole: nothing before it is redone over that, and everybody is compared."""
    world, a = s.world, s.world.a
    await s.write(0, 0, count=BLOCK)
    await s.write(0, 0, count=BLOCK)
    node = await s.primary()
    ring = node.log.ring
    a.disk.flip("/state/log", RING_AT + (ring.head - PAGE // 2) % ring.capacity)
    world.astray_on, damaged = a, moment(s, a, "log-damaged")
    await killed(s, a)
    if not damaged.is_set():
        raise Violation("a record that rotted in the log was not missed (X6)")
    await s.read(0, 0, BLOCK)
    await s.in_sync()
    world.astray_on = None


MOVED_AND_LOST = directed(_moved_and_lost)
MOVED_AND_LOST_IN_STEP = directed(_moved_and_lost_in_step, mode="sync", on_link_loss="fail")
BELIEVED = directed(_believed)
ENDED_EPOCH = directed(_ended_epoch)
LOG_REVERTS = directed(_log_reverts)
ROTTEN_AND_STOPPED = directed(_rotten_and_stopped, constants=READ_BACK)
ONLY_IN_THE_CACHE = directed(_only_in_the_cache, **LARGE)
LET_GO_TOO_SOON = directed(_let_go_too_soon, **LARGE)
LAST_ONE_ROTS = directed(_last_one_rots, **LARGE)
KILLED_APPENDING = directed(_killed_appending, last_facet=True, **LARGE)
STOPPED_AND_FORCED_OUT = directed(_stopped_and_forced_out, **LARGE)
