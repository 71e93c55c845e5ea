"""A client that rewrites the volume faster than the link: the time to in-sync is bounded (X3).

In virtual time, so the bound is exact: what ``core.convergence`` foretells must be what happens.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from nbdmirror.engine import verify
from nbdmirror.engine.verify import Verify
from tests.sim import convergence
from tests.sim.options import KIB, constants
from tests.sim.oracle import compare
from tests.sim.script import OPTIONS
from tests.sim.world import World

VOLUME = 512 * KIB
LINK = 40 * KIB
"""Bytes a second."""
CELL = 4 * KIB


async def _begin(world: World) -> None:
    world.build()
    for host in world.hosts.values():
        await world.create(host)
    for ends in (("a", "b"), ("b", "a")):
        world.net.link(*ends).bandwidth = LINK
    for host in world.hosts.values():
        assert await world.start(host)


def _world(seed: int, *, log: int, on_full: str = "dcm") -> World:
    options = replace(
        OPTIONS,
        sizes=(VOLUME,),
        region=16 * KIB,
        extent=64 * KIB,
        log_size=log,
        remote_log_size=log,
        on_full=on_full,
    )
    return World(seed, options, trace=None)


def _run(world: World, main: object) -> object:
    with constants(world.options.constants):
        try:
            return world.loop.run_until_complete(main)
        finally:
            for host in world.hosts.values():
                host.life.alive = False
            world.loop.close()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("load", [0.3, 0.9, 1.5])
def test_in_sync_in_bounded_time(seed: int, load: float) -> None:
    """Passes, then in order, with a log that can hold the end; no overflow on the way."""
    world = _world(seed, log=16 * 1024 * KIB)

    async def main() -> float:
        await _begin(world)
        writer = world.spawn(convergence.rewrite(world, load * LINK, CELL))
        node = world.a.node
        assert node is not None and node.primary is not None
        began = world.loop.time()
        await world.in_life(world.a, node.wait("in-sync", None, 600.0))
        took = world.loop.time() - began
        assert world.fired["event overflow"] == 0
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
        await world.in_life(world.a, node.wait("in-sync", None, 600.0))
        compare(world.remotes[0].images(), world.a.images(), "in sync")
        return took

    took = _run(world, main())
    assert isinstance(took, float)
    copying = VOLUME / LINK
    # The first pass, the copies at half of the link, the backlog of both.
    bound = copying * (1 + 2 * (1 + load) + 2 * load) + 15
    assert took <= bound, f"{took:.0f} s, foretold were {bound:.0f}"


@pytest.mark.parametrize("seed", range(len(convergence.LOADS)))
def test_a_volume_that_differs_everywhere_is_in_sync_in_bounded_time(seed: int) -> None:
    """Records and copies share the link, and neither starves the other."""
    assert convergence.run(seed).problem is None


def test_a_log_that_blocks_needs_no_size() -> None:
    """``on_full = "block"``: a log far smaller than the volume; writes wait, and it ends."""
    world = _world(1, log=68 * KIB, on_full="block")

    async def main() -> float:
        await _begin(world)
        world.spawn(convergence.rewrite(world, 3 * LINK, CELL))
        node = world.a.node
        assert node is not None
        began = world.loop.time()
        await world.in_life(world.a, node.wait("in-sync", None, 600.0))
        assert world.fired["event overflow"] == 0
        return world.loop.time() - began

    took = _run(world, main())
    assert isinstance(took, float) and took <= 6 * VOLUME / LINK


@pytest.mark.parametrize("told", [True, False])
def test_a_verify_under_load_makes_no_false_alarm(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a client writes between the two hashes is no difference (peers 26); a verify that is
    not told of writes would find some."""
    if not told:
        monkeypatch.setattr(Verify, "mark", lambda self, volume, offset, length: None)
        monkeypatch.setattr(verify, "SEEN_MIN", 1)
    world = _world(3, log=1024 * KIB)

    async def main() -> None:
        await _begin(world)
        world.net.heal_all()
        for ends in (("a", "b"), ("b", "a")):
            world.net.link(*ends).bandwidth = None
        node = world.a.node
        assert node is not None
        await world.in_life(world.a, node.wait("in-sync", None, 300.0))
        world.spawn(convergence.rewrite(world, 4096 * KIB, CELL))
        for _ in range(5):
            await world.in_life(world.a, node.verify("b", False))
            await world.in_life(world.a, node.wait("verified", None, 300.0))
        result = node.status()["remotes"][0]["verify"]
        assert (result["differing"] == 0) == told and result["unsettled"] == 0, result

    _run(world, main())
    assert (world.violation is None) == told, "which a verify-differs is"


def test_a_link_that_flaps_makes_progress_and_no_storm() -> None:
    """Up for 4 s, down for 2, a log that is too small for the rest: what is marked shrinks from
    flap to flap, overflows are few, and it ends when the link stays (peers 12)."""
    world = _world(2, log=260 * KIB)

    async def main() -> list[int]:
        await _begin(world)
        writer = world.spawn(convergence.rewrite(world, LINK / 8, CELL))
        node = world.a.node
        assert node is not None and node.primary is not None
        remote = node.primary.remote("b")
        marked = [remote.dirty_bytes]
        for _ in range(20):
            await asyncio.sleep(4.0)
            world.net.cut("a", "b")
            world.net.reset("a", "b")
            await asyncio.sleep(2.0)
            world.net.heal("a", "b")
            marked.append(remote.dirty_bytes)
        assert world.fired["event overflow"] <= 6
        await world.in_life(world.a, node.wait("in-sync", None, 300.0))
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
        return marked

    marked = _run(world, main())
    assert isinstance(marked, list)
    assert marked[-1] <= marked[0] // 4, marked
