"""Plays of a log that is partly in memory (M4): what its file lacks, or has too much of."""

from __future__ import annotations

import asyncio
import contextvars
from dataclasses import replace

from tests.sim.directed import directed
from tests.sim.faults import Fault, Kind
from tests.sim.options import KIB
from tests.sim.oracle import Moot, Violation
from tests.sim.plays.stage import (
    FAR,
    LARGE,
    NEVER_SECONDS,
    SLOW_SECONDS,
    all_is_there,
    dies_of,
    full_log,
    killed,
    loses,
    moment,
    on_disk,
    only_remote,
    power_loss,
    released,
    slow,
    slow_save,
    strikes,
    within,
    without_facet,
)
from tests.sim.script import BLOCK, Script

SYNCS_MAX = 10
"""Of facets for a flush: of each before and behind what it waits for, and what is due anyway."""
BRIEFLY = Fault(Kind.STALL, seconds=1.0)


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
    await killed(s, a)
    s.link(up=True)


async def _cleared_and_killed(s: Script) -> None:
    """A sync of the facet fails that should have made a clearing durable; the process dies before
    that is noted; the log in memory is gone. What is in the page cache only, holes too, is on the
    disk before it is relied on."""
    a, regions = s.world.a, range(0, 4 * BLOCK, BLOCK)
    await s.write(0, *regions, count=BLOCK)
    await s.in_sync()
    await released(s, a)
    for first in regions:
        await s.clear(0, first, BLOCK, "trim")
    (facet,) = (await s.primary()).volumes[0].facets
    died = dies_of(s, a, facet)
    loses(a, facet.path)
    s.world.spawn(s.flush())
    await died.wait()
    if not a.disk.shows_lost(facet.path):
        raise Moot("nobody has what was lost")
    await s.world.start(a)
    for first in regions:
        await s.read(0, first, BLOCK)
    await s.in_sync()


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
    a = s.world.a
    await s.write(0, 0, count=BLOCK)
    await s.until(lambda node: node.log.ring.tail_seq == node.log.next_seq)
    loses(a, "/facets/v0.1")
    await s.flush()
    await s.until(lambda node: len(node.volumes[0].in_service()) == 1)
    for first in range(2 * BLOCK, 192, BLOCK):
        await s.write(0, first, count=BLOCK)
        await s.until(all_is_there)
    await s.facets_back()
    await power_loss(s, a)


async def _left_meanwhile(s: Script) -> None:
    """One of two facets loses what it was to make durable, as a release is about to take that from
    the log: it looks on a slow disk for the place where the log will begin. The extent leaves the
    active map before the facet is back; then power fails."""
    a = s.world.a
    (b,) = s.world.remotes
    node = await s.primary()
    releasing = node.housekeeper.releasing.locked
    slow(b, "sync", "/state/log")
    await s.write(0, 0, count=BLOCK)
    await asyncio.sleep(SLOW_SECONDS / 3)
    for turn in range(1, 8):  # the oldest go to the file; the remote has them later
        await s.write(0, turn * BLOCK, count=BLOCK)
    reading = slow(a, "read", "/state/log", when=releasing)
    slow(b, "sync", "/state/log", 2 * SLOW_SECONDS)
    await within(reading, SLOW_SECONDS)
    loses(a, "/facets/v0.1")
    await s.flush()
    await s.world.in_life(a, node._make_safe())  # as for an extent that is cold
    await s.until(lambda node: not releasing())
    for first in range(8 * BLOCK, 192, BLOCK):
        await s.write(0, first, count=BLOCK)
    await s.until(all_is_there)
    await s.facets_back()
    await power_loss(s, a)


async def _in_memory_again(s: Script) -> None:
    """The only facet of a volume is lost, and comes back: the log is on disk, and in memory again,
    when the process dies."""
    path = "/facets/v0.0"
    await without_facet(s, path)
    await s.until(on_disk)
    s.mend(path)
    await s.facet("online", path)
    await s.facets_back()
    await s.until(lambda node: not on_disk(node))
    await s.write(0, 0)
    await killed(s, s.world.a)


async def _on_disk(s: Script) -> None:
    """A volume loses its only facet while another has what no sync has reached and the log has no
    more; what is flushed then is durable, whatever the power does."""
    await s.write(1, 0)
    await s.until(lambda node: node.log.ring.durable_tail == node.log.ring.head)
    await without_facet(s)
    await s.until(on_disk)
    await s.flush()
    await power_loss(s, s.world.a)


async def _unspilled_too_soon(s: Script) -> None:
    """A volume's last facet fails as another volume's is back: what is flushed then is not taken
    for durable in the log before the superblock says that the log is on disk."""
    world, a, path = s.world, s.world.a, "/facets/v0.0"
    await s.facet("offline", "/facets/v0.1")
    await s.facet("offline", "/facets/v1.1")
    await s.write(1, 0)
    back = slow_save(
        a, lambda node: bool(node.store.state["volumes"][1]["facets"][1]["state"] == "synchronised")
    )
    await s.facet("online", "/facets/v1.1")
    await back.wait()
    await s.write(0, 0)
    noting = slow(a, "sync", "/state/superblock")
    s.spoil(path)
    world.spawn(s.write(0, FAR))
    await noting.wait()
    s.mend(path)
    world.spawn(s.flush())
    await asyncio.sleep(SLOW_SECONDS / 3)
    await power_loss(s, a)
    await s.in_sync()


async def _released_while_made_safe(s: Script) -> None:
    """An extent is about to leave the active map, and the disk of the remotes' maps is slow; what
    is released meanwhile was in memory only. The superblock is saved, and not yet the tail: a start
    misses nothing that it had not been told to be in the file."""
    world, a = s.world, s.world.a
    s.link(up=False)
    await full_log(s)
    remote, node = await only_remote(s), await s.primary()
    await s.until(lambda node: remote.tracking and remote.marked_seq is None)
    await s.until(lambda node: node.log.ring.durable_tail == node.log.ring.head)
    a.disk.faults = lambda operation, path, nth: (
        BRIEFLY if operation == "sync" and path.startswith("/state/dcm/") else None
    )
    await s.write(0, 0)
    await asyncio.sleep(BRIEFLY.seconds / 5)
    safe = world.spawn(world.in_life(a, node._make_safe()))
    await asyncio.sleep(BRIEFLY.seconds / 50)
    for first in range(BLOCK, 6 * BLOCK, BLOCK):
        await s.write(0, first)
    await safe
    a.disk.faults = None
    damaged = moment(s, a, "log-damaged")
    await killed(s, a)
    if damaged.is_set():
        raise Violation("a log that is sound was taken for damaged, and all is compared (X1)")
    s.link(up=True)
    await s.in_sync()


async def _not_moved(s: Script) -> None:
    """A volume loses its only facet while a person moves the log, which is refused by that: once
    the facet is back, the log is in memory again."""
    a, path, failed = s.world.a, "/facets/v0.0", asyncio.Event()
    node = await s.primary()
    a.disk.faults = strikes("sync", path, Fault(Kind.LOSE), failed, lambda: node.log.frozen)
    await s.write(0, 0)
    await s.replace_log("/state/moved")
    a.disk.faults = None
    if not failed.is_set() or a.disk.exists("/state/moved"):
        raise Violation("the move of a log that a volume comes back from was not refused (M11)")
    await s.facet("online", path)
    await s.facets_back()
    await s.until(lambda node: not on_disk(node))
    if on_disk(node):
        raise Violation("a log whose move was refused is not in memory any more (M4)")


async def _started_without_log(s: Script) -> None:
    """A node starts whose log is in memory, for its disk is lost, and a person takes out a facet
    and has it back: the log does not spill over what is in memory itself."""
    a, path = s.world.a, "/facets/v0.1"
    s.spoil("/state/log")
    await s.snapshot()  # whose mark must be in the file
    await s.until(lambda node: bool(node.status()["log"]["in_memory"]))
    await killed(s, a)
    await s.facet("offline", path)
    await s.write(0, 0)
    await s.facet("online", path)
    await s.facets_back()
    await s.in_sync()
    node = await s.primary()
    if node.log.spilled is not None or not node.status()["log"]["in_memory"]:
        raise Violation("a log without a disk is said to be one that spills to it (M13)")


async def _cleared_meanwhile(s: Script) -> None:
    """A clearing is in the log, durably, its extent has left the active map, and its disk is slow
    to make it, as the log is to be in memory again; then the process dies. Either redo brings it,
    or it was made before: the remote has it."""
    a, path = s.world.a, "/facets/v0.0"
    await s.write(1, 0, count=BLOCK)
    await without_facet(s, path)
    await s.until(on_disk)
    punching = slow(a, "punch", "/facets/v1.0", NEVER_SECONDS)
    s.world.spawn(s.clear(1, 0, BLOCK, "trim"))
    await punching.wait()
    for extent in range(1, 90):
        await s.write(0, 2 * extent)
    s.mend(path)
    spills = moment(s, a, "log-spills")
    await s.facet("online", path)
    await s.facets_back()
    await within(spills, SLOW_SECONDS)
    await asyncio.sleep(1.0)  # what remotes have is released
    await killed(s, a)
    await s.in_sync()


async def _cleared_before(s: Script) -> None:
    """A log in memory has a clearing no more, for the remote has it, and its disk is slow to make
    it, as the log goes on disk; its extent leaves the active map, and the process dies."""
    a = s.world.a
    await s.write(1, 0, count=BLOCK)
    await s.in_sync()
    punching = slow(a, "punch", "/facets/v1.0", 4 * SLOW_SECONDS)
    s.world.spawn(s.clear(1, 0, BLOCK, "trim"))
    await punching.wait()
    await s.until(lambda node: node.log.ring.durable_tail == node.log.ring.head)
    await without_facet(s)
    await s.until(on_disk)
    for extent in range(1, 90):
        await s.write(0, 2 * extent)
    await killed(s, a)
    await s.in_sync()


async def _killed_between(s: Script) -> None:
    """The process is killed when a write is in one of two facets, and in the other one in part:
    after the start they are alike, though nothing is redone."""
    a, context, struck = s.world.a, contextvars.copy_context(), asyncio.Event()
    await s.write(0, 0, count=BLOCK)

    def kill() -> None:
        context.copy().run(s.world.kill, a)

    half = Fault(Kind.SHORT, then=kill)
    a.disk.faults = strikes("pwrite", "/facets/v0.1", half, struck)
    await s.write(0, 0, count=BLOCK)
    await struck.wait()
    a.disk.faults = None
    await s.world.start(a)
    await s.primary()
    content = [a.disk.content(f"/facets/v0.{number}") for number in (0, 1)]
    if content[0] != content[1]:
        raise Violation("facets differ in what was in flight when the process died (M4)")
    await s.in_sync()


async def _flushed_meanwhile(s: Script) -> None:
    """The log is in memory, and a disk is slow to make a clearing that a client flushes: facets are
    not synced over and over until it has."""
    a, syncs = s.world.a, 0
    punching = slow(a, "punch", "/facets/v0.0")
    s.world.spawn(s.clear(0, 0, BLOCK, "trim"))
    await punching.wait()

    def count(operation: str, path: str, nth: int) -> None:
        nonlocal syncs
        syncs += operation == "sync" and path.startswith("/facets")

    a.disk.faults = count
    await s.flush()
    a.disk.faults = None
    if syncs > SYNCS_MAX:
        raise Violation(f"one flush took {syncs} syncs of facets (M13)")
    await s.in_sync()


PAST_TWICE = directed(_past_twice, spill=8 * KIB)
CLEARED_AND_KILLED = directed(_cleared_and_killed, spill=8 * KIB)
FAR_BEHIND = directed(_far_behind, spill=8 * KIB)
FLUSHED_MEANWHILE = directed(_flushed_meanwhile, spill=8 * KIB)
KILLED_BETWEEN = directed(_killed_between, spill=8 * KIB, facets=2)
LEFT = directed(_left, spill=8 * KIB, facets=2, **LARGE)
LEFT_MEANWHILE = directed(_left_meanwhile, spill=8 * KIB, facets=2, **LARGE)
IN_MEMORY_AGAIN = directed(_in_memory_again, spill=8 * KIB, last_facet=True)
ON_DISK = directed(_on_disk, spill=8 * KIB, last_facet=True)
RELEASED_WHILE_MADE_SAFE = directed(_released_while_made_safe, spill=8 * KIB)
NOT_MOVED = directed(_not_moved, spill=8 * KIB, last_facet=True)
STARTED_WITHOUT_LOG = directed(_started_without_log, spill=8 * KIB, facets=2)
CLEARED_BEFORE = directed(_cleared_before, spill=8 * KIB, last_facet=True, **LARGE)
CLEARED_MEANWHILE = directed(_cleared_meanwhile, spill=8 * KIB, last_facet=True, **LARGE)
UNSPILLED_TOO_SOON = directed(_unspilled_too_soon, spill=8 * KIB, facets=2, last_facet=True)
