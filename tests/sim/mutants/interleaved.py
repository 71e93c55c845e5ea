"""Plays in which two of a primary's own tasks come between each other, and mutants that let them.

Each is one sequence of events that drawn runs come by once in millions: somebody acts upon what
another has changed, or is about to, while that one waits for a disk.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

from nbdmirror.codec.mappage import SLOTS
from nbdmirror.engine import facets
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.facetcommands import FacetCommands
from nbdmirror.engine.facetmember import Member
from nbdmirror.engine.facets import RETRY_SECONDS, Facets
from nbdmirror.engine.housekeeper import HIGH_WATER, Housekeeper
from nbdmirror.engine.log import Log
from nbdmirror.engine.logloss import LogKeeper
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.node import STOP_SECONDS, Node
from nbdmirror.engine.primary import Primary
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.rescue import REACH_SECONDS, Rescue
from nbdmirror.engine.session import Session
from nbdmirror.engine.spill import Spill
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import FormatError
from nbdmirror.ports import Buffer
from tests.sim.directed import directed
from tests.sim.disk import SimDisk
from tests.sim.faults import AllLost, Fault, Injector, Kind, Miswrites
from tests.sim.file import SimFile
from tests.sim.host import Host
from tests.sim.mutants.plays import FAR, PUNCH_SECONDS, strikes, without_log
from tests.sim.mutation import Assign, mutant
from tests.sim.options import KIB
from tests.sim.oracle import Violation
from tests.sim.script import BLOCK, OPTIONS, Script

HOT = SLOTS
"""Extents that can be active."""
SLOW = Fault(Kind.STALL, seconds=PUNCH_SECONDS)


def _moment(s: Script, host: Host, kind: str) -> asyncio.Event:
    """Set in the step in which the node tells of it."""
    came = asyncio.Event()

    def told(who: Host, what: str) -> None:
        if who is host and what == kind:
            came.set()

    s.world.on_moment.append(told)
    return came


def _struck_at(s: Script, host: Host, kind: str, operation: str, path: str) -> asyncio.Event:
    """The first such operation after the node has told of something takes long: set then."""
    began = asyncio.Event()

    def told(who: Host, what: str) -> None:
        if who is host and what == kind:
            host.disk.faults = strikes(operation, path, SLOW, began.set)

    s.world.on_moment.append(told)
    return began


async def _within(event: asyncio.Event, seconds: float = 60.0) -> bool:
    """Whether it came: on a product that holds, some of what is played does not happen."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def _moved_and_lost(s: Script) -> None:
    """The disk of the log fails while a person moves the log: it stays where that one has put it,
    and what is flushed there is durable."""
    a = s.world.a
    making = asyncio.Event()
    a.disk.faults = strikes("allocate", "/state/moved", SLOW, making.set)
    saving = _struck_at(s, a, "log-lost", "sync", "/state/superblock")
    moved = _moment(s, a, "log-moved")
    s.world.spawn(s.replace_log("/state/moved"))
    await making.wait()
    s.spoil("/state/log")
    s.world.spawn(s.write(0, 0))
    await moved.wait()
    await _within(saving, 1.0)
    await s.write(0, 0)
    await asyncio.sleep(2 * PUNCH_SECONDS)
    await s.flush()
    s.world.power_cut(a, AllLost())
    s.mend("/state/log")
    await s.world.start(a)


async def _rotten_in_a_resync(s: Script) -> None:
    """A record that a remote needs is not in the log while a resync is under way in order: as its
    map is filled, nothing of it is cleared that the records behind would be needed for."""
    world, a = s.world, s.world.a
    (b,) = world.remotes
    world.astray_on = a
    node = await s.primary()
    assert node.primary is not None
    (remote,) = node.primary.remotes
    s.link(up=False)
    while not remote.tracking:
        await s.write(1, 0, count=BLOCK, pause=0.02)
    await s.until(lambda node: remote.marked_seq is None and node.log.ring.used == 0)
    filling = asyncio.Event()
    placing = _struck_at(s, b, "snapshot", "sync", "/facets")
    s.link(up=True)
    await placing.wait()
    assert not remote.tracking and remote.dirty_regions
    lost = Miswrites("/state/log", Fault(Kind.DROP))
    stalls = strikes(
        "sync", "/state/dcm", Fault(Kind.STALL, seconds=4 * PUNCH_SECONDS), filling.set
    )
    a.disk.faults = lambda *operation: lost(*operation) or stalls(*operation)
    await s.write(0, 0)
    await filling.wait()
    await asyncio.sleep(2 * PUNCH_SECONDS)
    await s.write(0, FAR)
    await asyncio.sleep(3 * PUNCH_SECONDS)
    await s.in_sync()
    world.astray_on = None


async def _another_disk(s: Script, path: str) -> None:
    """A person puts a new disk in the place of a facet's."""
    disk, size = s.world.a.disk, s.world.options.sizes[0]
    disk.unlink(path)
    file = disk.open(path, create=True)
    file.truncate(size)
    await file.sync()
    await disk.sync_directory("/facets")
    file.close()


async def _distrusted(s: Script) -> None:
    """A facet that has a map comes back with another disk. Until it is durable that nothing is
    known of that one, nothing says that it is the one that the map is of; and power fails."""
    world, a, path = s.world, s.world.a, "/facets/v0.1"
    await s.write(0, *range(0, 64, BLOCK), count=BLOCK)
    await s.in_sync()
    await s.stop(a)  # then nothing is active any more
    await world.start(a)
    retried = _moment(s, a, "facet-retry")
    s.spoil(path)
    await s.write(0, FAR)
    await retried.wait()
    s.mend(path)
    await _another_disk(s, path)
    filling = asyncio.Event()
    a.disk.faults = strikes("sync", "/state/dcm/@", SLOW, filling.set)
    world.spawn(s.facet("online", path))
    await filling.wait()
    await s.pause(on=True)
    world.power_cut(a, AllLost())
    a.disk.faults = None
    await world.start(a)
    await s.pause(on=False)
    await s.facets_back()


async def _forced_out(s: Script, forced: asyncio.Event) -> None:
    """A remote is away, and clients write until it is to be forced out; nobody waits for that."""
    log = (await s.primary()).log
    while log.ring.used <= HIGH_WATER * log.capacity:
        await s.write(0, 0, count=BLOCK)
    await forced.wait()


async def _let_go_too_soon(s: Script) -> None:
    """A remote is being forced out of a log in memory, and not all is in its map yet, when extents
    are to leave the active map; then power fails."""
    world, a = s.world, s.world.a
    await without_log(s)
    s.link(up=False)
    for extent in (*range(HOT - 1), FAR // 2):  # as many as can be active
        await s.write(0, 2 * extent)
    saving = _struck_at(s, a, "overflow", "sync", "/state/superblock")
    await _forced_out(s, saving)
    world.spawn(s.write(0, FAR - 10))
    await asyncio.sleep(PUNCH_SECONDS / 3)
    confirming = asyncio.Event()
    a.disk.faults = strikes("sync", "/state/dcm", SLOW, confirming.set)
    await confirming.wait()
    await asyncio.sleep(PUNCH_SECONDS / 2)
    world.power_cut(a, AllLost())
    s.mend("/state/log")
    a.disk.faults = None
    await world.start(a)
    s.link(up=True)
    await s.in_sync()


async def _stopped_and_forced_out(s: Script) -> None:
    """A remote is being forced out of a log in memory when the node is stopped."""
    world, a = s.world, s.world.a
    await without_log(s)
    s.link(up=False)
    saving = _struck_at(s, a, "overflow", "sync", "/state/superblock")
    await _forced_out(s, saving)
    await s.stop(a)
    s.mend("/state/log")
    a.disk.faults = None
    await world.start(a)
    s.link(up=True)
    await s.in_sync()


async def _back_and_flushed(s: Script) -> None:
    """A volume's only facet comes back from a log in memory while the remote that stood in for it
    is away; what is flushed before it is durable that it is back is not lost with the power."""
    world, a, path = s.world, s.world.a, "/facets/v0.0"
    await without_log(s)
    s.spoil(path)
    await s.write(0, 0)
    await s.until(lambda node: not node.volumes[0].in_service())
    await s.flush()
    await asyncio.sleep(1.0)
    s.mend(path)
    saving = _struck_at(s, a, "facet-returns", "sync", "/state/superblock")
    world.spawn(s.facet("online", path))
    await saving.wait()
    s.link(up=False)
    await s.write(0, 0)
    flushing = world.spawn(s.flush())
    await asyncio.sleep(PUNCH_SECONDS / 3)
    world.power_cut(a, AllLost())
    s.mend("/state/log")
    a.disk.faults = None
    await world.start(a)
    s.link(up=True)
    await s.in_sync()
    await s.read(0, 0, 1)
    flushing.cancel()


def _when(condition: Callable[[], bool], began: asyncio.Event) -> Injector:
    """The first sync of the superblock that says so takes long."""

    def inject(operation: str, path: str, nth: int) -> Fault | None:
        if operation != "sync" or path != "/state/superblock" or began.is_set() or not condition():
            return None
        began.set()
        return SLOW

    return inject


def _entry(node: Node, volume: int, facet: int) -> dict[str, Any]:
    entry: dict[str, Any] = node.store.state["volumes"][volume]["facets"][facet]
    return entry


async def _passed_and_flushed(s: Script) -> None:
    """A remote has all that a volume's last facet had, so the volume is to come back from there:
    what is flushed with that waits until it is durable."""
    world, a, path = s.world, s.world.a, "/facets/v0.0"
    await without_log(s)
    s.link(up=False)
    s.spoil(path)
    await s.write(0, 0)
    await s.until(lambda node: not node.volumes[0].in_service())
    entry, passing = _entry(await s.primary(), 0, 0), asyncio.Event()
    a.disk.faults = _when(lambda: not entry["last"], passing)
    s.link(up=True)
    await passing.wait()
    await s.write(0, 0)
    world.spawn(s.flush())
    await asyncio.sleep(PUNCH_SECONDS / 3)
    world.power_cut(a, AllLost())
    s.mend("/state/log")
    s.mend(path)
    a.disk.faults = None
    await world.start(a)
    await s.in_sync()
    await s.read(0, 0, 1)


async def _unspilled_too_soon(s: Script) -> None:
    """A volume's last facet fails as another volume's is back: what is flushed then is not taken
    for durable in the log before the superblock says that the log is on disk."""
    world, a, path = s.world, s.world.a, "/facets/v0.0"
    await s.facet("offline", "/facets/v0.1")
    await s.facet("offline", "/facets/v1.1")
    await s.write(1, 0)
    entry, back = _entry(await s.primary(), 1, 1), asyncio.Event()
    a.disk.faults = _when(lambda: entry["state"] == "synchronised", back)
    await s.facet("online", "/facets/v1.1")
    await back.wait()
    await s.write(0, 0)
    noting = asyncio.Event()
    a.disk.faults = strikes("sync", "/state/superblock", SLOW, noting.set)
    s.spoil(path)
    world.spawn(s.write(0, FAR))
    await noting.wait()
    s.mend(path)
    world.spawn(s.flush())
    await asyncio.sleep(PUNCH_SECONDS / 3)
    world.power_cut(a, AllLost())
    a.disk.faults = None
    await world.start(a)
    await s.in_sync()


async def _served(s: Script, first: int, count: int) -> None:
    try:
        await s.write(0, first, count=count)
    except AssertionError as error:
        raise Violation("a facet that takes writes has no file") from error


async def _hurried_unnoted(s: Script) -> None:
    """A volume's only facet fails, and the log is full before that is durable: it comes back from
    the log only afterwards."""
    path = "/facets/v0.0"
    (b,) = s.world.remotes
    for _ in range(3):
        await s.write(0, 0)
    await s.in_sync()  # the remote has more than the facet has been synced for, but not all
    b.disk.faults = strikes("sync", "/state/log", Fault(Kind.STALL, seconds=8.0), lambda: None)
    await s.write(0, 0)
    saving = asyncio.Event()
    s.world.a.disk.faults = strikes("sync", "/state/superblock", SLOW, saving.set)
    s.spoil(path)
    s.world.spawn(s.write(0, 0))
    await saving.wait()
    s.mend(path)
    for turn in range(20):
        s.world.spawn(_served(s, turn * BLOCK, BLOCK))
        await asyncio.sleep(0.002)
    await asyncio.sleep(PUNCH_SECONDS / 2)
    await s.read(0, 0, 20 * BLOCK)
    await asyncio.sleep(2 * PUNCH_SECONDS)
    await _served(s, 1, 1)
    await s.read(0, 0, 20 * BLOCK)
    await s.facets_back()
    await s.in_sync()


async def _add(s: Script, host: Host) -> None:
    node = await s.primary()
    assert node.primary is not None
    await s.world.in_life(s.world.a, node.primary.add(host.name, f"tcp:{host.name}:7000", "async"))


async def _restored_and_removed(s: Script) -> None:
    """Of two remotes one is removed while a restore is marked in their maps: it is in the other's
    all the same."""
    b, _ = s.world.remotes
    await s.write(0, 0, count=BLOCK)
    uuid = await s.snapshot()
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    merging = asyncio.Event()
    told: list[str] = []

    def moment(host: Host, kind: str) -> None:
        if kind == "overflow":
            told.append(kind)
            if len(told) == 2:
                s.world.a.disk.faults = strikes("sync", "/state/dcm/b", SLOW, merging.set)

    s.world.on_moment.append(moment)
    s.world.spawn(s.restore(uuid))
    await merging.wait()
    await s.remote("remove", b)
    await asyncio.sleep(PUNCH_SECONDS)
    await _add(s, b)
    await s.in_sync()


async def _removed_while_synced(s: Script) -> None:
    """A facet is removed while a sync of it is under way, and that fails."""
    path = "/facets/v0.1"
    syncing = asyncio.Event()
    s.world.a.disk.faults = strikes("sync", path, SLOW, syncing.set)
    await s.write(0, 0)
    await syncing.wait()
    await s.facet("remove", path)
    await asyncio.sleep(PUNCH_SECONDS)
    for turn in range(40):
        await s.write(0, turn % 20 * BLOCK, count=BLOCK)
    await s.facet("add", path, "v0")
    await s.facets_back()


async def _added_while_moved(s: Script) -> None:
    """A remote is added while the log is moved: one session serves it, not two."""
    _, c = s.world.remotes
    await s.remote("remove", c)
    adding = asyncio.Event()
    s.world.a.disk.faults = strikes("sync", "/state/dcm/c", SLOW, adding.set)
    s.world.spawn(_add(s, c))
    await adding.wait()
    await s.replace_log("/state/moved")
    await asyncio.sleep(PUNCH_SECONDS)
    await s.in_sync()
    connected: list[str] = []
    s.world.on_moment.append(lambda host, kind: connected.append(kind))
    await asyncio.sleep(5.0)
    if "connected" in connected:
        raise Violation("two sessions take turns at a remote")


async def _last_taken(s: Script) -> None:
    """Of two facets one is taken out by a person, and the other one fails meanwhile."""
    syncing = asyncio.Event()
    s.world.a.disk.faults = strikes("sync", "/facets/v0.0", SLOW, syncing.set)
    await s.write(0, 0)
    s.world.spawn(s.facet("offline", "/facets/v0.0"))
    await syncing.wait()
    s.spoil("/facets/v0.1")
    await s.write(0, 0)
    await asyncio.sleep(PUNCH_SECONDS)
    node = await s.primary()
    if not node.volumes[0].in_service():
        raise Violation("a person has taken out the last facet (I8)")
    s.mend("/facets/v0.1")


async def _back_while_flushed(s: Script) -> None:
    """A flush waits for the remote that stands in for a volume's only facet, the log being in
    memory; that is away, but the facet comes back: it has all that the flush is for."""
    world, path = s.world, "/facets/v0.0"
    await without_log(s)
    s.spoil(path)
    await s.write(0, 0)
    await s.until(lambda node: not node.volumes[0].in_service())
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


def _claimed(disk: SimDisk) -> None:
    """A file is opened for writing by one at a time, as on a real disk."""
    opened, files = disk.open, dict[str, SimFile]()

    def open_(path: str, **how: bool) -> SimFile:
        if path in files and files[path]._open and files[path]._life.alive:
            raise BlockingIOError(errno.EAGAIN, "simulated: in use", path)
        file = files[path] = opened(path, **how)
        return file

    setattr(disk, "open", open_)  # noqa: B010


async def _asked_for_twice(s: Script) -> None:
    """A person asks for a facet whose map is just being made: it is made once."""
    a, path = s.world.a, "/facets/v0.1"
    _claimed(a.disk)
    s.spoil(path)
    await s.write(0, 0)
    s.mend(path)
    node, making = await s.primary(), asyncio.Event()
    a.disk.faults = strikes("sync", "/state/dcm/@", SLOW, making.set)
    await making.wait()
    await s.facet("online", path)
    await asyncio.sleep(2 * PUNCH_SECONDS)
    await s.facets_back()
    if a.node is not node:
        raise Violation("the node ended for a map that it had open itself")


async def _out_and_failed(s: Script) -> None:
    """A person takes out a facet of which a client has just seen that it failed: it is out until
    somebody brings it back."""
    path, saving = "/facets/v0.1", asyncio.Event()
    s.world.a.disk.faults = strikes("sync", "/state/superblock", SLOW, saving.set)
    s.spoil(path)
    s.world.spawn(s.write(0, 0))
    await saving.wait()
    s.mend(path)
    await s.facet("offline", path)
    await asyncio.sleep(3 * RETRY_SECONDS)
    node = await s.primary()
    if any(f.path == path and f.writable for f in node.volumes[0].facets):
        raise Violation("a facet that a person took out is back (M8)")


async def _stopped_and_clearing(s: Script) -> None:
    """A request takes longer than a stop waits for: it is in the log, and in one facet of two."""
    a = s.world.a
    await s.write(0, 0, count=BLOCK)
    punching = asyncio.Event()
    slow = Fault(Kind.STALL, seconds=STOP_SECONDS + 10.0)
    a.disk.faults = strikes("punch", "/facets/v0.0", slow, punching.set)
    s.world.spawn(s.clear(0, 0, BLOCK, "trim"))
    await punching.wait()
    await s.stop(a)
    await asyncio.sleep(2 * slow.seconds)
    await s.world.start(a)
    await s.read(0, 0, BLOCK)
    await s.in_sync()


async def _added_and_failed(s: Script) -> None:
    """A facet is added while another one of the volume fails: each has a map of its own."""
    a, path = s.world.a, "/facets/v0.1"
    _claimed(a.disk)
    adding = asyncio.Event()
    slow = Fault(Kind.STALL, seconds=2 * RETRY_SECONDS)
    a.disk.faults = strikes("sync", "/state/dcm/@", slow, adding.set)
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
    world, a = s.world, s.world.a
    await s.write(0, 0)
    node = await s.primary()
    reading = asyncio.Event()
    reads = strikes("read", "/facets/v0.0", SLOW, reading.set)
    syncs = strikes("sync", "/facets/v0.0", Fault(Kind.LOSE), lambda: None)
    a.disk.faults = lambda *operation: reads(*operation) or syncs(*operation)
    a.disk.timing.miss = 1.0  # nothing of what is read is in memory
    asked = world.spawn(s.read(0, 0, 1))
    await reading.wait()
    await world.in_life(a, node.housekeeper.sync_facets())
    await asked
    a.disk.timing.miss = 0.0


async def _consistent_and_cut(s: Script) -> None:
    """Power fails while a remote that has become consistent is noted down, and somebody else has
    saved the superblock meanwhile. The facet is lost with it: the remote holds the volume."""
    world, a, path = s.world, s.world.a, "/facets/v0.0"
    node = await s.primary()
    assert node.primary is not None
    (remote,) = node.primary.remotes
    await s.full_resync()
    mapping = asyncio.Event()
    syncs = strikes("sync", "/state/dcm/b", SLOW, mapping.set)
    a.disk.faults = lambda *operation: syncs(*operation) if remote.facts["consistent"] else None
    await mapping.wait()
    await world.in_life(a, node.store.save())
    world.power_cut(a, AllLost())
    a.disk.faults = None
    s.spoil(path)
    await world.start(a)
    await _reads_back(s)
    s.mend(path)
    await s.facets_back()
    await s.in_sync()


async def _reads_back(s: Script) -> None:
    """A remote that follows answers reads, after some time."""
    await s.until(
        lambda node: node.primary is not None and node.primary.remotes[0].link == "connected"
    )
    before = s.succeeded
    await s.read(0, 0, 1)
    if s.succeeded == before:
        raise Violation("nobody answers for a volume that a consistent remote has (M11)")


LARGE = {"log_size": 260 * KIB, "remote_log_size": 260 * KIB}
MOVED_AND_LOST = directed(_moved_and_lost)
ROTTEN_IN_A_RESYNC = directed(
    _rotten_in_a_resync,
    constants={**OPTIONS.constants, "engine.log.RECENT_BYTES_MAX": 1},
    **LARGE,
)
DISTRUSTED = directed(_distrusted, facets=2)
LET_GO_TOO_SOON = directed(_let_go_too_soon, **LARGE)
STOPPED_AND_FORCED_OUT = directed(_stopped_and_forced_out, **LARGE)
BACK_AND_FLUSHED = directed(_back_and_flushed, last_facet=True)
BACK_WHILE_FLUSHED = directed(_back_while_flushed, last_facet=True)
PASSED_AND_FLUSHED = directed(_passed_and_flushed, last_facet=True)
UNSPILLED_TOO_SOON = directed(_unspilled_too_soon, spill=8 * KIB, facets=2, last_facet=True)
HURRIED_UNNOTED = directed(_hurried_unnoted, last_facet=True)
RESTORED_AND_REMOVED = directed(_restored_and_removed, remotes=2)
REMOVED_WHILE_SYNCED = directed(_removed_while_synced, facets=2)
ADDED_WHILE_MOVED = directed(_added_while_moved, remotes=2)
CONSISTENT_AND_CUT = directed(_consistent_and_cut, last_facet=True)
LAST_TAKEN = directed(_last_taken, facets=2)
OUT_AND_FAILED = directed(_out_and_failed, facets=2)
ASKED_FOR_TWICE = directed(_asked_for_twice, facets=2)
ADDED_AND_FAILED = directed(_added_and_failed, facets=2)
READ_AND_FAILED = directed(_read_and_failed, facets=2)
STOPPED_AND_CLEARING = directed(_stopped_and_clearing, facets=2)


@mutant("M13 a log that a person has moved goes on in memory", run=MOVED_AND_LOST)
def _(assign: Assign) -> None:
    assign(LogKeeper, "_is_lost", lambda self: True)


@mutant("O12 a map is filled while a resync clears it", run=ROTTEN_IN_A_RESYNC)
def _(assign: Assign) -> None:
    original = Session._ship

    async def ship(self: Session) -> None:
        try:
            await original(self)
        except FormatError as error:
            await self._log_rotten(error)
            self._rotten = None
            raise

    assign(Session, "_ship", ship)


@mutant("M17 a new disk is known before its map is filled, durably", run=DISTRUSTED)
def _(assign: Assign) -> None:
    original = Member.fill

    def fill(self: Member) -> None:
        original(self)
        found = self.facet.file.identity() if self.facet.is_open else None
        self.saved.update(default=True, fill=False, identity=found)

    assign(Member, "fill", fill)


@mutant("O12 whoever finds a remote out of the log takes it for marked", run=LET_GO_TOO_SOON)
def _(assign: Assign) -> None:
    original = Remote.overflow

    async def overflow(self: Remote, why: str) -> None:
        if not self.tracking:
            await original(self, why)

    assign(Remote, "overflow", overflow)


@mutant("M13 a stop leaves out what was being marked", run=STOPPED_AND_FORCED_OUT)
def _(assign: Assign) -> None:
    async def mark_pending(self: LogKeeper, why: str, upto: int) -> None:
        for remote in self._primary.remotes:
            if not remote.tracking and remote.durable_seq < upto:
                await remote.overflow(why)

    assign(LogKeeper, "mark_pending", mark_pending)


@mutant("M13 a facet is flushed to before it is durable that it is back", run=BACK_AND_FLUSHED)
def _(assign: Assign) -> None:
    original = facets.redo  # type: ignore[attr-defined]

    async def redo(facet: LocalFacet, log: Log, volume: int) -> None:
        await original(facet, log, volume)
        facet.state = FacetState.SYNCHRONISED

    assign(facets, "redo", redo)


@mutant("I8 a flush waits for a remote though a facet is back", run=BACK_WHILE_FLUSHED)
def _(assign: Assign) -> None:
    original = Rescue.durable

    async def durable(self: Rescue, volume: Volume, seq: int) -> bool:
        in_service, volume.in_service = volume.in_service, list  # type: ignore[method-assign]
        try:
            return await original(self, volume, seq)
        finally:
            volume.in_service = in_service  # type: ignore[method-assign]

    assign(Rescue, "durable", durable)


@mutant("M13 who has a volume is not durable yet for the second flush", run=PASSED_AND_FLUSHED)
def _(assign: Assign) -> None:
    original = Housekeeper._pass_on

    async def pass_on(self: Housekeeper) -> None:
        self._passing = asyncio.Lock()
        await original(self)

    assign(Housekeeper, "_pass_on", pass_on)


@mutant("M4 a log is on disk before that is durable", run=UNSPILLED_TOO_SOON)
def _(assign: Assign) -> None:
    original = Spill.look

    def look(self: Spill, *, on_disk: bool = False) -> None:
        original(self, on_disk=True)

    assign(Spill, "look", look)


@mutant("M12 a facet hurries back before its failure was noted", run=HURRIED_UNNOTED)
def _(assign: Assign) -> None:
    original = Facets.hurry

    async def hurry(self: Facets, member: Member) -> None:
        member.facet.unnoted = False
        await original(self, member)

    assign(Facets, "hurry", hurry)


@mutant("V11 a remote is removed from under a restore", run=RESTORED_AND_REMOVED)
def _(assign: Assign) -> None:
    original = Primary.remove

    async def remove(self: Primary, name: str) -> None:
        self.roster = asyncio.Lock()
        await original(self, name)

    assign(Primary, "remove", remove)


@mutant("M17 a remote is added while the log is moved", run=ADDED_WHILE_MOVED)
def _(assign: Assign) -> None:
    original = LogKeeper.replace

    async def replace(self: LogKeeper, path: str) -> dict[str, Any]:
        self._primary.moving = asyncio.Lock()
        return await original(self, path)

    assign(LogKeeper, "replace", replace)


@mutant("M17 a facet that was removed is looked for", run=REMOVED_WHILE_SYNCED)
def _(assign: Assign) -> None:
    def of(self: Facets, facet: LocalFacet) -> Member:
        return next(member for member in self.members if member.facet is facet)

    assign(Facets, "_of", of)


@mutant("M8 a person takes out the last facet", run=LAST_TAKEN)
def _(assign: Assign) -> None:
    original, calls = FacetCommands._check_last, list[None]()

    def check(self: FacetCommands, member: Member) -> None:
        calls.append(None)
        if len(calls) % 2:  # before the wait, not after it
            original(self, member)

    assign(FacetCommands, "_check_last", check)


@mutant("M8 what a person took out comes back", run=OUT_AND_FAILED)
def _(assign: Assign) -> None:
    def serve(self: Facets, member: Member, pause: float) -> None:
        if member.task is None or member.task.done():
            member.task = asyncio.ensure_future(self._guard(member, pause))

    assign(Facets, "serve", serve)


@mutant("M8 a map that is being made is forgotten", run=ASKED_FOR_TWICE)
def _(assign: Assign) -> None:
    original = Member.to_map

    async def to_map(self: Member) -> None:
        try:
            await original(self)
        except asyncio.CancelledError:
            if not self.saved["tracking"]:
                self.dcm = None
            raise

    assign(Member, "to_map", to_map)


@mutant("O5 a stop is clean though a request has not ended", run=STOPPED_AND_CLEARING)
def _(assign: Assign) -> None:
    original = Node._settle

    async def settle(self: Node) -> None:
        for facet in (facet for volume in self.volumes for facet in volume.facets):
            facet.pending.clear()
        await original(self)

    assign(Node, "_settle", settle)


@mutant("O16 a facet answers that has lost what it held", run=READ_AND_FAILED)
def _(assign: Assign) -> None:
    async def ask(
        self: Volume,
        offset: int,
        length: int,
        ask: Callable[[LocalFacet], Awaitable[Any]],
        otherwise: Callable[[Buffer], Any],
    ) -> Any:
        return await ask(self.facets[0])

    assign(Volume, "_ask", ask)


@mutant("M17 two facets have one map", run=ADDED_AND_FAILED)
def _(assign: Assign) -> None:
    original = Facets.map_of

    def map_of(self: Facets, member: Member) -> DcmFile:
        self._last_id = 0
        return original(self, member)

    assign(Facets, "map_of", map_of)


@mutant("M11 a consistent remote has all marked in the superblock", run=CONSISTENT_AND_CUT)
def _(assign: Assign) -> None:
    save, sync = Remote.save_defaults, Remote.sync_maps

    def save_defaults(self: Remote) -> None:
        if not self.facts["consistent"]:
            save(self)

    async def sync_maps(self: Remote) -> None:
        await sync(self)
        save(self)

    assign(Remote, "save_defaults", save_defaults)
    assign(Remote, "sync_maps", sync_maps)
