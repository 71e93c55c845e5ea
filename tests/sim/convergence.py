"""A client that rewrites the volume faster than the link: the time to in-sync is bounded (X3).

In virtual time, so the bound is exact: what ``core.convergence`` foretells must be what happens.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace

from nbdmirror.codec import record as codec
from nbdmirror.engine.volume import Change
from nbdmirror.errors import NbdmirrorError, TimedOut
from tests.sim.options import KIB, SMALL, Options, constants
from tests.sim.oracle import Violation, compare, pattern
from tests.sim.script import OPTIONS
from tests.sim.swarm import Result
from tests.sim.world import Gone, World

MIB = 1024 * KIB
VOLUME = 2 * MIB
LINK = 320 * KIB
"""Bytes a second: a copy of the volume takes 6 s."""
CELL = 16 * KIB
LOADS = (0.3, 0.9, 1.2)
"""Of the link: what the client writes."""


async def rewrite(world: World, rate: float, cell: int) -> None:
    """Writes the volume over and over again, ``cell`` bytes at random, ``rate`` bytes a second."""
    rng = random.Random(f"{world.seed}:rewrite")
    while True:
        node = world.a.node
        if node is None or node.primary is None:
            await asyncio.sleep(0.1)
            continue
        offset = rng.randrange(node.volumes[0].size // cell) * cell
        payload = pattern(rng.randrange(1 << 30), cell)
        change = Change(codec.WRITE, 0, offset, cell, memoryview(payload))
        rest = node.primary.group.write(node.volumes[0], [change])
        if rest is not None:
            try:
                await world.in_life(world.a, rest)
            except (Gone, NbdmirrorError):
                continue
        await asyncio.sleep(cell / rate)


async def _begin(world: World) -> None:
    world.build()
    for host in world.hosts.values():
        await world.create(host)
    for ends in (("a", "b"), ("b", "a")):
        world.net.link(*ends).bandwidth = LINK
    assert await world.start(world.a)
    node = world.a.node
    assert node is not None and node.primary is not None
    for offset in range(0, VOLUME, CELL):  # a hole would cost the link nothing
        payload = memoryview(pattern(1 + offset, CELL))
        change = Change(codec.WRITE, 0, offset, CELL, payload)
        rest = node.primary.group.write(node.volumes[0], [change])
        if rest is not None:
            await world.in_life(world.a, rest)
    for host in world.remotes:
        assert await world.start(host)


def _world(seed: int) -> World:
    options = replace(
        OPTIONS,
        sizes=(VOLUME,),
        region=64 * KIB,
        window=8 * MIB,
        extent=256 * KIB,
        log_size=16 * MIB,
        remote_log_size=16 * MIB,
        constants={**SMALL, "engine.housekeeper.INTERVAL_SECONDS": 0.3},
    )
    return World(seed, options, trace=None)


def run_in(world: World, main: object) -> object:
    with constants(world.options.constants):
        try:
            return world.loop.run_until_complete(main)
        finally:
            for host in world.hosts.values():
                host.life.alive = False
            world.loop.close()


def run(seed: int, *, options: Options | None = None) -> Result:
    """A first synchronisation under load, as a run of the swarm is: passes, then in order, with a
    log that can hold the end; no overflow on the way."""
    world = _world(seed)
    problem = None
    try:
        run_in(world, _in_sync(world, LOADS[seed % len(LOADS)]))
    except Violation as error:
        problem = str(error)
    loop = world.loop
    return Result(
        seed, problem, problem is not None, "", loop.steps, loop.time(), Counter(world.fired)
    )


async def _in_sync(world: World, load: float) -> None:
    await _begin(world)
    writer = world.spawn(rewrite(world, load * LINK, CELL))
    node = world.a.node
    assert node is not None and node.primary is not None
    # The first pass, the copies at half of the link, the backlog of both.
    bound = VOLUME / LINK * (1 + 2 * (1 + load) + 2 * load) + 15
    try:
        await world.in_life(world.a, node.wait("in-sync", None, bound))
    except TimedOut:
        raise Violation(f"not in sync after {bound:.0f} s, as foretold (X3)") from None
    if world.fired["event overflow"]:
        raise Violation("the log overflowed on the way (X3)")
    writer.cancel()
    await asyncio.gather(writer, return_exceptions=True)
    await world.in_life(world.a, node.wait("in-sync", None, 600.0))
    compare(world.remotes[0].images(), world.a.images(), "in sync")
