"""Plays of what people ask of local facets while something else becomes of them (M8, M17)."""

from __future__ import annotations

import asyncio
import contextlib

from nbdmirror.engine.facets import RETRY_SECONDS
from nbdmirror.errors import Refused
from tests.sim.directed import directed
from tests.sim.faults import Fault, Kind
from tests.sim.options import KIB
from tests.sim.oracle import Violation
from tests.sim.plays.stage import FAR, SLOW_SECONDS, power_loss, slow, without_facet
from tests.sim.script import BLOCK, POLL_S, SYNC_SECONDS, Script


async def _last_taken(s: Script) -> None:
    """Of two facets one is taken out by a person, and the other one fails meanwhile."""
    syncing = slow(s.world.a, "sync", "/facets/v0.0")
    await s.write(0, 0)
    s.world.spawn(s.facet("offline", "/facets/v0.0"))
    await syncing.wait()
    s.spoil("/facets/v0.1")
    await s.write(0, 0)
    await asyncio.sleep(SLOW_SECONDS)
    node = await s.primary()
    if not node.volumes[0].in_service():
        raise Violation("a person has taken out the last facet (I8)")
    s.mend("/facets/v0.1")


async def _out_and_failed(s: Script) -> None:
    """A person takes out a facet of which a client has just seen that it failed: it is out until
    somebody brings it back."""
    path, saving = "/facets/v0.1", slow(s.world.a, "sync", "/state/superblock")
    s.spoil(path)
    s.world.spawn(s.write(0, 0))
    await saving.wait()
    s.mend(path)
    await s.facet("offline", path)
    await asyncio.sleep(3 * RETRY_SECONDS)
    node = await s.primary()
    if any(f.path == path and f.writable for f in node.volumes[0].facets):
        raise Violation("a facet that a person took out is back (M8)")


async def _taken_out_of_two(s: Script) -> None:
    """A person takes out a facet, and before that is durable something is written, and flushed. The
    log is in memory, so all that has it is the other facet; and power fails."""
    a = s.world.a
    saving = slow(a, "sync", "/state/superblock")
    s.world.spawn(s.facet("offline", "/facets/v0.0"))
    await saving.wait()
    await s.write(0, 0)
    await s.flush()
    await power_loss(s, a)
    await s.read(0, 0, 1)
    await s.facets_back()
    await s.in_sync()


async def _offline_while_it_fails(s: Script) -> None:
    """A facet comes back, and the disk refuses what is copied to it just as a person takes it out
    again: that is not waited for as long as the disk is bad."""
    a, path = s.world.a, "/facets/v0.1"
    await s.facet("offline", path)
    for block in range(20):
        await s.write(0, block * BLOCK, count=BLOCK)
    began = asyncio.Event()

    def bad(operation: str, where: str, nth: int) -> Fault | None:
        if operation != "write" or where != path:
            return None
        began.set()
        return Fault(Kind.ERROR, seconds=SLOW_SECONDS)

    a.disk.faults = bad
    await s.facet("online", path)
    await began.wait()
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            await s.facet("offline", path)
    except TimeoutError:
        raise Violation("facet offline waits for a bad disk (M8)") from None
    finally:
        a.disk.faults = None
    await s.facet("online", path)
    await s.facets_back()
    await s.in_sync()


async def _back_while_replaced(s: Script) -> None:
    """A person replaces a volume's only facet, which comes back by itself while the new one is
    made: that is refused now, and the new one is not left behind."""
    path = "/facets/v0.0"
    await without_facet(s)
    making = slow(s.world.a, "sync", "/state/dcm/@", 2 * RETRY_SECONDS)
    replacing = s.world.spawn(s.facet("replace", path, "/facets/v0.2"))
    await making.wait()
    s.mend(path)
    await replacing
    facets = (await s.primary()).volumes[0].facets
    if [facet.path for facet in facets if not facet.in_service]:
        raise Violation("a replacement that was refused left a facet behind (M8)")
    assert [facet.path for facet in facets] == [path]
    await s.in_sync()


async def _stopped_and_replaced(s: Script) -> None:
    """A stop cuts the command by which a person replaces a facet's disk: that facet does not begin
    to return, for nobody would end that any more."""
    a, path = s.world.a, "/facets/v0.0"
    s.spoil(path)
    await s.write(0, 0)
    await s.until(lambda node: len(node.volumes[0].in_service()) == 1)
    s.mend(path)
    node, making = await s.primary(), slow(a, "sync", path, 2 * SLOW_SECONDS)
    assert node.facets is not None
    member, ends = node.facets.member(path), node.doors.end_control
    asked = s.world.loop.spawn(a.life, node.facet("replace", path))

    async def end_control() -> None:
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await ends()

    setattr(node.doors, "end_control", end_control)  # noqa: B010
    await making.wait()
    await s.stop(a)
    if member.task is not None and not member.task.done():
        raise Violation("a facet begins to return after a stop (M8)")
    await s.world.start(a)
    await s.facets_back()
    await s.in_sync()


async def _edited_and_left(s: Script) -> None:
    """Somebody has written to a facet, and says so; before that has its turn the facet fails and
    comes back, equal to the others: what was written is gone, and not said to be taken in."""
    a, beside, node = s.world.a, s.world.beside, await s.primary()
    async with node.snapshots.lock:  # one is being taken
        beside.change(node)
        said = s.world.loop.spawn(a.life, beside.say(node))
        await asyncio.sleep(POLL_S)
        s.spoil("/facets/v0.0")
        await s.write(0, FAR)
        s.mend("/facets/v0.0")
        await s.facets_back()
    with contextlib.suppress(Refused):
        await said
    if beside.pending:
        await s.world.in_life(a, beside.say(node))  # it is written again
    await s.in_sync()


EDITED_AND_LEFT = directed(_edited_and_left, facets=2)
OFFLINE_WHILE_IT_FAILS = directed(_offline_while_it_fails, facets=2)
BACK_WHILE_REPLACED = directed(_back_while_replaced, last_facet=True)
STOPPED_AND_REPLACED = directed(_stopped_and_replaced, facets=2)
LAST_TAKEN = directed(_last_taken, facets=2)
OUT_AND_FAILED = directed(_out_and_failed, facets=2)
TAKEN_OUT_OF_TWO = directed(_taken_out_of_two, spill=8 * KIB, facets=2)
