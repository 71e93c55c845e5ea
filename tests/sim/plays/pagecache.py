"""Plays of what a failed sync leaves in the page cache: what is written over it does not reach the
disk, on ext4, until it is forgotten (O16)."""

from __future__ import annotations

from tests.sim.directed import directed
from tests.sim.options import KIB
from tests.sim.plays.stage import alike_without_power, dies_of, loses, without_log
from tests.sim.script import BLOCK, Script

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


WRITTEN_AND_BACK = directed(_written_and_back, facets=2)
WRITTEN_AND_REDONE = directed(_written_and_killed, facets=2)
WRITTEN_WITHOUT_LOG = directed(_written_without_log, facets=2)
WRITTEN_ANEW = directed(_written_and_killed, spill=8 * KIB, facets=2)
