"""Plays of snapshots, on either side: taken, followed, kept or deleted while somebody is at work
with them (V9, O21), and of the image from before a resync (X2)."""

from __future__ import annotations

import asyncio

from nbdmirror.engine.node import Node
from tests.sim.directed import directed
from tests.sim.faults import AllLost, Timing
from tests.sim.options import KIB
from tests.sim.oracle import Violation
from tests.sim.plays.stage import (
    FAR,
    NEVER_SECONDS,
    SLOW_SECONDS,
    cleared,
    follower,
    full_log,
    killed,
    moment,
    only_remote,
    power_loss,
    released,
    save_rotted,
    slow,
    slow_at,
    slow_save,
    without_log,
)
from tests.sim.script import BLOCK, OPTIONS, POLL_S, Script

UNHURRIED = {**OPTIONS.constants, "engine.housekeeper.INTERVAL_SECONDS": 5.0}
"""Constants with which little is saved that nobody has asked for."""
MISSES = Timing(sync=(0.000_1, 0.002), miss=1.0)
"""Nothing of what is read is in memory."""


async def _outlived(s: Script) -> None:
    """The log goes on in memory, two snapshots are taken, one of which the remote gets, and the
    process dies: the snapshots are there, their records are not."""
    await without_log(s)
    await s.write(0, 0)
    await s.snapshot()
    await s.in_sync()
    s.link(up=False)
    await s.write(0, 0)
    await s.snapshot()
    await killed(s, s.world.a)
    s.link(up=True)
    await s.in_sync()


async def _cleared_late(s: Script) -> None:
    """A snapshot is taken behind a clearing that is in the log, and not in the facet yet; and the
    region is written to."""
    await s.write(0, 0, count=BLOCK)
    punching = slow(s.world.a, "punch", "/facets")
    s.world.spawn(s.clear(0, 0, BLOCK // 2, "trim"))
    await punching.wait()
    await s.snapshot()
    await s.write(0, BLOCK - 1)
    await asyncio.sleep(SLOW_SECONDS)


async def _deleted_there(s: Script) -> None:
    """A secondary that has followed a snapshot has it no more when its process dies: redo comes by
    the marker again, and not by what the snapshot had held."""
    (b,) = s.world.remotes
    await s.write(0, 0)
    await released(s, b)
    uuid = await s.snapshot()
    await s.write(0, 0)
    await s.in_sync()
    await s.delete(uuid, b)
    await killed(s, b)
    await s.in_sync()


async def _deleted_while_kept(s: Script) -> None:
    """The newest snapshot is deleted while a region is being read for it, which a write waits for:
    the others stay."""
    await s.write(0, 0, count=BLOCK)
    first = await s.snapshot()
    second = await s.snapshot()
    reading = slow(s.world.a, "read", "/facets/v0")
    s.world.spawn(s.write(0, 0))
    await reading.wait()
    await s.delete(second)
    await asyncio.sleep(2 * SLOW_SECONDS)
    await _is_there(s, first)


async def _given_up_while_deleted(s: Script) -> None:
    """The space for snapshots ends while one is deleted, and what the one before it needs is on its
    way there: only that one is given up, the others stay."""
    await s.write(0, *range(0, 5 * BLOCK, BLOCK), count=BLOCK)
    await s.snapshot()
    second = await s.snapshot()
    await s.write(0, 0, BLOCK)
    third = await s.snapshot()
    moving = slow(s.world.a, "read", f"/state/snapshots/{second}")
    s.world.spawn(s.delete(second))
    await moving.wait()
    await s.write(0, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK)
    await asyncio.sleep(2 * SLOW_SECONDS)
    await _is_there(s, third)


async def _is_there(s: Script, uuid: str) -> None:
    """Nothing has happened that this snapshot could be lost by."""
    node = await s.primary()
    entry = node.snapshots.entry(uuid)
    if entry is None or not node.snapshots.shown(entry):
        why = None if entry is None else entry.get("lost")
        raise Violation(f"a snapshot is lost for no reason: {why} (V9)")


async def _back_untold(s: Script) -> None:
    """The space for a snapshot ends that a remote has no record of, and that is not durable as the
    remote is told what it lacks; the power fails, and the snapshot is there again."""
    a = s.world.a
    s.link(up=False)
    await full_log(s)
    await s.snapshot()
    starting = slow_at(s, a, "handshake", "sync", "/state/superblock")
    s.link(up=True)
    await starting.wait()
    s.world.spawn(s.write(0, *range(0, 5 * BLOCK, BLOCK)))
    losing = slow(a, "sync", "/state/superblock", NEVER_SECONDS)
    await losing.wait()
    await asyncio.sleep(1.0)
    await power_loss(s, a)
    await s.in_sync()


async def _consistent_and_dead(s: Script) -> None:
    """A secondary dies as it has become consistent, with the image from before the resync still
    there, and no primary comes by it any more: at its start it lets go of that."""
    (b,) = s.world.remotes
    await cleared(s)
    consistent = moment(s, b, "consistent")
    s.link(up=True)
    await consistent.wait()
    s.link(up=False)
    await killed(s, b)
    while b.node is not None and any(e["kind"] == "resync" for e in b.node.snapshots.usable()):
        await asyncio.sleep(POLL_S)
    s.link(up=True)
    await s.in_sync()


async def _consistent_and_back(s: Script) -> None:
    """A secondary is making durable that it is consistent when its link is lost, for so long that
    there is a resync to come: the image from before that stays until it is through."""
    (b,) = s.world.remotes
    was_not = asyncio.Event()

    def consistent_again(node: Node) -> bool:
        consistent = bool(node.store.state["upstream"]["consistent"])
        if not consistent:
            was_not.set()
        return consistent and was_not.is_set()

    await cleared(s)
    # The end of the resync comes before what it waits for is applied.
    facts = (await only_remote(s)).facts
    facts["apply_delay"] = 600.0
    s.link(up=True)
    secondary = follower(b)
    while (receiver := secondary.current) is None or receiver._end_seq is None:
        await s.write(0, FAR)
    saving = slow_save(b, consistent_again)
    facts["apply_delay"] = 0.0
    await s.world.in_life(b, secondary.applier.change(delay=0.0))
    await saving.wait()
    s.link(up=False)
    await full_log(s)
    s.link(up=True)
    assert b.node is not None
    while b.node.store.state["upstream"]["consistent"]:
        await asyncio.sleep(0.000_1)
    s.link(up=False)
    await asyncio.sleep(SLOW_SECONDS)
    s.world.album.check_image(b, b.node)
    s.link(up=True)
    await s.in_sync()


async def _followed_and_rotted(s: Script) -> None:
    """A secondary follows a snapshot, and keeps for it what is overwritten; its process dies before
    its superblock is saved for anything else, and what was saved last has rotted: the snapshot is
    what it was, and so is the one before it, which needs what it has kept."""
    (b,) = s.world.remotes
    await s.write(0, 0, count=BLOCK)
    await s.snapshot()
    await released(s, b)
    await s.snapshot()
    await s.in_sync()
    await s.write(0, 0, count=BLOCK)
    await s.in_sync()
    await save_rotted(s, b)
    await s.in_sync()
    s.world.astray_on = None


async def _taken_and_rotted(s: Script) -> None:
    """The primary takes a snapshot, keeps for it what is overwritten, and loses its power before it
    has saved that it was taken; what it saved last, the plan, has rotted: the snapshot before is
    what it was, for it needs what was kept."""
    a = s.world.a
    await s.write(0, 0, count=BLOCK)
    await s.snapshot()
    node = await s.primary()
    taking = slow_save(a, lambda node: node.snapshots.entries[-1]["seq"] is not None)
    s.world.spawn(_taken(s))
    await taking.wait()
    await s.write(0, 0, count=BLOCK, fua=True)
    await s.world.in_life(a, node.volumes[0].facets[0].sync())
    s.world.power_cut(a, AllLost())
    await save_rotted(s, a)
    await s.in_sync()
    s.world.astray_on = None


async def _half_taken(s: Script) -> None:
    """The log is in memory, and a snapshot is taken behind a clearing that a facet's disk has yet
    to make; what it is going to be is saved, and power fails: no redo brings the clearing, and
    nobody was told of the snapshot."""
    a = s.world.a
    await s.write(0, 0, count=BLOCK)
    await s.write(0, FAR, count=BLOCK)
    await without_log(s)
    await s.flush()
    punching = slow(a, "punch", "/facets")
    s.world.spawn(s.clear(0, 0, BLOCK // 2, "trim"))
    await punching.wait()
    s.world.spawn(_taken(s))  # what was before it was asked for is durable first
    await asyncio.sleep(SLOW_SECONDS / 2)
    slow(a, "punch", "/facets", NEVER_SECONDS)
    s.world.spawn(s.clear(0, FAR, BLOCK // 2, "trim"))
    await s.until(lambda node: any(one["seq"] is not None for one in node.snapshots.entries))
    await s.world.in_life(a, (await s.primary()).store.save())
    await power_loss(s, a)
    await s.in_sync()


async def _came_and_went(s: Script) -> None:
    """While a remote is away a snapshot that it has is deleted everywhere, and then more that were
    taken since than are remembered: those it never had."""
    await s.write(0, 0)
    uuid = await s.snapshot()
    await s.in_sync()
    s.link(up=False)
    await full_log(s)
    await s.until(lambda node: bool(node.status()["remotes"][0]["dirty"]["regions"]))
    await s.delete(uuid, everywhere=True)
    for _ in range(3):
        await s.delete(await s.snapshot(), everywhere=True)
    s.link(up=True)
    await s.in_sync()


async def _taken(s: Script) -> None:
    await s.snapshot()


OUTLIVED = directed(_outlived)
CAME_AND_WENT = directed(
    _came_and_went, constants={**OPTIONS.constants, "engine.remote.DELETIONS_MAX": 2}
)
CLEARED_LATE = directed(_cleared_late)
DELETED_THERE = directed(_deleted_there)
DELETED_WHILE_KEPT = directed(_deleted_while_kept, timing=MISSES)
GIVEN_UP_WHILE_DELETED = directed(
    _given_up_while_deleted, timing=MISSES, snapshot_space=4 * OPTIONS.region
)
BACK_UNTOLD = directed(_back_untold, snapshot_space=4 * OPTIONS.region)
CONSISTENT_AND_DEAD = directed(_consistent_and_dead)
CONSISTENT_AND_BACK = directed(_consistent_and_back)
FOLLOWED_AND_ROTTED = directed(_followed_and_rotted, log_size=260 * KIB, constants=UNHURRIED)
HALF_TAKEN = directed(_half_taken)
TAKEN_AND_ROTTED = directed(_taken_and_rotted)
