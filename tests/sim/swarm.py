"""One seed, from its options to its verdict: a phase of faults, then one in which all must heal."""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from nbdmirror.errors import NbdmirrorError
from tests.sim import snapshots
from tests.sim.astray import Astray
from tests.sim.checks import Checks
from tests.sim.loop import Deadlock, Livelock, SimLoop
from tests.sim.marks import counting
from tests.sim.mishaps import Faults
from tests.sim.options import Options, constants, draw
from tests.sim.oracle import Defect, Moot, Violation, compare
from tests.sim.snapshots import People
from tests.sim.workload import Clients
from tests.sim.world import Gone, World

HEAL_SECONDS = 900.0
"""Of virtual time: within these everything is in sync once the faults are over (I2)."""
CLIENT_SECONDS = 300.0
"""Of virtual time, for the clients to get done while things break."""
RUN_SECONDS = 8000.0
"""Of virtual time: no run takes that long."""


Play = Callable[[World, Checks, Faults], Awaitable[asyncio.Future[None]]]
"""The phase of faults, from two nodes that run on: what it returns may still need the healing."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a seed; ``problem`` is None if every promise was kept, and ``seen`` true if
    the oracle saw one broken: that is more than code that raises what it should not."""

    seed: int
    problem: str | None
    seen: bool
    digest: str
    steps: int
    seconds: float
    fired: Counter[str]


def run(
    seed: int,
    *,
    options: Options | None = None,
    trace: Callable[[str], None] | None = None,
    play: Play | None = None,
) -> Result:
    """Runs a seed. ``play``: what happens instead of what is drawn (``tests.sim.directed``)."""
    options = options or draw(seed)
    world = World(seed, options, trace=trace)
    loop = world.loop
    problem, seen = None, False
    with constants(options.constants), counting(world.fired):
        try:
            loop.run_until_complete(_run(world, play or _chance))
        except Moot:
            world.fired["moot"] += 1
        except Exception as error:
            problem = "".join(traceback.format_exception(error)[-3:])
            broken = isinstance(error, (Violation, Deadlock, Livelock))
            seen = broken and not isinstance(error, Defect)
        for host in world.hosts.values():
            host.life.alive = False
        loop.close()
    if problem is None and loop.errors:
        problem = _describe(loop)
    return Result(
        seed,
        problem,
        seen,
        world.digest.hexdigest(),
        loop.steps,
        loop.time(),
        _counts(world),
    )


def _describe(loop: SimLoop) -> str:
    lines = []
    for context in loop.errors[:3]:
        error = context.get("exception")
        lines.append(str(context.get("message")))
        if isinstance(error, BaseException):
            lines.append("".join(traceback.format_exception(error)[-4:]))
    return "\n".join(lines)


def _counts(world: World) -> Counter[str]:
    fired = Counter(world.fired)
    if hasattr(world, "net"):
        fired.update({f"net {kind}": count for kind, count in world.net.fired.items()})
    for host in world.hosts.values():
        fired.update({f"disk {kind}": count for kind, count in host.disk.fired.items()})
    return fired


async def _run(world: World, play: Play) -> None:
    world.build()
    work = asyncio.ensure_future(_phases(world, play))
    broken = asyncio.ensure_future(world.broken.wait())
    ends: list[asyncio.Future[Any]] = [work, broken]
    await asyncio.wait(ends, timeout=RUN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    broken.cancel()
    if not (work.done() or broken.done()):
        raise Violation(f"the run does not end; waiting: {world.loop.pending_names()}")
    if world.violation is not None:
        work.cancel()
        raise world.violation
    work.result()
    if world.violation is not None:
        raise world.violation


async def _phases(world: World, play: Play) -> None:
    for host in world.hosts.values():
        await world.create(host)
    for host in world.hosts.values():
        if not await world.start(host):
            raise Violation(f"{host.name} does not start: {host.failed}")
    checks = Checks(world)
    world.on_flushed = checks.flushed
    faults = Faults(world)
    working = await play(world, checks, faults)
    await _converge(world, checks, faults, working)
    await _stop_and_compare(world, checks)


async def _chance(world: World, checks: Checks, faults: Faults) -> asyncio.Future[None]:
    """Clients, people and faults as they are drawn; returns the clients' work."""
    clients = Clients(world)
    people = People(world)
    background = [world.spawn(work.run()) for work in (checks, faults, faults.held)]
    world.spawn(people.run())
    working = asyncio.ensure_future(clients.run())
    # A full log that blocks, and a link that is down: they may need the healing themselves.
    await asyncio.wait([working], timeout=CLIENT_SECONDS)
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    return working


async def _converge(
    world: World, checks: Checks, faults: Faults, working: asyncio.Future[None]
) -> None:
    """Liveness: everything is up and healthy; it must come in sync by itself (I2)."""
    for _ in range(5):
        try:
            await faults.heal()
            world.trace("world", "healed")
            await asyncio.wait([working], timeout=HEAL_SECONDS)
            if not working.done():
                raise Violation("requests of clients hang though nothing is broken (I8)")
            await _copied(world)
            await _in_sync(world)
            await _facets_in_sync(world)
        except Gone:
            continue  # an error from before has only now been noticed
        break
    else:
        raise Violation("nodes go on failing though nothing is broken")
    for remote in world.remotes:
        compare(remote.images(), world.a.images(), f"{remote.name} in sync (I2)")
    checks.look()
    await snapshots.look(world)
    world.album.check_followed()
    world.album.check_released()
    await world.rot.run()
    await Astray(world).run()
    checks.crash_clone_of_one()


async def _in_sync(world: World) -> None:
    node = world.a.node
    assert node is not None and node.primary is not None
    try:
        await world.in_life(world.a, node.wait("in-sync", None, HEAL_SECONDS))
    except NbdmirrorError as error:
        if any(host.node is None for host in world.hosts.values()):
            raise Gone from error
        leaning = [volume.name for volume in node.volumes if not volume.in_service()]
        if leaning and world.fired["event facets-rejoin"]:
            why = f"{leaning}: all facets failed, and the disk that stood in was replaced"
            raise Moot(why) from None
        states = [(r.name, r.state, r.link, r.status(0, 0)["why"]) for r in node.primary.remotes]
        raise Violation(f"not in sync after {HEAL_SECONDS} s: {states} ({error})") from None


async def _copied(world: World) -> None:
    """What people have begun comes to its end by itself, and they begin nothing more."""
    world.people_rest = True
    await asyncio.sleep(1.0)
    for _ in range(int(HEAL_SECONDS)):
        node = world.a.node
        if node is None:
            raise Gone
        resting = not (node.snapshots.lock.locked() or world.beside.pending)
        if node.status()["restore"] is None and resting:
            return
        await asyncio.sleep(1.0)
    if node is not None and "could not be read for it" in str(node.status()["restore"]):
        raise Moot("what a restore was to bring back is lost")
    raise Violation("a restore, or a change beside the write path, does not come to its end")


async def _facets_in_sync(world: World) -> None:
    """Every local facet comes back by itself."""
    node = world.a.node
    end = world.loop.time() + HEAL_SECONDS
    while node is not None and not all(f.in_service for v in node.volumes for f in v.facets):
        if world.loop.time() > end:
            raise Violation(f"facets do not come back: {node.facet_list()} (M8)")
        for facet in node.facet_list():
            if facet["offline"]:  # by a command that the end of the faults has overtaken
                await world.in_life(world.a, node.facet("online", facet["path"]))
        await asyncio.sleep(0.1)
        node = world.a.node
    if node is None:
        raise Gone
    world.witness.check_facets(world.a, node)


async def _stop_and_compare(world: World, checks: Checks) -> None:
    """A clean stop of everything leaves equal disks, and nothing to redo."""
    for host in world.hosts.values():
        await world.stop(host)
    a = world.a.images()
    line = world.history.lines[-1]
    compare(a, line.image(line.head), "the primary after a clean stop")
    for remote in world.remotes:
        compare(remote.images(), a, f"{remote.name} after a clean stop")
        for index, volume in enumerate(remote.config.volumes):
            for path in volume.facets:
                content = remote.disk.content(path)[: volume.size]
                compare([content], [a[index]], f"{path} of {remote.name} at the end")
    checks.crash_clone_of_one()
    for index, volume in enumerate(world.a.config.volumes):
        for path in volume.facets:
            compare([world.a.disk.content(path)[: volume.size]], [a[index]], f"{path} at the end")
