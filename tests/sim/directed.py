"""Runs in which one sequence of events is played that drawn ones come by in thousands of seeds.

A play (``tests.sim.plays``) is a script (``tests.sim.script``): what it does is the same for every
seed, and the seed draws what the disks and links make of it. Before it the nodes are in sync; after
it the run goes on as that of any seed does: all is mended, and must come in sync, as promised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from tests.sim import swarm
from tests.sim.checks import Checks
from tests.sim.mishaps import Faults
from tests.sim.options import Options
from tests.sim.script import OPTIONS, Script
from tests.sim.swarm import Result
from tests.sim.world import World

Run = Callable[..., Result]


def directed(play: Callable[[Script], Awaitable[None]], **changes: Any) -> Run:
    """A run of the swarm (as ``mutation.RUNS`` has it) that plays this; ``changes`` of options."""
    wanted = replace(OPTIONS, rot=0.0, astray=0.0, replaces=0.0, **changes)

    async def acted(world: World, checks: Checks, faults: Faults) -> asyncio.Future[None]:
        script = Script(world, lambda: None)
        await script.in_sync()
        await play(script)
        done = world.loop.create_future()
        done.set_result(None)
        return done

    def run(
        seed: int, *, options: Options | None = None, trace: Callable[[str], None] | None = None
    ) -> Result:
        return swarm.run(seed, options=wanted, trace=trace, play=acted)

    return run
