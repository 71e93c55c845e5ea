"""Plays of what a failed sync leaves in the page cache: what is written over it does not reach the
disk, on ext4, until it is forgotten (O16)."""

from __future__ import annotations

import asyncio

from tests.sim.directed import directed
from tests.sim.faults import Fault, Injector, Kind
from tests.sim.options import KIB
from tests.sim.oracle import Violation
from tests.sim.plays.stage import (
    NEVER_SECONDS,
    SLOW,
    SLOW_SECONDS,
    alike_without_power,
    dies_of,
    either,
    full_log,
    loses,
    moment,
    power_loss,
    released,
    slow,
    strikes,
    without_log,
)
from tests.sim.script import BLOCK, OPTIONS, POLL_S, Script

NEVER = Fault(Kind.STALL, seconds=60.0)

STRETCH = range(0, 8 * BLOCK, BLOCK)
"""Nothing was written there before."""
ONE_BY_ONE = {**OPTIONS.constants, "engine.restore.COPY_BYTES": OPTIONS.region}
"""Constants with which a restore copies region by region."""


async def _written_and_back(s: Script) -> None:
    """A sync of one of two facets fails; it gets from the map what it lacks, by itself."""
    path = "/facets/v0.1"
    for first in STRETCH:
        await s.write(0, first, count=BLOCK)
    loses(s.world.a, path)
    await s.until(lambda node: len(node.volumes[0].in_service()) == 1)
    s.world.a.disk.faults = None
    await s.facets_back()
    await alike_without_power(s)


async def _written_without_log(s: Script) -> None:
    """The same with a log that is in memory, for its disk is lost."""
    await without_log(s)
    await _written_and_killed(s)


async def _written_and_killed(s: Script) -> None:
    """A sync of one of two facets fails, and the process dies before that is noted: what the facet
    lacks is redone."""
    a = s.world.a
    facet = (await s.primary()).volumes[0].facets[1]
    for first in STRETCH:
        await s.write(0, first, count=BLOCK)
    died = dies_of(s, a, facet)
    loses(a, facet.path)
    s.world.spawn(s.flush())
    await died.wait()
    await s.world.start(a)
    await alike_without_power(s)


async def _joined_and_killed(s: Script) -> None:
    """A facet is being synchronised when its sync fails, and the process dies before that is noted;
    what the other facet holds nobody else has, for the log was in memory."""
    a, path = s.world.a, "/facets/v0.1"
    await s.write(0, *STRETCH, count=BLOCK)
    await s.facet("offline", path)
    await s.write(0, *(first + len(STRETCH) * BLOCK for first in STRETCH), count=BLOCK)
    await full_log(s)
    await s.in_sync()
    await released(s, a)
    returns, (_, facet) = moment(s, a, "facet-returns"), (await s.primary()).volumes[0].facets
    died = dies_of(s, a, facet)
    a.disk.faults = strikes("sync", path, Fault(Kind.LOSE), asyncio.Event(), returns.is_set)
    await s.facet("online", path)
    await died.wait()
    await s.world.start(a)
    await s.facets_back()
    await alike_without_power(s)


async def _joined(s: Script) -> None:
    """Facet 1 of volume 0 is being synchronised, and its disk takes its time for that."""
    a, path = s.world.a, "/facets/v0.1"
    await s.write(0, *STRETCH, count=BLOCK)
    await s.facet("offline", path)
    await full_log(s)
    await s.in_sync()
    await released(s, a)
    returns = moment(s, a, "facet-returns")
    a.disk.faults = strikes("sync", path, NEVER, asyncio.Event(), returns.is_set)
    await s.facet("online", path)
    await returns.wait()


async def _joined_and_log_lost(s: Script) -> None:
    """What is written beside the copy is durable in the log, and active no more, when a sync of the
    log fails as the node is stopped: so nothing is redone. And what is in the facet's page cache is
    not on its disk."""
    a, path = s.world.a, "/facets/v0.1"
    await _joined(s)
    await s.write(0, *(first + len(STRETCH) * BLOCK for first in STRETCH[:2]), count=BLOCK)
    await s.flush()
    node, life = await s.primary(), a.life
    assert node.primary is not None
    active = node.primary.group.active
    await s.world.in_life(a, node._make_safe())
    await s.world.in_life(a, active.drop_safe())
    await s.write(1, 0)

    def inject(operation: str, name: str, nth: int) -> Fault | None:
        if a.life is not life:
            return Fault(Kind.ERROR) if (operation, name) == ("forget", path) else None
        if operation != "sync":
            return None
        return (
            Fault(Kind.LOSE) if name.startswith("/state/log") else NEVER if name == path else None
        )

    a.disk.faults = inject
    await s.stop(a)
    if not a.alive:
        await s.world.start(a)
    await s.up(a)
    await s.facets_back()
    a.disk.faults = None
    await alike_without_power(s)


async def _joined_and_hanging(s: Script) -> None:
    """A facet is being synchronised when the process dies, and its disk hangs: the next start does
    not wait for it (I8)."""
    await _joined(s)
    await _started_beside(s, "/facets/v0.1")


async def _restored_and_stopped(s: Script) -> None:
    """The node is stopped while a sync of what a restore copied is about to fail: nobody waits for
    that any more, and nothing of it is in the log."""
    a, path, regions = s.world.a, "/facets/v0.0", len(STRETCH) * BLOCK
    await s.write(0, *STRETCH, count=BLOCK)
    uuid = await s.snapshot()
    await s.clear(0, 0, regions, "trim")
    await s.in_sync()
    await released(s, a)
    await s.stop(a)
    await s.world.start(a)
    failing, restored = asyncio.Event(), moment(s, a, "restored")
    lost = Fault(Kind.LOSE, seconds=SLOW_SECONDS)
    a.disk.faults = strikes("sync", path, lost, failing, restored.is_set)
    await s.restore(uuid)
    await failing.wait()
    a.disk.faults = strikes("sync", "/state/superblock", NEVER, asyncio.Event())
    await s.stop(a)
    a.disk.faults = None
    if not a.alive:
        await s.world.start(a)
    await s.up(a)
    await s.until(lambda node: node.restorer is not None and node.restorer.status() is None)
    await s.flush()
    await s.in_sync()
    await s.stop(a)
    await s.world.start(a)
    await power_loss(s, a)
    await s.read(0, 0, regions)


def _hangs(path: str) -> Injector:
    """All that the disk of this facet is asked to do off the loop."""
    return lambda operation, name, nth: NEVER if name == path and NEVER.suits(operation) else None


async def _started_beside(s: Script, path: str) -> None:
    """The process dies, and is started again while the disk of that facet hangs."""
    a = s.world.a
    s.kill(a)
    a.disk.faults = _hangs(path)
    began = s.world.loop.time()
    await s.world.start(a)
    if s.world.loop.time() - began > NEVER.seconds / 2:
        raise Violation("a start waits for a facet that nobody wants (I8)")
    await s.write(0, 0)
    a.disk.faults = None
    await asyncio.sleep(NEVER.seconds)


async def _out_and_hanging(s: Script) -> None:
    """A facet is out of service, by a person, and its disk hangs: the next start, and who does
    something with another facet, do not wait for it (I8)."""
    path = "/facets/v0.1"
    await s.facet("offline", path)
    await full_log(s)
    await _started_beside(s, path)


async def _synced_and_hanging(s: Script) -> None:
    """The disk of a facet hangs that has all that was written, durably: a stop does not wait for it
    (I8)."""
    a, node = s.world.a, await s.primary()
    await s.write(0, *STRETCH, count=BLOCK)
    await s.in_sync()
    await s.world.in_life(a, node.housekeeper.sync_facets())
    a.disk.faults = _hangs("/facets/v0.1")
    began = s.world.loop.time()
    await s.stop(a)
    if s.world.loop.time() - began > NEVER.seconds / 2:
        raise Violation("a stop waits for a facet that it needs nothing of (I8)")
    a.disk.faults = None
    await s.world.start(a)
    await s.in_sync()


async def _taken(s: Script) -> str:
    """A snapshot of what was written there; its uuid."""
    await s.write(0, *STRETCH, count=BLOCK)
    uuid = await s.snapshot()
    await s.in_sync()
    await s.flush()
    return uuid


async def _overwritten(s: Script) -> None:
    """What the snapshot was taken of is overwritten, and no redo comes by that any more; then power
    fails."""
    a = s.world.a
    await s.write(0, *STRETCH, count=BLOCK, fua=True)
    await s.in_sync()
    await s.stop(a)
    await s.world.start(a)
    await power_loss(s, a)
    await s.in_sync()


async def _kept_and_killed(s: Script) -> None:
    """A sync of a snapshot's layer fails, and the process dies before that costs the snapshot."""
    a = s.world.a
    uuid = await _taken(s)
    died = dies_of(s, a, (await s.primary()).snapshots.chains[0].members[-1].layer, "release")
    loses(a, f"/state/snapshots/{uuid}.v0")
    s.world.spawn(s.write(0, *STRETCH, count=BLOCK))
    await died.wait()
    await s.world.start(a)
    await _overwritten(s)


async def _kept_and_stopped(s: Script) -> None:
    """A sync of a snapshot's layer takes longer than a stop waits for it, and fails before that is
    through; the superblock says that it was a clean one."""
    a = s.world.a
    path = f"/state/snapshots/{await _taken(s)}.v0"
    keeping = asyncio.Event()
    fails = Fault(Kind.LOSE, seconds=NEVER_SECONDS)
    a.disk.faults = either(
        strikes("sync", path, fails, keeping),
        strikes(
            "sync",
            "/state/superblock",
            Fault(Kind.STALL, seconds=NEVER_SECONDS),
            asyncio.Event(),
            lambda: a.node is None,
        ),
    )
    s.world.spawn(s.write(0, *STRETCH, count=BLOCK))
    await keeping.wait()
    await s.stop(a)
    a.disk.faults = None
    await s.world.start(a)
    await _overwritten(s)


async def _inscribed(s: Script, uuid: str) -> None:
    """Somebody writes all over the snapshot, and flushes now and then."""
    for _ in range(12):
        await s.inscribe(uuid)


async def _inscribed_and_killed(s: Script) -> None:
    """The same with what is written into the snapshot itself, and again after that."""
    a = s.world.a
    uuid = await _taken(s)
    path = f"/state/snapshots/{uuid}.v0@own"
    died = dies_of(s, a, (await s.primary()).snapshots, "lose")
    a.disk.faults = strikes(
        "sync", path, Fault(Kind.LOSE), asyncio.Event(), lambda: a.disk.exists(path)
    )
    s.world.spawn(_inscribed(s, uuid))
    await died.wait()
    await s.world.start(a)
    await _inscribed(s, uuid)
    await power_loss(s, a)
    await s.in_sync()


async def _restored(s: Script, fault: Fault) -> asyncio.Event:
    """What was overwritten is restored; the first sync of the map of what is left to copy has a
    fault. Set when it begins."""
    a, syncing = s.world.a, asyncio.Event()
    uuid = await _taken(s)
    await s.write(0, *STRETCH, count=BLOCK)
    await s.in_sync()
    restored = moment(s, a, "restored")
    a.disk.faults = strikes("sync", "/state/restore", fault, syncing, restored.is_set)
    await s.restore(uuid)
    return syncing


async def _written_where_copied(s: Script) -> None:
    """Before that map is synced again somebody writes where it was cleared, and flushes; then power
    fails."""
    await s.write(0, 0, count=BLOCK)
    await s.flush()
    await power_loss(s, s.world.a)
    await s.read(0, 0, BLOCK)


async def _copied_and_failed(s: Script) -> None:
    """A sync of the map fails, and the node ends and is started again."""
    a = s.world.a
    life = a.life
    await _restored(s, Fault(Kind.LOSE))
    while a.life is life:
        await asyncio.sleep(POLL_S)
    slow(a, "sync", "/facets/v0.0")  # the copy's next one
    await s.up(a)
    await _written_where_copied(s)


async def _copied_and_killed(s: Script) -> None:
    """The process dies while the map is synced."""
    a = s.world.a
    await (await _restored(s, SLOW)).wait()
    s.kill(a)
    slow(a, "sync", "/facets/v0.0")  # the copy's next one
    await s.world.start(a)
    await _written_where_copied(s)


JOINED_AND_KILLED = directed(_joined_and_killed, spill=8 * KIB, facets=2)
JOINED_AND_LOG_LOST = directed(_joined_and_log_lost, facets=2)
JOINED_AND_HANGING = directed(_joined_and_hanging, facets=2)
RESTORED_AND_STOPPED = directed(_restored_and_stopped)
OUT_AND_HANGING = directed(_out_and_hanging, facets=2)
SYNCED_AND_HANGING = directed(_synced_and_hanging, facets=2)
WRITTEN_AND_BACK = directed(_written_and_back, facets=2)
WRITTEN_AND_REDONE = directed(_written_and_killed, facets=2)
WRITTEN_WITHOUT_LOG = directed(_written_without_log, facets=2)
WRITTEN_ANEW = directed(_written_and_killed, spill=8 * KIB, facets=2)
KEPT_AND_KILLED = directed(_kept_and_killed)
KEPT_AND_STOPPED = directed(_kept_and_stopped)
INSCRIBED_AND_KILLED = directed(_inscribed_and_killed)
COPIED_AND_FAILED = directed(_copied_and_failed, constants=ONE_BY_ONE)
COPIED_AND_KILLED = directed(_copied_and_killed, constants=ONE_BY_ONE)
