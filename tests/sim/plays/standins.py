"""Plays of a volume that has lost its last facet: a remote stands in, until a facet is back (M5,
M11, M13)."""

from __future__ import annotations

import asyncio
import contextlib

from nbdmirror.engine.node import Node
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.rescue import REACH_SECONDS
from tests.sim.directed import directed
from tests.sim.oracle import Violation, compare
from tests.sim.plays.stage import (
    FAR,
    NEVER_SECONDS,
    SLOW_SECONDS,
    all_is_there,
    another_disk,
    full_log,
    killed,
    moment,
    only_remote,
    power_loss,
    save_rotted,
    slow,
    slow_at,
    slow_save,
    within,
    without_facet,
    without_log,
)
from tests.sim.script import BLOCK, SYNC_SECONDS, Script
from tests.sim.world import Gone


async def _stood_in_ahead(s: Script) -> None:
    """A volume without a facet: the log loses, with the power, what the remote that stands in has;
    then the facet is back, for which the log holds all but that."""
    a, path = s.world.a, "/facets/v0.0"
    await without_facet(s, path)
    await s.write(0, 0, fua=True)
    slow(a, "sync", "/state/log", NEVER_SECONDS)
    await s.write(0, 0)
    await s.until(all_is_there)
    await power_loss(s, a)
    await s.in_sync()
    await s.read(0, 0, 1)
    s.mend(path)
    await s.facet("online", path)
    await s.facets_back()
    await s.read(0, 0, 1)


async def _flushed_out_of_reach(s: Script) -> None:
    """The log is in memory when a volume's only facet is lost, and the remote that stands in is out
    of reach: what is flushed then is nowhere durably, and power fails."""
    await without_log(s)
    await without_facet(s)
    s.link(up=False)
    await s.write(0, 0)
    s.world.spawn(s.flush())
    await asyncio.sleep(1.0)
    await power_loss(s, s.world.a, "/state/log", "/facets/v0.0")
    s.link(up=True)
    await s.in_sync()
    await s.read(0, 0, 1)


async def _last_of_two(s: Script) -> None:
    """The log is in memory, and one of two facets is lost; then the other, which had got more by
    then, while no remote has all of that; and the process dies."""
    await without_log(s)
    s.link(up=False)
    await s.write(0, 0)
    s.spoil("/facets/v0.0")
    await s.write(0, 0)
    await s.until(lambda node: len(node.volumes[0].in_service()) == 1)
    await s.write(0, 0)
    await s.flush()
    s.spoil("/facets/v0.1")
    s.world.spawn(s.write(0, FAR))
    await s.until(lambda node: not node.volumes[0].in_service())
    await asyncio.sleep(1.0)
    s.mend("/facets/v0.0")
    s.mend("/facets/v0.1")
    await killed(s, s.world.a)
    s.link(up=True)


async def _back_and_flushed(s: Script) -> None:
    """A volume's only facet comes back from a log in memory while the remote that stood in for it
    is away; what is flushed before it is durable that it is back is not lost with the power."""
    world, a, path = s.world, s.world.a, "/facets/v0.0"
    await without_log(s)
    await without_facet(s, path)
    await s.flush()
    await asyncio.sleep(1.0)
    s.mend(path)
    saving = slow_at(s, a, "facet-returns", "sync", "/state/superblock")
    world.spawn(s.facet("online", path))
    await saving.wait()
    s.link(up=False)
    await s.write(0, 0)
    flushing = world.spawn(s.flush())
    await asyncio.sleep(SLOW_SECONDS / 3)
    await power_loss(s, a, "/state/log")
    s.link(up=True)
    await s.in_sync()
    await s.read(0, 0, 1)
    flushing.cancel()


async def _flushed_while_redone(s: Script) -> None:
    """A volume's only facet comes back from a log in memory. While what it got first is synced,
    something is written, and flushed: the remote that stands in has it. The facet gets that behind
    the sync, is trusted, and power fails."""
    world, a, path = s.world, s.world.a, "/facets/v0.0"
    await without_log(s)
    await without_facet(s, path)
    await s.flush()
    await asyncio.sleep(1.0)
    s.mend(path)
    syncing = slow(a, "sync", path)
    world.spawn(s.facet("online", path))
    await syncing.wait()
    await s.write(0, 0)
    await s.flush()
    await s.facets_back()
    await power_loss(s, a, "/state/log")
    await s.in_sync()
    await s.read(0, 0, 1)


async def _back_while_flushed(s: Script) -> None:
    """A flush waits for the remote that stands in for a volume's only facet, the log being in
    memory; that is away, but the facet comes back: it has all that the flush is for."""
    world, path = s.world, "/facets/v0.0"
    await without_log(s)
    await without_facet(s, path)
    s.link(up=False)
    await s.write(0, 0)
    node = await s.primary()
    world.spawn(s.flush())
    s.mend(path)
    await s.facet("online", path)
    await s.facets_back()
    await asyncio.sleep(REACH_SECONDS + 5.0)
    if world.a.node is not node:
        raise Violation("the node ended for a remote that nobody needed (I8)")
    s.link(up=True)


async def _passed_and_flushed(s: Script) -> None:
    """A remote has all that a volume's last facet had, so the volume is to come back from there:
    what is flushed with that waits until it is durable."""
    a, path = s.world.a, "/facets/v0.0"
    await without_log(s)
    s.link(up=False)
    await without_facet(s, path)
    passing = slow_save(a, lambda node: not node.store.state["volumes"][0]["facets"][0]["last"])
    s.link(up=True)
    await passing.wait()
    await s.write(0, 0)
    s.world.spawn(s.flush())
    await asyncio.sleep(SLOW_SECONDS / 3)
    await power_loss(s, a, "/state/log", path)
    await s.in_sync()
    await s.read(0, 0, 1)


async def _flushed_by_one_of_two(s: Script) -> None:
    """The log is in memory, and two remotes stand in for a volume's only facet, of which the first
    is out of reach: what is flushed is at the second only, and the process dies."""
    await without_log(s)
    await s.in_sync()
    s.link(up=False)
    await without_facet(s)
    await s.write(0, 0)
    before = s.succeeded
    await s.flush()
    if s.succeeded == before:
        raise Violation("one remote out of reach is one too many for a flush (I8)")
    s.mend("/state/log")
    await killed(s, s.world.a)
    s.link(up=True)
    await s.in_sync()
    await s.read(0, 0, 1)
    s.mend("/facets/v0.0")


async def _flushed_while_forced_out(s: Script) -> None:
    """The same, but the first remote is about to leave the log, which is not durable yet, as
    something is flushed."""
    world, a = s.world, s.world.a
    await without_log(s)
    await s.in_sync()
    await without_facet(s)
    await s.flush()
    s.link(up=False)
    await s.write(0, 0)
    node = await s.primary()
    assert node.primary is not None
    first = node.primary.remotes[0]
    leaving = slow_save(a, lambda node: first.tracking)

    async def leave() -> None:
        with contextlib.suppress(Gone):
            await world.in_life(a, first.overflow("the log was full"))

    world.spawn(leave())
    await leaving.wait()
    world.spawn(s.flush())
    await asyncio.sleep(SLOW_SECONDS / 3)
    s.mend("/state/log")
    await killed(s, a)
    s.link(up=True)
    await s.in_sync()
    await s.read(0, 0, 1)
    s.mend("/facets/v0.0")


async def _frozen_and_full(s: Script) -> None:
    """Two remotes stand in for a volume's only facet, and the first is frozen: it has everything
    durably, but the log is kept for what its facets lack, until it is full. It is forced out."""
    await s.write(0, 0)
    await s.in_sync()
    await s.freeze(on=True)
    await without_facet(s)
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            await full_log(s)
    except TimeoutError:
        raise Violation("writes wait for ever for a remote that is frozen (M7)") from None
    await s.read(0, 0, 1)
    await s.freeze(on=False)
    s.mend("/facets/v0.0")
    await s.facets_back()
    await s.in_sync()


async def _frozen_and_alone(s: Script) -> None:
    """The same with the only remote: writes wait for it, as nobody else has the volume, until it
    follows again; that is told."""
    await s.write(0, 0)
    await s.in_sync()
    await s.freeze(on=True)
    await without_facet(s)
    told = moment(s, s.world.a, "log-full")
    filling = s.world.spawn(full_log(s))
    await within(told, SYNC_SECONDS)
    if not told.is_set():
        raise Violation("nobody is told what writes wait for (M7)")
    await s.freeze(on=False)
    await filling
    await s.read(0, 0, 1)
    s.mend("/facets/v0.0")
    await s.facets_back()


async def _last_removed(s: Script) -> None:
    """A remote stands in for a volume's only facet, which a person removes, for its disk is gone:
    space in the log is given back as before, until a new facet is added, and after."""
    path = "/facets/v0.0"
    await without_facet(s, path)
    await s.facet("remove", path)
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            await full_log(s)
    except TimeoutError:
        raise Violation("writes wait for ever for space in the log (I8)") from None
    await s.read(0, 0, 1)
    s.mend(path)
    await s.facet("add", path, "v0")
    await s.facets_back()
    await s.read(0, 0, 1)


async def _unpassed(s: Script, path: str) -> None:
    """The log is in memory, and the remote that stands in for a volume's only facet is out of
    reach: that facet alone has what was flushed."""
    await without_log(s)
    await s.in_sync()
    s.link(up=False)
    await s.write(0, 0)
    await s.flush()
    await without_facet(s, path)


async def _removed_unpassed(s: Script) -> None:
    """A person removes a facet that alone has what was flushed; and the process dies."""
    path = "/facets/v0.0"
    await _unpassed(s, path)
    await s.facet("remove", path)
    await s.facet("offline", path)
    await s.facet("replace", path)
    s.mend(path)
    await killed(s, s.world.a)
    s.link(up=True)
    await s.in_sync()
    await s.read(0, 0, 1)


async def _replaced_unpassed(s: Script) -> None:
    """A person would replace its disk, or the facet, which is refused: no new one is left behind.
    Then that disk is good again: the facet comes back by itself."""
    path = "/facets/v0.0"
    await _unpassed(s, path)
    await s.facet("replace", path)
    await s.facet("replace", path, "/facets/v0.2")
    if len((await s.primary()).volumes[0].facets) != 1:
        raise Violation("a replacement that was refused left a facet behind (M8)")
    s.mend(path)
    await s.facets_back()
    if not (await s.primary()).volumes[0].in_service():
        raise Violation("a facet does not come back after a command that was refused (M8)")
    s.link(up=True)


async def _consistent_and_cut(s: Script) -> None:
    """Power fails while a remote that has become consistent is noted down, and somebody else has
    saved the superblock meanwhile. The facet is lost with it: the remote holds the volume."""
    world, a, path = s.world, s.world.a, "/facets/v0.0"
    node, remote = await s.primary(), await only_remote(s)
    await s.full_resync()
    mapping = slow(a, "sync", "/state/dcm/b", when=lambda: bool(remote.facts["consistent"]))
    await mapping.wait()
    await world.in_life(a, node.store.save())
    s.spoil(path)
    await power_loss(s, a)
    await _reads_back(s)
    s.mend(path)
    await s.facets_back()
    await s.in_sync()


async def _leaned_and_rotted(s: Script) -> None:
    """What a volume's only facet lacks has left the log for its map when the process dies, and what
    the superblock said last has rotted: all is compared, but with the remote that stands in."""
    path = "/facets/v0.0"
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    await without_facet(s, path)
    for turn in range(14):
        await s.write(0, turn % 4 * BLOCK, count=BLOCK, pause=0.05)
    await s.in_sync()
    await save_rotted(s, s.world.a)
    await _reads_back(s)
    s.mend(path)
    await s.facets_back()
    await s.in_sync()
    s.world.astray_on = None


async def _leaned_on_and_rejoined(s: Script) -> None:
    """A volume has no facet but those of its remote, of which one is new after a restart: the other
    one is read, and a facet comes back from it; then the new one gets all."""
    (b,) = s.world.remotes
    paths = ("/facets/v0.0", "/facets/v0.1")
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    for path in paths:
        s.spoil(path)
    await s.write(0, 0)
    await s.until(lambda node: not node.volumes[0].in_service())
    for turn in range(14):
        await s.write(0, turn % 4 * BLOCK, count=BLOCK, pause=0.05)
    await s.in_sync()
    await s.stop(b)
    b.swapped = True
    await another_disk(s, paths[0], b)
    await s.world.start(b)
    await _reads_back(s)
    await s.write(0, 0)
    if (await only_remote(s)).status(0.0, 0)["why"] is None:
        raise Violation("nobody is told that a facet there lacks what is compared later (X4)")
    await killed(s, b)
    await _reads_back(s)
    await s.write(1, 0)
    await power_loss(s, s.world.a)  # what may differ of the other volume is compared
    await _reads_back(s)
    await s.until(lambda node: bool(_remote_of(node).facts["consistent"]))
    await s.read(0, 0, 4 * BLOCK)
    for path in paths:
        s.mend(path)
        await s.facet("online", path)
    await s.facets_back()
    await s.in_sync()
    compare([b.disk.content(paths[1])], [b.disk.content(paths[0])], "a facet that is new (I2)")


async def _first_away(s: Script) -> None:
    """Of two remotes that stand in the first is away when power fails, and stays so: the other one
    has all, and answers."""
    path = "/facets/v0.0"
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    await without_facet(s, path)
    node = await s.primary()
    assert node.primary is not None
    b, c = node.primary.remotes
    s.link(up=False)
    await s.write(0, 0, fua=True)
    await s.until(lambda node: bool(b.facts["away"]))
    await asyncio.sleep(1.0)  # and it is noted
    await s.until(lambda node: c.durable_seq == node.log.next_seq - 1)
    await power_loss(s, s.world.a)
    await asyncio.sleep(REACH_SECONDS)
    before = s.succeeded
    await s.read(0, 0, 1)
    if s.succeeded == before:
        raise Violation("nobody answers for a volume that a remote has all of (M11)")
    s.link(up=True)
    s.mend(path)
    await s.facet("online", path)
    await s.facets_back()
    await s.in_sync()


async def _copied_out_of_reach(s: Script) -> None:
    """What a volume's only facet lacks is in its map when it would come back, and the remote that
    has it is away: a client writes there meanwhile, and is not held up until a read gives up."""
    path = "/facets/v0.0"
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    await without_facet(s, path)
    node = await s.primary()
    assert node.facets is not None
    await s.world.in_life(s.world.a, node.facets.member(path).to_map())
    s.link(up=False)
    await asyncio.sleep(1.0)
    returns = moment(s, s.world.a, "facet-returns")
    s.mend(path)
    await returns.wait()
    await asyncio.sleep(0.1)
    began = s.world.loop.time()
    await s.write(0, 1)
    if s.world.loop.time() - began > REACH_SECONDS / 3:
        raise Violation("a write waited for a remote that is away (M11)")
    s.link(up=True)
    await s.facets_back()
    await s.in_sync()


def _remote_of(node: Node) -> Remote:
    assert node.primary is not None
    return node.primary.remotes[0]


async def _reads_back(s: Script) -> None:
    """A remote that follows answers reads, after some time."""
    await s.until(
        lambda node: node.primary is not None and node.primary.remotes[0].link == "connected"
    )
    before = s.succeeded
    await s.read(0, 0, 1)
    if s.succeeded == before:
        raise Violation("nobody answers for a volume that a consistent remote has (M11)")


STOOD_IN_AHEAD = directed(_stood_in_ahead, last_facet=True)
FLUSHED_OUT_OF_REACH = directed(_flushed_out_of_reach, last_facet=True)
LAST_OF_TWO = directed(_last_of_two, facets=2, last_facet=True)
BACK_AND_FLUSHED = directed(_back_and_flushed, last_facet=True)
FLUSHED_WHILE_REDONE = directed(_flushed_while_redone, last_facet=True)
BACK_WHILE_FLUSHED = directed(_back_while_flushed, last_facet=True)
PASSED_AND_FLUSHED = directed(_passed_and_flushed, last_facet=True)
FLUSHED_BY_ONE_OF_TWO = directed(_flushed_by_one_of_two, last_facet=True, remotes=2)
FLUSHED_WHILE_FORCED_OUT = directed(_flushed_while_forced_out, last_facet=True, remotes=2)
FROZEN_AND_FULL = directed(_frozen_and_full, last_facet=True, remotes=2)
FROZEN_AND_ALONE = directed(_frozen_and_alone, last_facet=True)
LAST_REMOVED = directed(_last_removed, last_facet=True)
REMOVED_UNPASSED = directed(_removed_unpassed, last_facet=True)
REPLACED_UNPASSED = directed(_replaced_unpassed, last_facet=True)
CONSISTENT_AND_CUT = directed(_consistent_and_cut, last_facet=True)
COPIED_OUT_OF_REACH = directed(_copied_out_of_reach, last_facet=True)
FIRST_AWAY = directed(_first_away, remotes=2, last_facet=True)
LEANED_AND_ROTTED = directed(_leaned_and_rotted, last_facet=True)
LEANED_ON_AND_REJOINED = directed(_leaned_on_and_rejoined, facets=2, last_facet=True)
