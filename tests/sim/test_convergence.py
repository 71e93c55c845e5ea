"""A client that rewrites the volume faster than the link: the time to in-sync is bounded (X3).

In virtual time, so the bound is exact: what ``core.convergence`` foretells must be what happens.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.engine import verify
from nbdmirror.engine.node import Node
from nbdmirror.engine.receiver import Receiver
from nbdmirror.engine.resync import LOG_SHARE
from nbdmirror.engine.verify import Verify
from nbdmirror.engine.volume import Change
from tests.sim import convergence
from tests.sim.options import KIB, constants
from tests.sim.oracle import compare, pattern
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


def _world(seed: int, *, log: int, on_full: str = "dcm", facets: int = 1) -> World:
    options = replace(
        OPTIONS,
        facets=facets,
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


@pytest.mark.parametrize("enough", [True, False])
def test_what_the_log_must_hold_for_a_client_faster_than_the_link(
    enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X3: what is left is copied at half of the link. Meanwhile, at ``load`` times the link, 2 load
    - 1 times as much piles up in the log, and load times that until it has travelled. No order of
    sending does with less than load * load. With so much the remote is in sync in the time told,
    and nothing overflows; with half of that it never is: overflows are few, and it is said why."""
    volume, link, load = 512 * KIB, 80 * KIB, 1.5
    for name, value in (("VOLUME", volume), ("LINK", link), ("CELL", CELL)):
        monkeypatch.setattr(convergence, name, value)
    least = load * (2 * load - 1 if enough else load / 2) * volume
    # What has headers, and is not acknowledged yet, is a tenth at the most.
    log = round(1.1 * least / LOG_SHARE) // 4096 * 4096
    base = convergence._world(1)
    base.loop.close()
    options = replace(base.options, log_size=log, remote_log_size=log)
    world = World(1, options, trace=None)
    bound = volume / link * (1 + 2 * (1 + load) + 2 * load) + 15

    async def main() -> None:
        await convergence._begin(world)
        world.spawn(convergence.rewrite(world, load * link, CELL))
        node = world.a.node
        assert node is not None
        if enough:
            await world.in_life(world.a, node.wait("in-sync", None, bound))
            assert world.fired["event overflow"] == 0
            return
        told = []
        for _ in range(100):
            await asyncio.sleep(2.0)
            status = node.status()["remotes"][0]
            assert status["state"] != "synchronised"
            told.append((status["why"], status["next_action"]))
        assert any("the log needs" in why and "larger log" in (do or "") for why, do in told)
        assert 1 <= world.fired["event overflow"] <= 6

    convergence.run_in(world, main())


def test_the_end_comes_when_it_was_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    """X3, peers 25: the ETA of a copy that nothing disturbs, at any moment of it; what is done
    never falls, nor passes the whole."""
    monkeypatch.setattr(convergence, "VOLUME", VOLUME)
    monkeypatch.setattr(convergence, "LINK", LINK)
    world = _world(9, log=1024 * KIB)

    async def main() -> tuple[list[tuple[float, float]], float]:
        await convergence._begin(world)
        node = world.a.node
        assert node is not None
        foretold, done = [], 0
        while node.status()["remotes"][0]["state"] != "synchronised":
            resync = node.status()["remotes"][0]["resync"]
            if resync is not None and resync["pass"] == 1:
                assert done <= resync["done_bytes"] <= resync["total_bytes"] == VOLUME
                done = resync["done_bytes"]
                if done > VOLUME // 4 and resync["eta_s"] is not None:
                    foretold.append((world.loop.time(), resync["eta_s"]))
            await asyncio.sleep(0.5)
        return foretold, world.loop.time()

    result = _run(world, main())
    assert isinstance(result, tuple)
    foretold, end = result
    assert len(foretold) > 5
    for now, eta in foretold:
        assert abs(now + eta - end) <= 0.3 * (end - now) + 1.5, (now, eta, end)


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
        differing = 0
        for _ in range(5):
            await world.in_life(world.a, node.verify("b", False))
            await world.in_life(world.a, node.wait("verified", None, 300.0))
            result = node.status()["remotes"][0]["verify"]
            differing += result["differing"]
            assert result["unsettled"] == 0, result
        assert (differing == 0) == told

    _run(world, main())
    assert (world.violation is None) == told, "which a verify-differs is"


async def _in_sync_unshaped(world: World) -> Node:
    await _begin(world)
    for ends in (("a", "b"), ("b", "a")):
        world.net.link(*ends).bandwidth = None
    node = world.a.node
    assert node is not None and node.primary is not None
    await world.in_life(world.a, node.wait("in-sync", None, 300.0))
    return node


def test_a_verify_keeps_its_rate_beside_clients() -> None:
    """X6, "at a stated rate": what it waits for its rate is not work that it has to rest for."""
    world = _world(4, log=1024 * KIB)

    async def main() -> float:
        node = await _in_sync_unshaped(world)
        assert node.primary is not None
        node.primary.remote("b").facts["verify_rate"] = 64 * KIB
        began = world.loop.time()
        await world.in_life(world.a, node.verify("b", False))
        world.spawn(convergence.rewrite(world, 64 * KIB, CELL))
        # The export would tell the governor of a client.
        node.primary.governor._activity = lambda: world.loop.now_ns
        await world.in_life(world.a, node.wait("verified", None, 300.0))
        return world.loop.time() - began

    took = _run(world, main())
    assert isinstance(took, float)
    assert 0.9 * VOLUME / (64 * KIB) <= took <= 1.5 * VOLUME / (64 * KIB), took


def test_a_verify_repairs_more_than_it_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """X6: a whole copy that is another one: found, told of in part, and repaired as a whole."""
    monkeypatch.setattr(verify, "FOUND_MAX", 2)
    world = _world(5, log=1024 * KIB)

    async def main() -> None:
        node = await _in_sync_unshaped(world)
        region = node.volumes[0].region_size
        for index in range(5):
            world.rot.wanted["v0", index * region] = None
            world.remotes[0].disk.flip("/facets/v0.0", index * region + 7)
        await world.in_life(world.a, node.verify("b", True))
        await world.in_life(world.a, node.wait("verified", None, 300.0))
        await world.in_life(world.a, node.wait("in-sync", None, 300.0))
        found = node.status()["remotes"][0]["verify"]
        assert (found["differing"], found["repaired"]) == (5, 5), found
        assert node.status()["remotes"][0]["next_action"] is None
        compare(world.remotes[0].images(), world.a.images(), "repaired")

    _run(world, main())
    assert world.violation is None


def test_a_remote_does_not_get_what_has_rotted_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """X6: of two facets here one has rotted, in more places than are remembered: those that are
    not are left to the next verify, and are not what the remote is compared with."""
    monkeypatch.setattr(verify, "FOUND_MAX", 2)
    world = _world(6, log=1024 * KIB, facets=2)

    async def main() -> None:
        node = await _in_sync_unshaped(world)
        region = node.volumes[0].region_size
        whole = world.a.images()
        for index in range(5):
            world.rot.wanted["v0", index * region] = None
            world.a.disk.flip("/facets/v0.0", index * region + 7)
        left = []
        for _ in range(3):
            await world.in_life(world.a, node.verify("b", True))
            await world.in_life(world.a, node.wait("verified", None, 300.0))
            await world.in_life(world.a, node.wait("in-sync", None, 300.0))
            found = node.status()["remotes"][0]["verify"]
            left.append(found["differing"] - found["repaired"])
            compare(world.remotes[0].images(), whole, "the remote had not rotted")
        assert left == [3, 1, 0]
        compare(world.a.images(), whole, "mended")

    _run(world, main())
    assert world.violation is None


def test_a_verify_that_waits_says_for_what() -> None:
    """X4, "cause of a stall, next action": the other side's facets are held back (V8)."""
    world = _world(7, log=1024 * KIB)

    async def main() -> None:
        node = await _in_sync_unshaped(world)
        there = world.remotes[0].node
        assert there is not None
        await world.in_life(world.remotes[0], there.apply(True))
        writer = world.spawn(convergence.rewrite(world, 64 * KIB, CELL))
        await asyncio.sleep(1.0)
        writer.cancel()
        await world.in_life(world.a, node.verify("b", False))
        await asyncio.sleep(15.0)
        status = node.status()["remotes"][0]
        assert "b has yet to apply" in status["why"], status
        assert "apply thaw" in status["next_action"] and status["resync"]["eta_s"] is None
        assert world.fired["event verify-stalled"] == 1
        await world.in_life(world.remotes[0], there.apply(False))
        await world.in_life(world.a, node.wait("verified", None, 300.0))
        status = node.status()["remotes"][0]
        assert status["why"] is None and status["next_action"] is None, status

    _run(world, main())
    assert world.violation is None


def test_what_is_under_way_is_bounded_and_a_silent_remote_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """M16, X3: a remote whose disk takes for ever is sent a window and no more; it is said why
    nothing moves, and no end is promised."""
    original, tokens = Receiver._sync_soon, list[int]()

    def sync_soon(self: Receiver, token: int) -> None:
        tokens.append(token)
        if len(tokens) <= 2:  # compared, then copied: it tells how fast the link is
            original(self, token)

    monkeypatch.setattr(Receiver, "_sync_soon", sync_soon)
    world = _world(8, log=1024 * KIB)

    async def main() -> None:
        await _begin(world)
        node = world.a.node
        assert node is not None and node.primary is not None
        remote, volume = node.primary.remote("b"), node.volumes[0]
        for region in range(volume.regions):
            payload = memoryview(pattern(1 + region, volume.region_size))
            change = Change(
                codec.WRITE, 0, region * volume.region_size, volume.region_size, payload
            )
            rest = node.primary.group.write(volume, [change])
            if rest is not None:
                await world.in_life(world.a, rest)
        await asyncio.sleep(60.0)
        status = node.status()["remotes"][0]
        sent = status["resync"]["sent_bytes"]
        window = world.options.window
        done = status["resync"]["done_bytes"]
        assert done < sent <= done + window + 2 * volume.region_size, (done, sent, window)
        assert status["resync"]["eta_s"] is None
        assert "under way" in status["why"] and "b" in status["next_action"], status
        assert world.fired["event resync-stalled"] == 1
        assert remote.dirty_regions >= volume.regions - 1

    _run(world, main())


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
