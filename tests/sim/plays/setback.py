"""Plays of a secondary that is set back to an older copy of itself (I4, I5, T5)."""

from __future__ import annotations

import asyncio

from tests.sim.directed import directed
from tests.sim.disk import SimDisk
from tests.sim.options import KIB
from tests.sim.plays.stage import full_log, moment, only_remote, set_back, slow_save
from tests.sim.script import BLOCK, OPTIONS, Script

COPIES = 12
"""Regions."""
MOMENT_S = 0.000_1


async def _resync_begun(s: Script) -> SimDisk:
    """A resync of many regions has begun; what the secondary's disks are at that moment."""
    (b,) = s.world.remotes
    s.link(up=False)
    await full_log(s)
    for cell in range(0, COPIES * BLOCK, BLOCK):
        await s.write(0, cell, count=BLOCK)
    began = moment(s, s.world.a, "connected")
    s.link(up=True)
    await began.wait()
    return b.disk.clone(f"{s.world.seed}:image")


async def _set_back_later(s: Script) -> None:
    """A secondary is set back into a resync that has ended since. Nothing was written from then to
    the moment at which the log was full anew: no record tells the two states apart (I5). Once it
    was compared it is as any other, though few copies were needed for that: it is not compared
    again whenever the link was lost (I4)."""
    (b,) = s.world.remotes
    image = await _resync_begun(s)
    await s.in_sync()
    s.link(up=False)
    await full_log(s)
    await s.clear(0, BLOCK, (COPIES - 1) * BLOCK, "trim")
    await set_back(s, b, image)
    s.link(up=True)
    await s.in_sync()
    s.world.astray_on = None
    s.world.net.reset("a", "b")
    await s.write(0, 0)  # the primary sees that the link is gone
    await s.in_sync()


async def _half_copied(s: Script) -> SimDisk:
    """A resync is half done; what the secondary's disks were when it began."""
    image = await _resync_begun(s)
    remote = await only_remote(s)
    marked = remote.dirty_regions
    while remote.dirty_regions > marked - COPIES // 2:
        await asyncio.sleep(MOMENT_S)
    return image


async def _set_back_within(s: Script) -> None:
    """The same before that resync has ended, in which no record travels (I5)."""
    (b,) = s.world.remotes
    await set_back(s, b, await _half_copied(s))
    await s.in_sync()


async def _set_back_and_killed(s: Script) -> None:
    """The same, and the primary's process dies: its map says what was copied, and its superblock
    has to tell who lacks it."""
    a, (b,) = s.world.a, s.world.remotes
    image = await _half_copied(s)
    s.kill(a)
    await set_back(s, b, image)
    await s.world.start(a)
    await s.in_sync()


async def _new_and_cut(s: Script) -> None:
    """A secondary has a new disk, and its first session is cut while what it takes over from the
    primary is saved: it is no older copy of itself for that (T5)."""
    (b,) = s.world.remotes
    await _resync_begun(s)
    await s.in_sync()
    s.link(up=False)
    await s.stop(b)
    await s.world.replace(b)
    await s.world.start(b)
    saving = slow_save(b, lambda node: node.store.state["upstream"] is not None)
    s.link(up=True)
    await saving.wait()
    s.world.net.reset("a", "b")
    await s.write(0, 0)
    await s.in_sync()


SET_BACK_LATER = directed(_set_back_later, window=4 * KIB)
SET_BACK_WITHIN = directed(_set_back_within, window=4 * KIB)
NEW_AND_CUT = directed(_new_and_cut, window=4 * KIB)
SET_BACK_AND_KILLED = directed(
    _set_back_and_killed,
    window=4 * KIB,
    constants={**OPTIONS.constants, "engine.resync.COPIES_SECONDS": 0.0},
)
