"""Plays of a secondary: what its disk is slow with, or loses, while its primary goes on (I1, I2,
O5, O10, O16, V8)."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from nbdmirror.engine.node import Node
from nbdmirror.errors import NbdmirrorError
from tests.sim.directed import directed
from tests.sim.faults import Fault, Kind
from tests.sim.host import Host
from tests.sim.options import KIB
from tests.sim.oracle import Violation, compare
from tests.sim.plays.stage import (
    FAR,
    HOLES,
    NEVER_SECONDS,
    SLOW,
    SLOW_SECONDS,
    all_is_received,
    all_is_there,
    cleared,
    either,
    follower,
    full_log,
    killed,
    loses,
    moment,
    only_remote,
    power_loss,
    released,
    save_rotted,
    slow,
    slow_save,
    strikes,
    within,
)
from tests.sim.script import BLOCK, OPTIONS, POLL_S, SYNC_SECONDS, Script
from tests.sim.world import Gone

DELAY_SECONDS = 0.2
LONG_SECONDS = 600.0
"""A delay that does not pass in the play."""


async def _delay(s: Script, seconds: float) -> None:
    """The secondary is to follow so much later, in every session."""
    (b,) = s.world.remotes
    (await only_remote(s)).facts["apply_delay"] = seconds
    await s.world.in_life(b, follower(b).applier.change(delay=seconds))


async def _punched(s: Script) -> None:
    """A link is lost while the secondary punches a hole, for seconds and in a thread: what the next
    session copies there must not be under it in the end (I2, F1)."""
    (b,) = s.world.remotes
    await cleared(s)
    punching = slow(b, "punch", "/facets")
    s.link(up=True)
    await punching.wait()
    s.world.net.reset("a", "b")
    await s.write(0, *range(0, HOLES * BLOCK, BLOCK), count=1)
    await asyncio.sleep(2 * SLOW_SECONDS)
    await s.in_sync()


async def _holes_revert(s: Script) -> None:
    """A resync punches holes at the secondary, and the sync after that loses them: they are there
    in the page cache only when the next one looks, and then power fails."""
    (b,) = s.world.remotes
    await cleared(s)
    await _lost_behind(s, "punch")
    await s.up(b)
    await s.in_sync()
    await power_loss(s, b)
    await s.write(1, 0)  # the primary sees that the link is gone
    await s.in_sync()


async def _lost_behind(s: Script, operation: str) -> None:
    """The link is back; the first sync of a facet of the secondary after such an operation loses
    what there was, and its node ends."""
    (b,) = s.world.remotes
    done, lost = asyncio.Event(), asyncio.Event()
    lose = strikes("sync", "/facets/v0", Fault(Kind.LOSE), lost, done.is_set)

    def inject(name: str, path: str, nth: int) -> Fault | None:
        if name == operation and path.startswith("/facets/v0"):
            done.set()
        return lose(name, path, nth)

    b.disk.faults, life = inject, b.life
    s.link(up=True)
    await lost.wait()
    while b.alive and b.life is life:
        await asyncio.sleep(POLL_S)


async def _copies_revert(s: Script) -> None:
    """A full resync copies a block to the secondary, and the sync after that loses it: it is there
    in the page cache only when the region is compared again, which differs by then in another
    block. Then power fails."""
    (b,) = s.world.remotes
    s.link(up=False)
    await full_log(s)
    await s.write(0, 0, count=BLOCK)
    await s.full_resync()
    await _lost_behind(s, "pwrite")
    await s.write(0, BLOCK, count=BLOCK)
    await s.up(b)
    await s.in_sync()
    await power_loss(s, b)
    await s.write(1, 0)  # the primary sees that the link is gone
    await s.in_sync()


async def _lost_in_part(s: Script) -> None:
    """A secondary loses its power, and some of the records that its log had not synced, with later
    ones there; it recovers, and its process dies before it gets anything new."""
    (b,) = s.world.remotes
    slow(b, "sync", "/state/log", NEVER_SECONDS)
    for _ in range(BLOCK):
        await s.write(0, 0)
    await s.until(all_is_received)
    s.link(up=False)
    s.world.power_cut(b)
    b.disk.faults = None
    await s.world.start(b)
    await killed(s, b)
    s.link(up=True)
    await s.in_sync()


async def _received_only(s: Script) -> None:
    """A link is lost while the secondary has records that its log has not synced: as it is back,
    the primary counts on no more than is durable."""
    (b,) = s.world.remotes
    remote = await only_remote(s)
    slow(b, "sync", "/state/log", NEVER_SECONDS)
    for _ in range(BLOCK):
        await s.write(0, 0)
    await s.until(all_is_received)
    back = moment(s, s.world.a, "connected")
    s.world.net.reset("a", "b")
    await back.wait()
    if remote.durable_seq > follower(b).log.durable_seq:
        raise Violation("the primary counts on records that a power loss would take (O4)")
    await power_loss(s, b)
    await s.write(1, 0)  # the primary sees that the link is gone
    await s.in_sync()


async def _moving(s: Script) -> Host:
    """A delayed secondary, as the bound of what it may apply moves: that is being saved."""
    (b,) = s.world.remotes
    await s.world.in_life(b, follower(b).applier.change(delay=DELAY_SECONDS))

    def moves(node: Node) -> bool:
        applier = follower(b).applier
        return bool(applier.settings["limit"] > applier.applied_seq)

    moving = slow_save(b, moves)
    await s.write(0, 0, BLOCK, count=BLOCK)
    await moving.wait()
    return b


async def _moved_and_stopped(s: Script) -> None:
    """It is stopped in that moment: its next start redoes nothing, and is not to take for applied
    what is not."""
    b = await _moving(s)
    await s.stop(b)
    await s.world.start(b)
    await s.in_sync()


async def _moved_and_frozen(s: Script) -> None:
    """Somebody freezes it in that moment: from then on nothing is applied, a power loss or not."""
    b = await _moving(s)
    await s.freeze(on=True)
    applier = follower(b).applier
    frozen_at = applier.applied_seq
    await asyncio.sleep(2 * SLOW_SECONDS)
    if applier.applied_seq > frozen_at:
        raise Violation("something was applied that a person had frozen (V8)")
    await s.freeze(on=False)
    await s.in_sync()


async def _moved_and_cut(s: Script) -> None:
    """It is stopped in that moment, and loses its power before the bound is durable: nothing was
    applied by it."""
    b = await _moving(s)
    s.world.spawn(s.stop(b))
    await asyncio.sleep(SLOW_SECONDS / 3)
    await power_loss(s, b)
    _check_held(s, b)
    await s.in_sync()


async def _drained_twice(s: Script) -> None:
    """A delayed secondary is to be resynchronised, and its link is lost while it makes durable that
    it applies all it has; so is it to be again by the next session, and then power fails."""
    (b,) = s.world.remotes
    assert b.node is not None
    snapshots = b.node.snapshots  # each that is taken would be one more save
    snapshots.config = replace(snapshots.config, before_resync=False, count_max=0)
    await _delay(s, LONG_SECONDS)
    await s.write(0, 0, BLOCK, count=BLOCK)
    await s.until(all_is_there)
    held_at = follower(b).applied_seq
    draining = slow_save(b, lambda node: follower(b).applier.settings["limit"] > held_at)
    s.world.spawn(s.full_resync())
    await draining.wait()
    s.world.net.reset("a", "b")
    await asyncio.sleep(SLOW_SECONDS / 2)
    s.link(up=False)
    await power_loss(s, b)
    _check_held(s, b)
    s.link(up=True)
    await _delay(s, 0.0)
    await s.in_sync()


async def _kept_frozen(s: Script) -> None:
    """A secondary is frozen so that somebody copies its facets, and the log overflows: the resync
    waits until it is thawed, and that is told."""
    (b,) = s.world.remotes
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    await s.freeze(on=True)
    await s.write(0, 0, FAR, count=BLOCK)
    await s.until(all_is_there)
    assert b.node is not None
    held, images = follower(b).applied_seq, b.images()
    told = moment(s, s.world.a, "refused")
    s.link(up=False)
    await full_log(s)
    s.link(up=True)
    await within(told, SYNC_SECONDS)
    if follower(b).applied_seq != held or b.images() != images:
        raise Violation("a resync went through a point that a person had frozen (V8)")
    if "thaw" not in str((await only_remote(s)).refused):
        raise Violation("nobody is told what the resync of a frozen remote waits for (V8)")
    await s.freeze(on=False)
    await s.in_sync()


async def _frozen_and_full(s: Script) -> None:
    """The log of a synchronous secondary that is frozen is full: clients do not wait until somebody
    thaws it, as they would not where the link is lost; and that is told (I8)."""
    await s.in_sync()
    await s.freeze(on=True)
    told = moment(s, s.world.a, "refused")
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            await full_log(s)
    except TimeoutError:
        raise Violation("clients wait for a secondary that is frozen (I8)") from None
    await within(told, SYNC_SECONDS)
    if "its log is full" not in str((await only_remote(s)).refused):
        raise Violation("nobody is told what a frozen remote with a full log waits for (V8)")
    await s.freeze(on=False)
    await s.in_sync()


async def _frozen_with_room(s: Script) -> None:
    """A frozen secondary, of whose log the greater part is used, is followed again when its link
    was lost: nothing waits for a thaw before there is no room for what comes (I8)."""
    (b,) = s.world.remotes
    await s.in_sync()
    await s.freeze(on=True)
    log = follower(b).log
    while log.ring.room() > log.capacity // 4:
        await s.write(1, 0, count=1)
        await s.until(all_is_there)
    s.world.net.reset("a", "b")
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            await s.write(1, 0)
            await s.until(all_is_there)
    except TimeoutError:
        raise Violation("a frozen secondary with room is refused (I8)") from None
    await s.freeze(on=False)
    await s.in_sync()


async def _delay_given_up(s: Script) -> None:
    """All of a delayed secondary is to be compared: the point that it is at, which may be older
    than a mistake, is kept, and that is told."""
    (b,) = s.world.remotes
    await _delay(s, LONG_SECONDS)
    await s.write(0, 0, FAR, count=BLOCK)
    await s.until(all_is_there)
    held, told = follower(b).applied_seq, moment(s, b, "delay-given-up")
    await s.full_resync()
    await within(told, SYNC_SECONDS)
    await _delay(s, 0.0)
    await s.in_sync()
    assert b.node is not None
    kept = [entry["seq"] for entry in b.node.snapshots.usable() if entry["kind"] == "delayed"]
    if kept != [held] or not told.is_set():
        raise Violation(f"a delay kept {held}, and was given up for a resync: kept is {kept} (V8)")


async def _undelayed(s: Script) -> None:
    """A session takes away the delay of a secondary, and its link is lost before that is durable;
    so is the power, after more than the second in which the applier looks what is due."""
    (b,) = s.world.remotes
    await s.world.in_life(b, follower(b).applier.change(delay=600.0))
    await s.write(0, 0, BLOCK, count=BLOCK)
    await s.until(all_is_there)
    taking = slow_save(b, lambda node: not follower(b).applier.bounded)
    s.world.net.reset("a", "b")
    await taking.wait()
    s.world.net.reset("a", "b")
    await asyncio.sleep(SLOW_SECONDS / 2)
    s.link(up=False)
    await s.world.in_life(b, follower(b).sync_facets())  # as before the log is released
    await power_loss(s, b)
    _check_held(s, b)
    s.link(up=True)
    await s.in_sync()


def _check_held(s: Script, host: Host) -> None:
    """A secondary that is held back has what its bound says, and nothing else."""
    assert host.node is not None
    wanted = s.world.history.image(host.node.store.state["epoch"], follower(host).applied_seq)
    compare(host.images(), wanted, "a secondary that is held back (I1, V8)")


async def _thawed_and_failed(s: Script) -> None:
    """Somebody thaws a secondary, and that cannot be saved: nothing is applied by it, for the next
    start may find it frozen where it was."""
    (b,) = s.world.remotes
    await s.freeze(on=True)
    await s.write(0, 0, FAR, count=BLOCK)
    await s.until(all_is_there)
    loses(b, "/state/superblock")
    await s.freeze(on=False)
    await s.up(b)
    if follower(b).applier.bounded:
        _check_held(s, b)
    await s.freeze(on=False)
    await s.in_sync()


async def _failed_and_frozen(s: Script) -> None:
    """Somebody freezes a secondary while it applies a clearing, of which one facet has a part when
    the other one fails: the bound is not before that, for nothing would bring it to its end."""
    (b,) = s.world.remotes
    await s.write(0, 0, count=BLOCK)
    await released(s, b)
    await s.world.in_life(b, follower(b).applier.change(delay=DELAY_SECONDS))
    punching, failed = asyncio.Event(), asyncio.Event()
    b.disk.faults = either(
        strikes("punch", "/facets/v0.0", SLOW, punching),
        strikes("punch", "/facets/v0.1", Fault(Kind.ERROR), failed),
    )
    await s.clear(0, 0, BLOCK, "trim")
    await punching.wait()
    await s.freeze(on=True)
    await failed.wait()
    await s.up(b)
    _check_held(s, b)
    await s.world.in_life(b, follower(b).applier.change(frozen=False, delay=0.0))
    await s.in_sync()


async def _synced_before(s: Script) -> None:
    """A facet of the secondary is being synced when the primary, which has lost its power and what
    the secondary has, begins a stream of lower numbers: that sync says nothing of these."""
    a = s.world.a
    (b,) = s.world.remotes
    await s.write(0, 0, fua=True)
    await s.in_sync()
    slow(a, "sync", "/state/log", NEVER_SECONDS)
    for _ in range(BLOCK):
        await s.write(0, 0)
    await s.until(all_is_there)
    await slow(b, "sync", "/facets/v0").wait()
    s.link(up=False)
    await power_loss(s, a)
    s.link(up=True)
    await s.in_sync()
    await asyncio.sleep(SLOW_SECONDS)
    await s.write(0, FAR, fua=True)
    await s.in_sync()
    assert b.node is not None
    while b.node.log.ring.durable_tail < b.node.log.ring.head:
        await asyncio.sleep(POLL_S)
    await power_loss(s, b)
    await s.write(1, 0)
    await s.in_sync()


async def _old_tail(s: Script) -> None:
    """A secondary has got the first region of a resync when its process dies, and the save in which
    it had emptied its log for that has rotted: redo brings back what the region had before, which
    the primary's log does not hold any more."""
    a, (b,) = s.world.a, s.world.remotes
    await s.world.in_life(b, follower(b).applier.change(delay=LONG_SECONDS))
    await s.write(0, 0, count=BLOCK)
    await released(s, a)
    await s.until(all_is_there)
    s.link(up=False)
    slow(a, "sync", "/state/log", NEVER_SECONDS)
    await s.write(0, *range(0, 2 * HOLES * BLOCK, BLOCK), count=BLOCK)  # more than a window
    node = await s.primary()
    await s.world.in_life(a, node.volumes[0].facets[0].sync())
    await power_loss(s, a)  # the log has lost what the facet has
    remote = await only_remote(s)
    marks, volume = remote.dcms[0].map, a.disk.content("/facets/v0.0")
    rest = slow(b, "sync", "/facets", NEVER_SECONDS, when=lambda: not marks.is_marked(0))
    s.link(up=True)
    await rest.wait()
    s.link(up=False)
    await save_rotted(s, b)
    s.link(up=True)
    await s.in_sync()
    compare([b.disk.content("/facets/v0.0")], [volume], "a secondary that is in sync (I2)")
    s.world.astray_on = None


async def _stopped_late(s: Script) -> None:
    """A secondary hangs, and is told to stop; a primary that was restarted meanwhile knocks at its
    door. It finds both at once; later its power fails."""
    a, (b,) = s.world.a, s.world.remotes
    s.world.suspend(b, 60.0)
    s.world.spawn(s.stop(b))
    await killed(s, a)
    for _ in range(8):
        await s.write(0, 0)
    await asyncio.sleep(90.0)
    await s.world.start(b)
    await s.in_sync()
    await power_loss(s, b)
    await s.in_sync()


async def _failed_for_a_command(s: Script) -> None:
    """A person restores a snapshot on a delayed secondary, for which all that it holds back is
    applied, and its facet fails: that ends the node, as any other time. The primary's records would
    go into no facet, and the log be kept for ever."""
    a, (b,) = await s.primary(), s.world.remotes
    await s.write(0, 0)
    uuid = await s.snapshot()
    await s.in_sync()
    await s.world.in_life(b, follower(b).applier.change(delay=600.0))
    await s.write(0, 0, BLOCK, count=BLOCK)
    await s.until(all_is_there)
    assert b.node is not None
    await s.world.in_life(s.world.a, a.pause(b.name))
    while follower(b).current is not None:
        await asyncio.sleep(POLL_S)
    failed = asyncio.Event()
    b.disk.faults = strikes("pwrite", "/facets", Fault(Kind.ERROR), failed)
    with contextlib.suppress(NbdmirrorError, Gone):
        await s.world.in_life(b, b.node.people.restore(uuid, None, True, False, True))
    assert failed.is_set()
    await s.world.in_life(s.world.a, a.resume(b.name))
    await s.up(b)
    await s.in_sync()
    b.images()


PUNCHED = directed(_punched)
HOLES_REVERT = directed(_holes_revert)
COPIES_REVERT = directed(_copies_revert, region=4 * BLOCK * OPTIONS.cell)
LOST_IN_PART = directed(_lost_in_part)
RECEIVED_ONLY = directed(_received_only)
MOVED_AND_STOPPED = directed(_moved_and_stopped)
MOVED_AND_FROZEN = directed(_moved_and_frozen)
MOVED_AND_CUT = directed(_moved_and_cut)
DRAINED_TWICE = directed(_drained_twice)
KEPT_FROZEN = directed(_kept_frozen)
FROZEN_AND_FULL = directed(_frozen_and_full, mode="sync")
FROZEN_WITH_ROOM = directed(_frozen_with_room, mode="sync")
DELAY_GIVEN_UP = directed(_delay_given_up)
UNDELAYED = directed(_undelayed)
THAWED_AND_FAILED = directed(_thawed_and_failed)
FAILED_AND_FROZEN = directed(_failed_and_frozen, facets=2)
SYNCED_BEFORE = directed(_synced_before)
OLD_TAIL = directed(_old_tail, remote_log_size=260 * KIB)
STOPPED_LATE = directed(_stopped_late)
FAILED_FOR_A_COMMAND = directed(_failed_for_a_command)
