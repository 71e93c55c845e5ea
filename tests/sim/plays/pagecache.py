"""Plays of what a failed sync leaves in the page cache: what is written over it does not reach the
disk, on ext4, until it is forgotten (O16)."""

from __future__ import annotations

import asyncio

from tests.sim.directed import directed
from tests.sim.faults import Fault, Kind
from tests.sim.options import KIB
from tests.sim.oracle import Violation
from tests.sim.plays.stage import (
    SLOW_SECONDS,
    alike_without_power,
    dies_of,
    full_log,
    loses,
    moment,
    power_loss,
    released,
    strikes,
    without_log,
)
from tests.sim.script import BLOCK, Script

NEVER = Fault(Kind.STALL, seconds=60.0)

STRETCH = range(0, 8 * BLOCK, BLOCK)
"""Nothing was written there before."""


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


async def _out_and_hanging(s: Script) -> None:
    """A facet is out of service, by a person, and its disk hangs: the next start, and who does
    something with another facet, do not wait for it (I8)."""
    a, path = s.world.a, "/facets/v0.1"
    await s.facet("offline", path)
    await full_log(s)
    s.kill(a)
    a.disk.faults = lambda operation, name, nth: (
        NEVER if name == path and NEVER.suits(operation) else None
    )
    began = s.world.loop.time()
    await s.world.start(a)
    if s.world.loop.time() - began > NEVER.seconds / 2:
        raise Violation("a start waits for a facet that nobody wants (I8)")
    await s.write(0, 0)
    a.disk.faults = None


JOINED_AND_KILLED = directed(_joined_and_killed, spill=8 * KIB, facets=2)
RESTORED_AND_STOPPED = directed(_restored_and_stopped)
OUT_AND_HANGING = directed(_out_and_hanging, facets=2)
WRITTEN_AND_BACK = directed(_written_and_back, facets=2)
WRITTEN_AND_REDONE = directed(_written_and_killed, facets=2)
WRITTEN_WITHOUT_LOG = directed(_written_without_log, facets=2)
WRITTEN_ANEW = directed(_written_and_killed, spill=8 * KIB, facets=2)
