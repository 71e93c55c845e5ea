"""Plays of local facets: one fails, or a person means it, while somebody is at work with it (M8,
M12, M17)."""

from __future__ import annotations

import asyncio

from nbdmirror.engine.facets import RETRY_SECONDS
from nbdmirror.engine.node import STOP_SECONDS
from tests.sim.directed import directed
from tests.sim.faults import Fault, Kind, Miswrites
from tests.sim.options import KIB
from tests.sim.oracle import Violation
from tests.sim.plays.stage import (
    FAR,
    SLOW,
    SLOW_SECONDS,
    alike_without_power,
    another_disk,
    claimed,
    dies_of,
    either,
    full_log,
    killed,
    loses,
    moment,
    on_disk,
    power_loss,
    released,
    slow,
    strikes,
    without_facet,
)
from tests.sim.script import BLOCK, Script


async def _failed_at_start(s: Script) -> None:
    """A log that was on disk for want of a facet is to be in memory again, and the process died. So
    the start syncs what it redid, and one of two facets cannot be. The node goes on with the other,
    and says so durably."""
    world, a = s.world, s.world.a
    for path in ("/facets/v1.0", "/facets/v1.1"):
        s.spoil(path)
    await s.write(1, 0)
    await s.until(on_disk)
    await s.write(0, 0, count=BLOCK)
    s.kill(a)
    for path in ("/facets/v1.0", "/facets/v1.1"):
        s.mend(path)
    loses(a, "/facets/v0.1")
    await world.start(a)
    a.disk.faults = None
    await s.up(a)
    node = await s.primary()
    if len(node.volumes[0].in_service()) != 1:
        raise Violation("the start did not come by the facet")
    await s.write(0, 0, fua=True)
    await power_loss(s, a)
    await s.facets_back()
    await s.in_sync()


async def _hurried(s: Script) -> None:
    """The only facet of a volume is lost, and the log that it would come back from is full, so it
    comes back from it at once. In the middle of that somebody puts another disk in its place."""
    path, disk = "/facets/v0.0", s.world.a.disk
    await without_facet(s)
    s.mend(path)
    syncing = slow(s.world.a, "sync", path)

    async def fill() -> None:
        while not syncing.is_set():
            await s.write(0, BLOCK, count=BLOCK)

    s.world.spawn(fill())
    await syncing.wait()
    disk.unlink(path)
    disk.open(path, create=True).truncate(s.world.options.sizes[0])
    await s.facet("replace", path)
    await s.write(0, FAR)
    await asyncio.sleep(SLOW_SECONDS)
    await s.facets_back()
    await s.read(0, 0, 2 * BLOCK)
    await s.in_sync()


async def _hurried_unnoted(s: Script) -> None:
    """A volume's only facet fails, and the log is full before that is durable: it comes back from
    the log only afterwards."""
    path = "/facets/v0.0"
    (b,) = s.world.remotes
    for _ in range(3):
        await s.write(0, 0)
    await s.in_sync()  # the remote has more than the facet has been synced for, but not all
    slow(b, "sync", "/state/log", 8.0)
    await s.write(0, 0)
    saving = slow(s.world.a, "sync", "/state/superblock")
    s.spoil(path)
    s.world.spawn(s.write(0, 0))
    await saving.wait()
    s.mend(path)
    for turn in range(20):
        s.world.spawn(_served(s, turn * BLOCK, BLOCK))
        await asyncio.sleep(0.002)
    await asyncio.sleep(SLOW_SECONDS / 2)
    await s.read(0, 0, 20 * BLOCK)
    await asyncio.sleep(2 * SLOW_SECONDS)
    await _served(s, 1, 1)
    await s.read(0, 0, 20 * BLOCK)
    await s.facets_back()
    await s.in_sync()


async def _served(s: Script, first: int, count: int) -> None:
    try:
        await s.write(0, first, count=count)
    except AssertionError as error:
        raise Violation("a facet that takes writes has no file") from error


async def _distrusted(s: Script) -> None:
    """A facet that has a map comes back with another disk. Until it is durable that nothing is
    known of that one, nothing says that it is the one that the map is of; and power fails."""
    world, a, path = s.world, s.world.a, "/facets/v0.1"
    await s.write(0, *range(0, 64, BLOCK), count=BLOCK)
    await s.in_sync()
    await s.stop(a)  # then nothing is active any more
    await world.start(a)
    retried = moment(s, a, "facet-retry")
    a.disk.faults = Miswrites(path, Fault(Kind.ERROR), count=1000)
    await s.write(0, FAR)
    await retried.wait()
    a.disk.faults = None
    await another_disk(s, path)
    filling = slow(a, "sync", "/state/dcm/@")
    world.spawn(s.facet("online", path))
    await filling.wait()
    await s.pause(on=True)
    await power_loss(s, a)
    await s.pause(on=False)
    await s.facets_back()


async def _removed_while_synced(s: Script) -> None:
    """A facet is removed while a sync of it is under way, and that fails: nothing rests on it."""
    path, node = "/facets/v0.1", s.world.a.node
    syncing, fails = asyncio.Event(), Fault(Kind.ERROR, seconds=SLOW_SECONDS)
    s.world.a.disk.faults = strikes("sync", path, fails, syncing)
    await s.write(0, 0)
    await syncing.wait()
    await s.facet("remove", path)
    await asyncio.sleep(SLOW_SECONDS)
    if s.world.a.node is not node:
        raise Violation("a node has ended by a facet that it had no more (M17)")
    for turn in range(40):
        await s.write(0, turn % 20 * BLOCK, count=BLOCK)
    await s.facet("add", path, "v0")
    await s.facets_back()


async def _asked_for_twice(s: Script) -> None:
    """A person asks for a facet whose map is just being made: it is made once."""
    a, path = s.world.a, "/facets/v0.1"
    claimed(a.disk)
    s.spoil(path)
    await s.write(0, 0)
    s.mend(path)
    node, making = await s.primary(), slow(a, "sync", "/state/dcm/@")
    await making.wait()
    await s.facet("online", path)
    await asyncio.sleep(2 * SLOW_SECONDS)
    await s.facets_back()
    if a.node is not node:
        raise Violation("the node ended for a map that it had open itself")


async def _added_and_failed(s: Script) -> None:
    """A facet is added while another one of the volume fails: each has a map of its own."""
    a, path = s.world.a, "/facets/v0.1"
    claimed(a.disk)
    adding = slow(a, "sync", "/state/dcm/@", 2 * RETRY_SECONDS)
    s.world.spawn(s.facet("add", "/facets/v0.2", "v0"))
    await adding.wait()
    s.spoil(path)
    await s.write(0, 0)
    s.mend(path)
    node = await s.primary()
    await asyncio.sleep(3 * RETRY_SECONDS)
    if a.node is not node:
        raise Violation("the node ended for a map that two facets had")
    await s.facets_back()


async def _read_and_failed(s: Script) -> None:
    """A read of a facet is under way when a sync of that fails, which may have lost what was
    written: another facet has it."""
    world, a, path = s.world, s.world.a, "/facets/v0.0"
    await s.write(0, 0)
    node, reading = await s.primary(), asyncio.Event()
    reads = strikes("read", path, SLOW, reading)
    a.disk.faults = either(reads, strikes("sync", path, Fault(Kind.LOSE), asyncio.Event()))
    a.disk.timing.miss = 1.0  # nothing of what is read is in memory
    asked = world.spawn(s.read(0, 0, 1))
    await reading.wait()
    await world.in_life(a, node.housekeeper.sync_facets())
    await asked
    a.disk.timing.miss = 0.0


async def _copied_from_what_lost(s: Script) -> None:
    """A facet is copied to from another one that lost a write, which only its next sync tells."""
    a, path = s.world.a, "/facets/v0.0"
    await s.write(0, 0, count=BLOCK)
    await s.facet("offline", "/facets/v0.1")
    a.disk.faults = Miswrites(path, Fault(Kind.REFUSED))
    await s.write(0, 0, fua=True)
    await s.facet("online", "/facets/v0.1")
    await s.until(lambda node: node.volumes[0].facets[1].in_service)
    await s.until(lambda node: not node.volumes[0].facets[0].in_service)
    await s.read(0, 0, BLOCK)
    await s.facets_back()
    await s.in_sync()


async def _sent_from_what_lost(s: Script) -> None:
    """A resync reads from a facet that lost a write, which only its next sync tells."""
    a, path = s.world.a, "/facets/v0.0"
    s.link(up=False)
    for turn in range(13):
        await s.write(1, turn % 4 * BLOCK, count=BLOCK, pause=0.02)
    a.disk.faults = Miswrites(path, Fault(Kind.REFUSED))
    await s.write(0, 0)
    s.link(up=True)
    await s.in_sync()
    node = await s.primary()
    await s.world.in_life(a, node.housekeeper.sync_facets())
    await s.read(0, 0, 1)
    await s.facets_back()
    await s.in_sync()


async def _failed_and_compared(s: Script) -> None:
    """A sync of one of two facets fails, and what it should have made durable is in the page cache
    only. A person has all of it compared, and the power fails when it is back."""
    a = s.world.a
    await s.write(0, 0)
    loses(a, "/facets/v0.0")
    await s.write(0, 0, fua=True)
    await s.until(lambda node: len(node.volumes[0].in_service()) == 1)
    a.disk.faults = None
    await s.facet("replace", "/facets/v0.0")
    await s.facets_back()
    await released(s, a)
    await power_loss(s, a)
    await s.read(0, 0, 1)
    await s.in_sync()


async def _cleared_and_failed(s: Script) -> None:
    """A sync of one of two facets fails that should have made a clearing durable: the hole is in
    its page cache only. It gets what it lacks, in the same boot, where the other has a hole too;
    and the power fails when it is back, and nothing active."""
    a, regions = s.world.a, range(0, 4 * BLOCK, BLOCK)
    await s.write(0, *regions, count=BLOCK)
    await s.in_sync()
    await released(s, a)
    loses(a, "/facets/v0.1")
    for first in regions:
        await s.clear(0, first, BLOCK, "trim")
    node = await s.primary()
    await s.world.in_life(a, node.housekeeper.sync_facets())
    await s.until(lambda node: len(node.volumes[0].in_service()) == 1)
    a.disk.faults = None
    await s.facets_back()
    await alike_without_power(s)


async def _compared_and_killed(s: Script) -> None:
    """All of a facet is compared, and what differed is written, or cleared; its sync fails, and the
    process dies before that is noted. What is in the page cache does not count as equal then."""
    a, path = s.world.a, "/facets/v0.1"
    await s.write(0, 0, 2 * BLOCK, count=BLOCK)
    await s.facet("offline", path)
    await s.write(0, 0, count=BLOCK)
    await s.clear(0, 2 * BLOCK, BLOCK, "trim")
    await full_log(s)
    await s.in_sync()
    await released(s, a)
    returns, (_, facet) = moment(s, a, "facet-returns"), (await s.primary()).volumes[0].facets
    died = dies_of(s, a, facet)
    a.disk.faults = strikes("sync", path, Fault(Kind.LOSE), asyncio.Event(), returns.is_set)
    await s.facet("replace", path)
    await died.wait()
    await s.world.start(a)
    await s.facets_back()
    await alike_without_power(s)


async def _stopped_and_clearing(s: Script) -> None:
    """A request takes longer than a stop waits for: it is in the log, and in one facet of two."""
    a, seconds = s.world.a, STOP_SECONDS + 10.0
    await s.write(0, 0, count=BLOCK)
    punching = slow(a, "punch", "/facets/v0.0", seconds)
    s.world.spawn(s.clear(0, 0, BLOCK, "trim"))
    await punching.wait()
    await s.stop(a)
    await asyncio.sleep(2 * seconds)
    await s.world.start(a)
    await s.read(0, 0, BLOCK)
    await s.in_sync()


async def _stopped_and_cleared(s: Script) -> None:
    """A request takes a little longer than a stop waits for: it has come into the facets when the
    stop is through, and after its syncs of them. Then power fails."""
    a, began = s.world.a, s.world.loop.time()
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    punching = slow(a, "punch", "/facets/v0.0", STOP_SECONDS + SLOW_SECONDS / 2)
    s.world.spawn(s.clear(0, 0, BLOCK, "trim"))
    await punching.wait()
    slow(a, "sync", "/state/superblock", when=lambda: s.world.loop.time() > began + STOP_SECONDS)
    await s.stop(a)
    await power_loss(s, a)
    await s.read(0, 0, BLOCK)
    await s.in_sync()


async def _stopped_and_waiting(s: Script) -> None:
    """The log is full, for a facet's disk hangs for longer than a stop waits for requests: those
    that wait for room then do so until the stop gives some back. Afterwards power fails."""
    a, seconds = s.world.a, STOP_SECONDS + 15.0
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    syncing = slow(a, "sync", "/facets/v0.0", seconds)
    for turn in range(14):
        s.world.spawn(s.write(0, (1 + turn % 8) * BLOCK, count=BLOCK))
    await syncing.wait()
    await s.stop(a)
    s.power_cut(a)
    await s.world.start(a)
    await s.read(0, 0, 9 * BLOCK)
    await s.in_sync()


async def _cleared_unnoted(s: Script) -> None:
    """A client sees a facet fail, and before that is durable a range is cleared, in the other facet
    only. The log is in memory, so no redo comes by; and the process dies."""
    a, path = s.world.a, "/facets/v0.0"
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    saving = slow(a, "sync", "/state/superblock")
    s.world.spawn(s.facet("offline", "/facets/v1.1"))
    await saving.wait()
    s.spoil(path)
    s.world.spawn(s.write(0, FAR))
    await asyncio.sleep(SLOW_SECONDS / 3)
    s.world.spawn(s.clear(0, 0, BLOCK, "trim"))
    await asyncio.sleep(SLOW_SECONDS / 3)
    s.mend(path)
    await killed(s, a)
    await s.read(0, 0, BLOCK)
    await s.facet("online", "/facets/v1.1")
    await s.facets_back()
    await s.in_sync()


FAILED_AT_START = directed(_failed_at_start, spill=8 * KIB, facets=2, last_facet=True)
HURRIED = directed(_hurried, last_facet=True)
HURRIED_UNNOTED = directed(_hurried_unnoted, last_facet=True)
FAILED_AND_COMPARED = directed(_failed_and_compared, facets=2)
DISTRUSTED = directed(_distrusted, facets=2)
REMOVED_WHILE_SYNCED = directed(_removed_while_synced, facets=2)
ASKED_FOR_TWICE = directed(_asked_for_twice, facets=2)
ADDED_AND_FAILED = directed(_added_and_failed, facets=2)
READ_AND_FAILED = directed(_read_and_failed, facets=2)
COPIED_FROM_WHAT_LOST = directed(_copied_from_what_lost, facets=2)
SENT_FROM_WHAT_LOST = directed(_sent_from_what_lost, facets=2)
CLEARED_AND_FAILED = directed(_cleared_and_failed, facets=2)
COMPARED_AND_KILLED = directed(_compared_and_killed, facets=2)
STOPPED_AND_CLEARING = directed(_stopped_and_clearing, facets=2)
STOPPED_AND_CLEARED = directed(_stopped_and_cleared, facets=2)
STOPPED_AND_WAITING = directed(_stopped_and_waiting, facets=2)
CLEARED_UNNOTED = directed(_cleared_unnoted, spill=8 * KIB, facets=2)
