"""What is played for mutants of which drawn runs see nothing (``tests.sim.directed``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from nbdmirror.engine.node import Node
from tests.sim.directed import directed
from tests.sim.faults import AllLost, Fault, Injector, Kind, Miswrites
from tests.sim.host import Host
from tests.sim.options import KIB
from tests.sim.oracle import Violation
from tests.sim.script import BLOCK, OPTIONS, POLL_S, Script

PUNCH_SECONDS = 3.0
HOLES = 4
"""Regions."""
FAR = 184
"""A cell of volume 0 in an extent that does not come along with the first ones."""


def strikes(operation: str, path: str, fault: Fault, struck: Callable[[], None]) -> Injector:
    """The first such operation on a file has a fault; ``struck`` is called with it."""
    left = [fault]

    def inject(name: str, where: str, nth: int) -> Fault | None:
        if not left or name != operation or not where.startswith(path):
            return None
        struck()
        return left.pop()

    return inject


async def _cleared(s: Script) -> None:
    """Regions that the secondary has, in a snapshot too, are cleared while its link is down."""
    await s.write(0, *range(0, HOLES * BLOCK, BLOCK), count=BLOCK)
    await s.snapshot()
    await s.in_sync()
    s.link(up=False)
    for turn in range(13):  # until the log is full: what is cleared then travels as holes
        await s.write(1, turn % 4 * BLOCK, count=BLOCK, pause=0.02)
    await s.clear(0, 0, HOLES * BLOCK, "trim")


async def _punched(s: Script) -> None:
    """A link is lost while the secondary punches a hole, for seconds and in a thread: what the next
    session copies there must not be under it in the end (I2, F1)."""
    (secondary,) = s.world.remotes
    await _cleared(s)
    punching = asyncio.Event()
    slow = Fault(Kind.STALL, seconds=PUNCH_SECONDS)
    secondary.disk.faults = strikes("punch", "/facets", slow, punching.set)
    s.link(up=True)
    await punching.wait()
    s.world.net.reset("a", "b")
    await s.write(0, *range(0, HOLES * BLOCK, BLOCK), count=1)
    await asyncio.sleep(2 * PUNCH_SECONDS)
    await s.in_sync()


async def _consistent_and_dead(s: Script) -> None:
    """A secondary dies as it has become consistent, with the image from before the resync still
    there, and no primary comes by it any more: at its start it lets go of that."""
    world = s.world
    (b,) = world.remotes
    dead = asyncio.Event()

    async def die() -> None:
        s.link(up=False)
        s.kill(b)
        dead.set()

    def moment(host: Host, kind: str) -> None:
        if host is b and kind == "consistent" and not dead.is_set():
            world.spawn(die())

    await _cleared(s)
    world.on_moment.append(moment)
    s.link(up=True)
    await dead.wait()
    await world.start(b)
    while b.node is not None and any(e["kind"] == "resync" for e in b.node.snapshots.usable()):
        await asyncio.sleep(POLL_S)
    s.link(up=True)
    await s.in_sync()


async def _filled_twice(s: Script) -> None:
    """Two fill a map at the same time, and the one who began is cancelled: the other's word holds,
    and changes are marked."""
    node = await s.primary()
    assert node.primary is not None
    (remote,) = node.primary.remotes
    syncing = asyncio.Event()
    slow = Fault(Kind.STALL, seconds=1.0)
    s.world.a.disk.faults = strikes("sync", "/state/dcm", slow, syncing.set)

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


async def _failed_at_start(s: Script) -> None:
    """A log that was on disk for want of a facet is to be in memory again, and the process died. So
    the start syncs what it redid, and one of two facets cannot be. The node goes on with the other,
    and says so durably."""
    world, a = s.world, s.world.a
    for path in ("/facets/v1.0", "/facets/v1.1"):
        s.spoil(path)
    await s.write(1, 0)
    await s.until(lambda node: bool(node.status()["log"]["spill"]["on_disk"]))
    await s.write(0, 0, count=BLOCK)
    s.kill(a)
    for path in ("/facets/v1.0", "/facets/v1.1"):
        s.mend(path)
    a.disk.faults = strikes("sync", "/facets/v0.1", Fault(Kind.LOSE), lambda: None)
    await world.start(a)
    a.disk.faults = None
    await s.up(a)
    node = await s.primary()
    if len(node.volumes[0].in_service()) != 1:
        raise Violation("the start did not come by the facet")
    await s.write(0, 0, fua=True)
    world.power_cut(a, AllLost())
    await world.start(a)
    await s.facets_back()
    await s.in_sync()


async def _hurried(s: Script) -> None:
    """The only facet of a volume is lost, and the log that it would come back from is full, so it
    comes back from it at once. In the middle of that somebody puts another disk in its place."""
    path, disk = "/facets/v0.0", s.world.a.disk
    s.spoil(path)
    await s.write(0, 0)
    await s.until(lambda node: not node.volumes[0].in_service())
    s.mend(path)
    syncing = asyncio.Event()
    slow = Fault(Kind.STALL, seconds=PUNCH_SECONDS)
    disk.faults = strikes("sync", path, slow, syncing.set)
    while not syncing.is_set():
        await s.write(0, BLOCK, count=BLOCK)
    disk.unlink(path)
    disk.open(path, create=True).truncate(s.world.options.sizes[0])
    await s.facet("replace", path)
    await s.write(0, FAR)
    await asyncio.sleep(PUNCH_SECONDS)
    await s.facets_back()
    await s.read(0, 0, 2 * BLOCK)
    await s.in_sync()


async def without_log(s: Script) -> None:
    """The log goes on in memory, for its disk is lost."""
    s.spoil("/state/log")
    await s.write(0, 40, fua=True)
    await s.until(lambda node: bool(node.status()["log"]["in_memory"]))


async def _outlived(s: Script) -> None:
    """The log goes on in memory, two snapshots are taken, one of which the remote gets, and the
    process dies: the snapshots are there, their records are not."""
    world = s.world
    await without_log(s)
    await s.write(0, 0)
    await s.snapshot()
    await s.in_sync()
    s.link(up=False)
    await s.write(0, 0)
    await s.snapshot()
    s.kill(world.a)
    await world.start(world.a)
    s.link(up=True)
    await s.in_sync()


async def _cleared_late(s: Script) -> None:
    """A snapshot is taken behind a clearing that is in the log, and not in the facet yet; and the
    region is written to."""
    await s.write(0, 0, count=BLOCK)
    punching = asyncio.Event()
    slow = Fault(Kind.STALL, seconds=PUNCH_SECONDS)
    s.world.a.disk.faults = strikes("punch", "/facets", slow, punching.set)
    s.world.spawn(s.clear(0, 0, BLOCK // 2, "trim"))
    await punching.wait()
    await s.snapshot()
    await s.write(0, BLOCK - 1)
    await asyncio.sleep(PUNCH_SECONDS)


async def _deleted_there(s: Script) -> None:
    """A secondary that has followed a snapshot has it no more when its process dies: redo comes by
    the marker again, and not by what the snapshot had held."""
    (b,) = s.world.remotes
    await s.write(0, 0)
    for _ in range(6):  # more than half of its log: it is released
        await s.write(1, 0, count=BLOCK)
    assert b.node is not None
    while b.node.log.ring.tail_seq < b.node.log.next_seq:
        await asyncio.sleep(POLL_S)
    uuid = await s.snapshot()
    await s.write(0, 0)
    await s.in_sync()
    await s.delete(uuid, b)
    s.kill(b)
    await s.world.start(b)
    await s.in_sync()


async def _restored(s: Script) -> None:
    """The process dies when a restore is complete, and not copied yet."""
    await s.write(0, 0, 30, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, 0, 30, count=BLOCK)
    await s.restore(uuid)
    s.kill(s.world.a)
    await s.world.start(s.world.a)
    await s.write(0, 0)


async def _restored_and_written(s: Script) -> None:
    """A region that is restored is written to, and that flushed, as the map of what is left to copy
    is being made durable; then power fails."""
    world, a = s.world, s.world.a
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, 0, count=BLOCK)
    await s.restore(uuid)
    clearing = asyncio.Event()
    slow = Fault(Kind.STALL, seconds=PUNCH_SECONDS)
    a.disk.faults = strikes("sync", "/state/restore", slow, clearing.set)
    await clearing.wait()
    world.spawn(s.write(0, 0))
    await asyncio.sleep(PUNCH_SECONDS / 3)
    await s.flush()
    world.power_cut(a, AllLost())
    await world.start(a)
    await s.in_sync()
    await s.read(0, 0, 1)


async def _restored_without_log(s: Script) -> None:
    """... and the log was in memory: the mark of the restore is gone with it."""
    await without_log(s)
    await _restored(s)


async def _ahead(s: Script) -> None:
    """The remote has more than the primary, which loses power, and writes before the two meet."""
    world = s.world
    await s.write(0, 0, fua=True)
    await s.in_sync()
    slow = Fault(Kind.STALL, seconds=60.0)
    world.a.disk.faults = strikes("sync", "/state/log", slow, lambda: None)
    await s.write(0, 0)
    await s.until(_all_is_there)
    s.link(up=False)
    world.power_cut(world.a, AllLost())
    world.a.disk.faults = None
    await world.start(world.a)
    await s.write(0, FAR)
    s.link(up=True)
    await s.in_sync()


async def _lost_in_part(s: Script) -> None:
    """A secondary loses its power, and some of the records that its log had not synced, with later
    ones there; it recovers, and its process dies before it gets anything new."""
    world = s.world
    (b,) = world.remotes
    slow = Fault(Kind.STALL, seconds=60.0)
    b.disk.faults = strikes("sync", "/state/log", slow, lambda: None)
    for _ in range(BLOCK):
        await s.write(0, 0)
    await s.until(_all_is_received)
    s.link(up=False)
    world.power_cut(b)
    b.disk.faults = None
    await world.start(b)
    s.kill(b)
    await world.start(b)
    s.link(up=True)
    await s.in_sync()


def _all_is_received(node: Node) -> bool:
    assert node.primary is not None
    return node.primary.remotes[0].received_seq == node.log.next_seq - 1


async def _stood_in_ahead(s: Script) -> None:
    """A volume without a facet: the log loses, with the power, what the remote that stands in has;
    then the facet is back, for which the log holds all but that."""
    world, path = s.world, "/facets/v0.0"
    s.spoil(path)
    await s.write(0, 0)
    await s.until(lambda node: not node.volumes[0].in_service())
    await s.write(0, 0, fua=True)
    slow = Fault(Kind.STALL, seconds=60.0)
    world.a.disk.faults = strikes("sync", "/state/log", slow, lambda: None)
    await s.write(0, 0)
    await s.until(_all_is_there)
    world.power_cut(world.a, AllLost())
    world.a.disk.faults = None
    await world.start(world.a)
    await s.in_sync()
    await s.read(0, 0, 1)
    s.mend(path)
    await s.facet("online", path)
    await s.facets_back()
    await s.read(0, 0, 1)


def _all_is_there(node: Node) -> bool:
    assert node.primary is not None
    return node.primary.remotes[0].durable_seq == node.log.next_seq - 1


async def _past_twice(s: Script) -> None:
    """A log in memory has a record in its file whose block was written again since; the process
    dies, the log is on disk from then on, and the process dies again."""
    world, a = s.world, s.world.a
    s.link(up=False)
    await s.write(0, 0)
    for turn in range(4):  # the oldest goes to the file
        await s.write(0, (turn + 1) * BLOCK, count=BLOCK)
    await s.write(0, 0)
    s.kill(a)
    log = replace(a.config.log, mode="disk", spill_threshold=0)
    a.config = replace(a.config, log=log)
    await world.start(a)
    s.kill(a)
    await world.start(a)
    s.link(up=True)


async def _far_behind(s: Script) -> None:
    """A remote comes back to a log in memory that had to write out what is to be sent to it."""
    s.link(up=False)
    for turn in range(7):
        await s.write(0, turn * BLOCK, count=BLOCK)
    s.link(up=True)
    await s.in_sync()


async def _left(s: Script) -> None:
    """One of two facets loses what it was to make durable, the log in memory has nothing of that
    any more, and the extent leaves the active map before the facet is back; then power fails."""
    world, a = s.world, s.world.a
    await s.write(0, 0, count=BLOCK)
    await s.until(lambda node: node.log.ring.tail_seq == node.log.next_seq)
    a.disk.faults = strikes("sync", "/facets/v0.1", Fault(Kind.LOSE), lambda: None)
    await s.flush()
    await s.until(lambda node: len(node.volumes[0].in_service()) == 1)
    for first in range(2 * BLOCK, 192, BLOCK):
        await s.write(0, first, count=BLOCK)
        await s.until(_all_is_there)
    await s.facets_back()
    world.power_cut(a, AllLost())
    await world.start(a)


async def _in_memory_again(s: Script) -> None:
    """The only facet of a volume is lost, and comes back: the log is on disk, and in memory again,
    when the process dies."""
    world, path = s.world, "/facets/v0.0"
    s.spoil(path)
    await s.write(0, 0)
    await s.until(lambda node: node.status()["log"]["spill"]["on_disk"])
    s.mend(path)
    await s.facet("online", path)
    await s.facets_back()
    await s.until(lambda node: not node.status()["log"]["spill"]["on_disk"])
    await s.write(0, 0)
    s.kill(world.a)
    await world.start(world.a)


async def _on_disk(s: Script) -> None:
    """A volume loses its only facet while another has what no sync has reached and the log has no
    more; what is flushed then is durable, whatever the power does."""
    world = s.world
    await s.write(1, 0)
    await s.until(lambda node: node.log.ring.durable_tail == node.log.ring.head)
    s.spoil("/facets/v0.0")
    await s.write(0, 0)
    await s.until(lambda node: node.status()["log"]["spill"]["on_disk"])
    await s.flush()
    world.power_cut(world.a, AllLost())
    await world.start(world.a)


async def _holes_revert(s: Script) -> None:
    """A resync punches holes at the secondary, and the sync after that loses them: they are there
    in the page cache only when the next one looks, and then power fails."""
    world = s.world
    (b,) = world.remotes
    await _cleared(s)
    punched, lost = asyncio.Event(), asyncio.Event()
    lose = strikes("sync", "/facets/v0", Fault(Kind.LOSE), lost.set)

    def inject(operation: str, path: str, nth: int) -> Fault | None:
        if operation == "punch":
            punched.set()
        return lose(operation, path, nth) if punched.is_set() else None

    b.disk.faults, life = inject, b.life
    s.link(up=True)
    await lost.wait()
    while b.alive and b.life is life:
        await asyncio.sleep(POLL_S)
    await s.up(b)
    await s.in_sync()
    world.power_cut(b, AllLost())
    await world.start(b)
    await s.write(1, 0)  # the primary sees that the link is gone
    await s.in_sync()


async def _log_reverts(s: Script) -> None:
    """The process dies; at the next start a sync of the log fails, and it has lost what was not
    durable, as the facets have not."""
    world, a = s.world, s.world.a
    await s.write(0, 0, fua=True)
    for _ in range(BLOCK):
        await s.write(0, 0, pause=0.0)
    s.kill(a)
    a.disk.faults = strikes("sync", "/state/log", Fault(Kind.LOSE), lambda: None)
    await world.start(a)
    a.disk.faults = None
    while not a.alive:
        await world.start(a)
        await asyncio.sleep(POLL_S)


async def _last_of_two(s: Script) -> None:
    """The log is in memory, and one of two facets is lost; then the other, which had got more by
    then, while no remote has all of that; and the process dies."""
    a = s.world.a
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
    s.kill(a)
    await s.world.start(a)
    s.link(up=True)


async def _rotten_and_stopped(s: Script) -> None:
    """A record that a remote needs is not in the log, so its map is filled; the node is stopped
    before that is durable."""
    world, a = s.world, s.world.a
    world.astray_on = a
    filling = asyncio.Event()
    lost = Miswrites("/state/log", Fault(Kind.DROP))
    slow = Fault(Kind.STALL, seconds=PUNCH_SECONDS)
    stalls = strikes("sync", "/state/dcm", slow, filling.set)
    a.disk.faults = lambda *operation: lost(*operation) or stalls(*operation)
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
    s.kill(a)
    await world.start(a)
    s.link(up=True)
    await s.in_sync()
    for extent in range(1, 90):
        await s.write(0, 2 * extent)
    world.power_cut(a, AllLost())
    await world.start(a)
    await s.in_sync()
    world.astray_on = None


PUNCHED = directed(_punched)
CONSISTENT_AND_DEAD = directed(_consistent_and_dead)
FAILED_AT_START = directed(_failed_at_start, spill=8 * KIB, facets=2, last_facet=True)
HURRIED = directed(_hurried, last_facet=True)
FILLED_TWICE = directed(_filled_twice)
OUTLIVED = directed(_outlived)
CLEARED_LATE = directed(_cleared_late)
DELETED_THERE = directed(_deleted_there)
RESTORED = directed(_restored)
RESTORED_AND_WRITTEN = directed(_restored_and_written)
RESTORED_WITHOUT_LOG = directed(_restored_without_log)
LOST_IN_PART = directed(_lost_in_part)
AHEAD = directed(_ahead)
STOOD_IN_AHEAD = directed(_stood_in_ahead, last_facet=True)
PAST_TWICE = directed(_past_twice, spill=8 * KIB)
FAR_BEHIND = directed(_far_behind, spill=8 * KIB)
LAST_OF_TWO = directed(_last_of_two, facets=2, last_facet=True)
ROTTEN_AND_STOPPED = directed(
    _rotten_and_stopped, constants={**OPTIONS.constants, "engine.log.RECENT_BYTES_MAX": 1}
)
ONLY_IN_THE_CACHE = directed(_only_in_the_cache, log_size=260 * KIB, remote_log_size=260 * KIB)
LEFT = directed(_left, spill=8 * KIB, facets=2, log_size=260 * KIB, remote_log_size=260 * KIB)
IN_MEMORY_AGAIN = directed(_in_memory_again, spill=8 * KIB, last_facet=True)
ON_DISK = directed(_on_disk, spill=8 * KIB, last_facet=True)
HOLES_REVERT = directed(_holes_revert)
LOG_REVERTS = directed(_log_reverts)
