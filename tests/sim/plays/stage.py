"""The props that plays share: disks that are slow at the right moment, losses, and waits."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable

from nbdmirror.engine.node import Node
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.secondary import Secondary
from tests.sim.astray import PATH as SUPERBLOCK
from tests.sim.astray import newest_slot
from tests.sim.clock import SimClock
from tests.sim.disk import SimDisk
from tests.sim.faults import AllLost, Fault, Injector, Kind
from tests.sim.file import SimFile
from tests.sim.host import Host
from tests.sim.options import KIB
from tests.sim.oracle import Violation
from tests.sim.script import BLOCK, OPTIONS, POLL_S, Script

SLOW_SECONDS = 3.0
"""Longer than all that goes on meanwhile."""
SLOW = Fault(Kind.STALL, seconds=SLOW_SECONDS)
NEVER_SECONDS = 60.0
"""Longer than the play."""
HOLES = 4
"""Regions."""
assert OPTIONS.region == BLOCK * OPTIONS.cell
FAR = 184
"""A cell of volume 0 in an extent that does not come along with the first ones."""
LARGE = {"log_size": 260 * KIB, "remote_log_size": 260 * KIB}
"""Logs that are not full before the active map is."""
READ_BACK = {**OPTIONS.constants, "engine.log.RECENT_BYTES_MAX": 1}
"""Constants with which a session reads what it sends from the log's file."""


# -- disks ---------------------------------------------------------------------------------------


def strikes(
    operation: str,
    path: str,
    fault: Fault,
    struck: asyncio.Event,
    when: Callable[[], bool] = lambda: True,
) -> Injector:
    """The first such operation on a file, at a time when this is so, has a fault; ``struck`` is set
    with it."""
    left = [fault]

    def inject(name: str, where: str, nth: int) -> Fault | None:
        if not left or name != operation or not where.startswith(path) or not when():
            return None
        struck.set()
        return left.pop()

    return inject


def either(*injectors: Injector) -> Injector:
    """The fault of the first of them that has one."""

    def inject(operation: str, path: str, nth: int) -> Fault | None:
        found = (one(operation, path, nth) for one in injectors)
        return next((fault for fault in found if fault is not None), None)

    return inject


def slow(
    host: Host,
    operation: str,
    path: str,
    seconds: float = SLOW_SECONDS,
    when: Callable[[], bool] = lambda: True,
) -> asyncio.Event:
    """The first such operation from now on takes so long; set when it begins."""
    began = asyncio.Event()
    host.disk.faults = strikes(operation, path, Fault(Kind.STALL, seconds=seconds), began, when)
    return began


def slow_save(host: Host, wanted: Callable[[Node], bool]) -> asyncio.Event:
    """The first save of the superblock in which what is ``wanted`` is so takes long."""

    def so() -> bool:
        return host.node is not None and wanted(host.node)

    return slow(host, "sync", "/state/superblock", when=so)


def slow_at(
    s: Script, host: Host, kind: str, operation: str, path: str, nth: int = 1
) -> asyncio.Event:
    """Whenever the node tells of something, from the ``nth`` time on, the first such operation that
    follows takes long; set when the first of them begins."""
    began = asyncio.Event()
    times = 0

    def told(who: Host, what: str) -> None:
        nonlocal times
        if who is host and what == kind:
            times += 1
            if times >= nth:
                host.disk.faults = strikes(operation, path, SLOW, began)

    s.world.on_moment.append(told)
    return began


def loses(host: Host, path: str) -> None:
    """The first sync of that file from now on fails, and what was written is never durable."""
    host.disk.faults = strikes("sync", path, Fault(Kind.LOSE), asyncio.Event())


def dies_of(s: Script, host: Host, what: object, step: str = "fail") -> asyncio.Event:
    """The process dies in the step in which it sees this facet fail, or comes to another ``step``
    of something: nobody has noted why. Set when it has."""
    died = asyncio.Event()

    def die() -> None:
        s.kill(host)
        host.disk.faults = None
        died.set()

    def dies(*_: object) -> None:
        s.world.loop.call_soon(die)
        raise asyncio.CancelledError

    setattr(what, step, dies)
    return died


def claimed(disk: SimDisk) -> None:
    """A file is opened for writing by one at a time, as on a real disk."""
    opened, files = disk.open, dict[str, SimFile]()

    def open_(path: str, **how: bool) -> SimFile:
        if path in files and files[path]._open and files[path]._life.alive:
            raise BlockingIOError(errno.EAGAIN, "simulated: in use", path)
        file = files[path] = opened(path, **how)
        return file

    setattr(disk, "open", open_)  # noqa: B010


async def another_disk(s: Script, path: str, host: Host | None = None) -> None:
    """A person puts a new disk in the place of a facet's, of the primary or of ``host``."""
    disk, size = (host or s.world.a).disk, s.world.options.sizes[0]
    disk.unlink(path)
    file = disk.open(path, create=True)
    file.truncate(size)
    await file.sync()
    await disk.sync_directory("/facets")
    file.close()


# -- losses --------------------------------------------------------------------------------------


async def power_loss(s: Script, host: Host, *mended: str) -> None:
    """It loses its power, and all that was not durable; then its disks are as they should be, and
    those of the primary's files that are named too; and it is started again."""
    s.world.power_cut(host, AllLost())
    for path in mended:
        s.mend(path)
    host.disk.faults = None
    await s.world.start(host)


async def killed(s: Script, host: Host) -> None:
    """Its process dies, and is started again."""
    s.kill(host)
    await s.world.start(host)


async def set_back(s: Script, host: Host, image: SimDisk) -> None:
    """It goes on from a copy of all its disks (an image of the machine), its process having died: a
    doubt is none that is to be wondered at until the run ends."""
    s.kill(host)
    host.disk, host.clock = image, SimClock(s.world.loop, image)
    s.world.astray_on = host
    await s.world.start(host)


async def save_rotted(s: Script, host: Host) -> None:
    """Its process dies, if it has not, and what it saved last of its superblock has rotted: it
    comes back with the save before that, and knows of it."""
    s.kill(host)
    host.disk.faults = None
    host.disk.flip(SUPERBLOCK, newest_slot(host) + 100)
    s.world.astray_on, noticed = host, moment(s, host, "superblock-damaged")
    await s.world.start(host)
    if not noticed.is_set():
        raise Violation(f"{host.name} did not notice what its superblock lost (O11)")


async def without_log(s: Script) -> None:
    """The log goes on in memory, for its disk is lost."""
    s.spoil("/state/log")
    await s.write(0, 40, fua=True)
    await s.until(lambda node: bool(node.status()["log"]["in_memory"]))


async def without_facet(s: Script, path: str = "/facets/v0.0") -> None:
    """The last facet of volume 0 is lost: a remote stands in."""
    s.spoil(path)
    await s.write(0, 0)
    await s.until(lambda node: not node.volumes[0].in_service())


async def full_log(s: Script) -> None:
    """While a remote is away, its log is filled: what is written from then on is in its map."""
    for turn in range(13):
        await s.write(1, turn % 4 * BLOCK, count=BLOCK, pause=0.02)


async def released(s: Script, host: Host) -> None:
    """What was written by now has left its log: no redo comes by it."""
    for _ in range(6):  # more than half of it
        await s.write(1, 0, count=BLOCK)
    assert host.node is not None
    log = host.node.log
    while log.ring.tail_seq < log.next_seq:
        await asyncio.sleep(POLL_S)


async def alike_without_power(s: Script) -> None:
    """Nothing is active, and power fails: the facets of volume 0 are what they are."""
    a = s.world.a
    await s.in_sync()
    await released(s, a)
    await s.stop(a)
    await s.world.start(a)
    await power_loss(s, a)
    content = [a.disk.content(f"/facets/v0.{number}") for number in (0, 1)]
    if content[0] != content[1]:
        raise Violation("a facet that is back was not on its disk (O16)")
    await s.in_sync()


async def cleared(s: Script) -> None:
    """Regions that the secondary has, in a snapshot too, are cleared while its link is down, and
    travel as holes."""
    await s.write(0, *range(0, HOLES * BLOCK, BLOCK), count=BLOCK)
    await s.snapshot()
    await s.in_sync()
    s.link(up=False)
    await full_log(s)
    await s.clear(0, 0, HOLES * BLOCK, "trim")


# -- waits, and who is there ---------------------------------------------------------------------


def moment(s: Script, host: Host, kind: str) -> asyncio.Event:
    """Set in the step in which the node tells of it."""
    came = asyncio.Event()

    def told(who: Host, what: str) -> None:
        if who is host and what == kind:
            came.set()

    s.world.on_moment.append(told)
    return came


async def within(event: asyncio.Event, seconds: float) -> None:
    """Waits no longer than that: where the product holds, some of what is played never comes."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def only_remote(s: Script) -> Remote:
    """The remote as the primary knows it."""
    node = await s.primary()
    assert node.primary is not None
    (remote,) = node.primary.remotes
    return remote


def all_is_there(node: Node) -> bool:
    """The remote has all of the log, durably."""
    assert node.primary is not None
    return node.primary.remotes[0].durable_seq == node.log.next_seq - 1


def all_is_received(node: Node) -> bool:
    """The remote has all of the log, perhaps only in its page cache."""
    assert node.primary is not None
    return node.primary.remotes[0].received_seq == node.log.next_seq - 1


def on_disk(node: Node) -> bool:
    """The log that was in memory is on disk, for want of a facet."""
    return bool(node.status()["log"]["spill"]["on_disk"])


def follower(host: Host) -> Secondary:
    """What a node that is up does as a secondary."""
    assert host.node is not None and host.node.secondary is not None
    return host.node.secondary
