"""Plays of a volume without a facet whose remote is out of reach: what waits for it, how long, and
what is told (M11, X4)."""

from __future__ import annotations

import asyncio
import re

from nbdmirror.engine.node import Node
from nbdmirror.engine.rescue import REACH_SECONDS
from tests.sim.directed import directed
from tests.sim.oracle import Violation
from tests.sim.plays.stage import SLOW_SECONDS, moment, without_facet, without_log
from tests.sim.script import BLOCK, Script


async def _leaned_on_beside(s: Script) -> Node:
    """Both volumes have lost their facets, the log is in memory. Two remotes have the first volume,
    the second one alone has the other, as after a verify that found what differs; its link is lost,
    and the first volume is written."""
    net, path = s.world.net, "/facets/v1.0"
    await without_log(s)
    await s.in_sync()
    await without_facet(s)
    s.spoil(path)
    await s.write(1, 0)
    await s.until(lambda node: not node.volumes[1].in_service())
    await s.flush()
    node = await s.primary()
    assert node.primary is not None
    first, second = node.primary.remotes
    net.reset("a", first.name)
    net.cut("a", first.name)
    await s.until(lambda node: first.reads is None)
    first.mark(1, 0, BLOCK)
    first.doubt("a verify found 1 regions that differ")
    await first.sync_maps()
    net.reset("a", second.name)
    net.cut("a", second.name)
    net.heal("a", first.name)
    await s.until(lambda node: first.reads is not None)
    await s.write(0, 2)
    return node


async def _flushed_beside_another(s: Script) -> None:
    """The first volume is flushed while the link of the second one's remote is lost for a moment:
    that waits for it."""
    await _leaned_on_beside(s)
    flushing = s.world.spawn(s.flush())
    await asyncio.sleep(SLOW_SECONDS)
    s.world.net.heal_all()
    await flushing
    before = s.succeeded
    await s.read(1, 0, 1)
    if s.succeeded == before:
        raise Violation("a volume lost the only remote that has it for a flush of another (M11)")
    s.mend("/facets/v1.0")
    s.mend("/facets/v0.0")
    await s.facets_back()


async def _flushed_beside_a_loss(s: Script) -> None:
    """The same for good: the node ends, and says which volume nobody is left for."""
    node = await _leaned_on_beside(s)
    assert node.failed is not None
    await asyncio.wait([s.world.spawn(s.flush())], timeout=2 * REACH_SECONDS)
    await asyncio.wait([node.failed], timeout=SLOW_SECONDS)
    s.mend("/facets/v1.0")
    s.mend("/facets/v0.0")
    s.mend("/state/log")
    s.world.net.heal_all()
    if not node.failed.done():
        raise Violation("a flush waits for ever for a remote that another volume needs (I8)")
    if not re.search("volume v1 .*remote c did not answer", str(node.failed.result())):
        raise Violation("a node that ends names what had not failed (X4)")


async def _told_what_it_waits_for(s: Script) -> None:
    """The remote that stands in for a volume's only facet is lost, and a read waits for it."""
    s.link(up=False)
    told = moment(s, s.world.a, "remote-awaited")
    await s.read(0, 0, 1)
    if not told.is_set():
        raise Violation("nobody is told what a read waits for (X4)")


async def _awaited_again(s: Script) -> None:
    """A read has waited for a remote, which was told. The facet is back until it is lost once more;
    and the remote is back until that is lost once more. Nobody reads from it meanwhile."""
    path = "/facets/v0.0"
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    await without_facet(s, path)
    await _told_what_it_waits_for(s)
    s.mend(path)
    await s.facet("online", path)
    await s.facets_back()
    await without_facet(s, path)
    await _told_what_it_waits_for(s)
    s.link(up=True)
    await s.in_sync()
    await _told_what_it_waits_for(s)
    s.link(up=True)
    s.mend(path)
    await s.facet("online", path)
    await s.facets_back()


AWAITED_AGAIN = directed(_awaited_again, last_facet=True)
FLUSHED_BESIDE_ANOTHER = directed(_flushed_beside_another, last_facet=True, remotes=2)
FLUSHED_BESIDE_A_LOSS = directed(_flushed_beside_a_loss, last_facet=True, remotes=2)
