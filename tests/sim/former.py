"""A link that is lost while the secondary punches a hole, and a write to that range (I2, F1).

The hole is punched in a thread, for seconds: what the next session copies there must not be under
it in the end. Of seeds that are drawn one in many thousands comes by this.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from tests.sim.convergence import run_in
from tests.sim.faults import Fault, Kind
from tests.sim.options import Options
from tests.sim.oracle import Violation, compare
from tests.sim.script import BLOCK, OPTIONS, Script
from tests.sim.swarm import Result
from tests.sim.world import World

PUNCH_SECONDS = 3.0
SYNC_SECONDS = 60.0
HOLES = 4
"""Regions."""


def run(seed: int, *, options: Options | None = None) -> Result:
    """As a run of the swarm is."""
    world = World(seed, OPTIONS, trace=None)
    problem = None
    try:
        run_in(world, _play(world))
    except Violation as error:
        problem = str(error)
    loop = world.loop
    return Result(
        seed, problem, problem is not None, "", loop.steps, loop.time(), Counter(world.fired)
    )


async def _play(world: World) -> None:
    world.build()
    script = Script(world, lambda: None)
    for host in world.hosts.values():
        await world.create(host)
        assert await world.start(host)
    (secondary,) = world.remotes
    await script.in_sync()
    await script.write(0, *range(0, HOLES * BLOCK, BLOCK), count=BLOCK)
    await script.in_sync()
    script.link(up=False)
    for turn in range(13):  # until the log is full: what is cleared then travels as holes
        await script.write(1, turn % 4 * BLOCK, count=BLOCK, pause=0.02)
    await script.clear(0, 0, HOLES * BLOCK, "trim")
    punching = asyncio.Event()

    def slow(operation: str, path: str, nth: int) -> Fault | None:
        if operation != "punch" or punching.is_set():
            return None
        punching.set()
        return Fault(Kind.STALL, seconds=PUNCH_SECONDS)

    secondary.disk.faults = slow
    script.link(up=True)
    async with asyncio.timeout(SYNC_SECONDS):
        await punching.wait()
    world.net.reset("a", "b")
    await script.write(0, *range(0, HOLES * BLOCK, BLOCK), count=1)
    await asyncio.sleep(2 * PUNCH_SECONDS)
    await script.in_sync()
    compare(secondary.images(), world.a.images(), "in sync, after a lost link (I2)")
