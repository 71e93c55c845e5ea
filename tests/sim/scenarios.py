"""The scripts of the sweeps: what clients and people do, the same at every point.

One client, one request at a time, on a small pair of nodes whose log wraps after a few writes and
whose active map has fewer slots than there are extents. ``arm`` says from where on operations
count. Some have further copies, local and remote (``options_of``), or lose a disk before that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tests.sim.options import KIB, Options
from tests.sim.script import BLOCK, OPTIONS, Script


async def _load(s: Script) -> None:
    """Some of each, part of it flushed."""
    await s.write(0, 0, 20, count=2)
    await s.write(1, 3)
    await s.flush()
    await s.write(0, 1, count=6)
    await s.clear(0, 16, 8, "trim")
    await s.write(0, 18, count=2)


async def write(s: Script) -> None:
    """Cold and hot extents, batches, FUA, flush, clearing, a full active map, a ring that wraps."""
    s.arm()
    await s.write(0, 0, 30, count=2)
    await s.write(0, 0)
    await s.write(0, 1, 4, count=1, fua=True)
    await s.write(1, 5, count=3, fua=True)
    await s.flush()
    await s.clear(0, 0, 2 * BLOCK, "trim")
    await s.write(0, 3, count=2)
    await s.clear(1, 4, BLOCK, "zero")
    await s.clear(1, 3, 2, "zero keeping space")
    await s.read(1, 0, 4 * BLOCK)
    await s.write(0, 5 * BLOCK, count=2 * BLOCK)  # cut to records
    await s.clear(0, 6 * BLOCK, 16 * BLOCK, "trim")  # more extents than the active map has slots
    for turn in range(11):
        await s.write(0, (turn % 3) * BLOCK, count=BLOCK, pause=0.06)
    await s.flush()
    await s.write(1, 5, 6)
    await s.read(0, 0, 8 * BLOCK)


async def overflow(s: Script) -> None:
    """The link goes down until the log is full and the DCM takes over; and comes back (M7, O12)."""
    await _load(s)
    s.arm()
    s.link(up=False)
    for turn in range(13):
        await s.write(0, 4 * turn, count=BLOCK, pause=0.02)
    await s.clear(1, 0, 2 * BLOCK, "trim")
    await s.flush()
    await s.write(1, 9, fua=True)
    s.link(up=True)
    await s.in_sync()


async def _overflowed(s: Script) -> None:
    s.link(up=False)
    for turn in range(13):
        await s.write(0, 4 * turn, count=BLOCK, pause=0.01)
    await s.clear(1, 0, 2 * BLOCK, "trim")


async def resync(s: Script) -> None:
    """What the DCM marks is copied, while writes go on (V6, O13)."""
    await _overflowed(s)
    s.arm()
    s.link(up=True)
    for turn in range(4):
        await s.write(0, 10 * turn, 150 + 3 * turn, count=2, pause=0.02)
    await s.clear(0, 20, BLOCK, "zero")
    await s.in_sync()
    await s.write(0, 60)


async def full_resync(s: Script) -> None:
    """Everything is compared by hash, while writes go on (X1)."""
    await _load(s)
    await s.in_sync()
    s.arm()
    await s.full_resync()
    for turn in range(4):
        await s.write(0, 10 * turn, count=2, pause=0.005)
    await s.in_sync()
    await s.write(0, 60)


async def restart(s: Script) -> None:
    """Both nodes are stopped cleanly and started (semantics 4)."""
    world = s.world
    await _load(s)
    s.arm()
    await s.stop(world.a)
    await _load(s)
    await s.stop(world.remotes[0])
    await _load(s)
    await s.up(world.remotes[0])
    await s.in_sync()


async def kill(s: Script) -> None:
    """Both nodes are killed and started: redo (O19, O23)."""
    world = s.world
    await _load(s)
    s.arm()
    s.kill(world.a)
    await _load(s)
    s.kill(world.remotes[0])
    await _load(s)
    await s.up(world.remotes[0])
    await s.in_sync()


async def power(s: Script) -> None:
    """Both nodes lose power at once; what counts is their recovery (faults 2-6)."""
    world = s.world
    await s.write(0, 100, count=BLOCK)
    await _load(s)
    s.power_cut(world.a, world.remotes[0])
    s.arm()
    await _load(s)
    await s.up(world.remotes[0])
    await s.in_sync()


async def power_in_resync(s: Script) -> None:
    """Both nodes lose power in the middle of a resync (M10, O12)."""
    world = s.world
    await _overflowed(s)
    s.link(up=True)
    while world.a.node is not None and world.a.node.primary is not None:
        progress = world.a.node.primary.remotes[0].progress
        if progress is not None and progress.done_bytes > 0:
            break
        await asyncio.sleep(0.000_5)
    await s.write(0, 33, count=2)
    s.power_cut(world.a, world.remotes[0])
    s.arm()
    await _load(s)
    await s.up(world.remotes[0])
    await s.in_sync()


async def recovery_cut(s: Script) -> None:
    """Power fails, and again while both recover; what counts is the second recovery (fault 5)."""
    world = s.world
    a, b = world.a, world.remotes[0]
    await s.write(0, 100, count=BLOCK)
    await _load(s)
    s.power_cut(a, b)
    for host in (a, b):
        await s.starting(host)
        await asyncio.sleep(0.002)
        s.power_cut(host)
    s.arm()
    await _load(s)
    await s.up(b)
    await s.in_sync()


async def kill_after_power(s: Script) -> None:
    """A primary that lost power is killed while it recovers, and the secondary too."""
    world = s.world
    a, b = world.a, world.remotes[0]
    await _load(s)
    s.power_cut(a)
    await s.starting(a)
    await asyncio.sleep(0.002)
    s.kill(a)
    s.kill(b)
    s.arm()
    await _load(s)
    await s.up(b)
    await s.in_sync()


async def commands(s: Script) -> None:
    """Replication is paused and goes on; the secondary is frozen, loses power, and thaws (V8)."""
    await _load(s)
    s.arm()
    await s.pause(on=True)
    await s.write(0, 70, count=2)
    await s.pause(on=False)
    await s.freeze(on=True)
    await _load(s)
    s.power_cut(s.world.remotes[0])
    await s.write(0, 70, count=2)
    await s.up(s.world.remotes[0])
    await s.freeze(on=False)
    await s.in_sync()


async def snapshots(s: Script) -> None:
    """Three are taken, what they need is kept, and the middle one goes (V9, O21)."""
    await _load(s)
    s.arm()
    first = await s.snapshot()
    await s.write(0, 0, 40, count=3)
    second = await s.snapshot()
    await s.clear(0, 16, 3 * BLOCK, "trim")
    await s.write(1, 2, fua=True)
    await s.snapshot()
    await s.write(0, 1, 41, count=2)
    await s.delete(second)
    await s.in_sync()
    await s.delete(first)


async def restore(s: Script) -> None:
    """A restore, writes while it is copied, and back (V10-V12)."""
    await _load(s)
    uuid = await s.snapshot()
    await s.write(0, 0, 40, count=2 * BLOCK)
    await s.write(1, 2, count=4)
    s.arm()
    await s.restore(uuid)
    await s.write(0, 44, fua=True)
    await s.write(0, 2, 90)
    await s.in_sync()


async def written(s: Script) -> None:
    """One is written into, over a kill, another is taken anew, and the first is restored (V9, V10);
    power goes while the copy runs."""
    await _load(s)
    first = await s.snapshot()
    await s.write(0, 0, 40, count=3)
    s.arm()
    await s.inscribe(first)
    second = await s.snapshot()
    await s.write(0, 2, 60, count=2)
    s.kill(s.world.a)
    await s.inscribe(first)
    await s.refresh(second)
    await s.inscribe(first)
    await s.restore(first)
    s.power_cut(s.world.a)
    await s.write(0, 44, fua=True)
    await s.in_sync()


async def spill(s: Script) -> None:
    """A log in memory, past its threshold and around the ring, through a kill, a power cut and a
    clean stop (M4)."""
    world = s.world
    await _load(s)
    await s.in_sync()
    s.arm()
    s.link(up=False)
    for turn in range(3):
        await s.write(0, 8 * turn, count=BLOCK, pause=0.01)
    await s.flush()
    await s.write(1, 5, count=2)
    s.kill(world.a)
    await _load(s)
    s.link(up=True)
    await s.in_sync()
    await s.write(0, 40, 60, count=BLOCK)
    s.power_cut(world.a)
    await _load(s)
    await s.in_sync()
    s.link(up=False)
    await s.write(0, 80, count=BLOCK)
    await s.stop(world.a)
    s.link(up=True)
    await _load(s)
    await s.in_sync()


async def facets(s: Script) -> None:
    """A facet is taken out and comes back, once from the log, once from its own map; past the log
    one of two remotes is tracked too, and the other is not disturbed (M1, M7, M8)."""
    await _load(s)
    await s.in_sync()
    s.arm()
    await s.facet("offline", "/facets/v0.1")
    await s.write(0, 8, 40, count=4)
    await s.clear(0, 16, 8, "trim")
    await s.facet("online", "/facets/v0.1")
    await s.facets_back()
    s.link(up=False, name="c")
    await s.facet("offline", "/facets/v0.0")
    for turn in range(13):
        await s.write(0, 4 * turn, count=BLOCK, pause=0.02)
    await s.clear(1, 0, 2 * BLOCK, "trim")
    await s.flush()
    await s.facet("online", "/facets/v0.0")
    await s.write(0, 5, 90, count=2)
    s.link(up=True)
    await s.facets_back()
    await s.in_sync()
    await s.read(0, 0, 8 * BLOCK)


async def other_disks(s: Script) -> None:
    """A facet is added and one replaced, a remote removed and added again, the log moved, while a
    client writes; the node is killed and stopped over it (M13, M17)."""
    world = s.world
    await _load(s)
    await s.in_sync()
    s.arm()
    await s.facet("add", "/facets/more", "v1")
    await s.write(1, 2, count=3)
    await s.facet("offline", "/facets/v0.0")
    await s.facet("replace", "/facets/v0.0", "/facets/other")
    await s.write(0, 3, 44, count=2)
    s.kill(world.a)
    await s.facets_back()
    await s.remote("remove", world.remotes[1])
    await _load(s)
    await s.replace_log("/logs/1")
    await s.write(0, 60, fua=True)
    await s.remote("add", world.remotes[1])
    await s.in_sync()
    await s.stop(world.a)
    await _load(s)
    await s.in_sync()


async def log_lost(s: Script) -> None:
    """The log's disk is lost; what goes on in memory meets an outage and a kill, and another disk
    is put in (M13)."""
    world = s.world
    await _load(s)
    await s.in_sync()
    s.spoil("/state/log")
    await s.write(0, 40, count=2)
    await s.until(lambda node: bool(node.status()["log"]["in_memory"]))
    s.arm()
    await _load(s)
    s.link(up=False)
    for turn in range(13):
        await s.write(0, 4 * turn, count=BLOCK, pause=0.01)
    await s.flush()
    s.link(up=True)
    await s.in_sync()
    await s.write(0, 50, 60, count=2)
    s.kill(world.a)
    await _load(s)
    await s.in_sync()
    await s.replace_log("/logs/1")
    await _load(s)
    s.kill(world.a)
    await _load(s)
    await s.in_sync()


async def no_facet(s: Script) -> None:
    """The only facet of a volume is lost: the volume goes on through the remote, over a kill and a
    clean stop, and the facet comes back while a client writes (M5, M11)."""
    world = s.world
    await _load(s)
    await s.in_sync()
    s.spoil("/facets/v0.0")
    await s.write(0, 40, count=2)
    await s.until(lambda node: not node.volumes[0].in_service())
    s.arm()
    await _load(s)
    await s.read(0, 0, 8 * BLOCK)
    s.link(up=False)
    world.spawn(_link_back(s))
    for turn in range(13):  # until the log is full
        await s.write(0, 4 * turn, count=BLOCK, pause=0.01)
    await s.write(0, 44, fua=True)
    await s.read(0, 40, BLOCK)
    s.kill(world.a)
    await _load(s)
    await s.read(0, 0, 8 * BLOCK)
    await s.stop(world.a)
    await _load(s)
    s.mend("/facets/v0.0")
    await s.facet("online", "/facets/v0.0")
    await s.write(0, 2, 90, count=3)
    await s.facets_back()
    await s.read(0, 0, 8 * BLOCK)
    await s.in_sync()


async def _link_back(s: Script) -> None:
    await asyncio.sleep(0.4)
    s.link(up=True)


async def create(s: Script) -> None:
    """From nothing to the first synchronisation (O18): operations count from ``create`` on."""
    await _load(s)


Scenario = Callable[[Script], Awaitable[None]]
PAIRS = replace(OPTIONS, facets=2, remotes=2)
OTHERS = {
    "spill": replace(OPTIONS, spill=8 * KIB, facets=2),
    "facets": PAIRS,
    "other disks": PAIRS,
    # With one facet a fault of it leaves the remote alone to say what was written before a kill.
    "log lost": replace(OPTIONS, facets=2),
    "no facet": replace(OPTIONS, last_facet=True),
}


def options_of(scenario: str) -> Options:
    """What the nodes of a scenario are like."""
    return OTHERS.get(scenario, OPTIONS)


SCENARIOS: dict[str, Scenario] = {
    "write": write,
    "overflow": overflow,
    "resync": resync,
    "full resync": full_resync,
    "restart": restart,
    "kill": kill,
    "power": power,
    "power in resync": power_in_resync,
    "recovery cut": recovery_cut,
    "kill after power": kill_after_power,
    "commands": commands,
    "snapshots": snapshots,
    "restore": restore,
    "create": create,
    "spill": spill,
    "facets": facets,
    "other disks": other_disks,
    "log lost": log_lost,
    "no facet": no_facet,
    "written snapshot": written,
}
