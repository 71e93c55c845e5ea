"""``python -m tests.sim.sweep``: every I/O operation of a scenario fails once, in every way.

A scenario (``tests.sim.scenarios``) is run once to list the operations of a node; then again for
each of them and each kind of fault that suits it. The simulation is deterministic, so the run is
the same up to the fault. Afterwards the disk is mended, the node started, and everything must
be as promised: answers, durable data, prefix, convergence, a service that goes on (I1-I5).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field

from nbdmirror.codec import slots
from nbdmirror.engine.facet import FacetState
from nbdmirror.engine.node import Node
from nbdmirror.errors import NbdmirrorError
from tests.sim.ailments import AILMENTS, Fuse
from tests.sim.checks import Checks
from tests.sim.faults import AllLost
from tests.sim.host import Host
from tests.sim.loop import SimLoop
from tests.sim.options import constants
from tests.sim.oracle import Entry, Violation, compare
from tests.sim.pool import ordered
from tests.sim.scenarios import SCENARIOS, options_of
from tests.sim.script import OPTIONS, Script
from tests.sim.snapshots import look
from tests.sim.witness import Witness
from tests.sim.world import Gone, World

NODES = ("a", "b")
SCRIPT_SECONDS = 300.0
"""Of virtual time: a script that takes longer hangs."""
HEAL_SECONDS = 120.0
"""Of virtual time: once everything is healthy the remote is in sync within these (I2)."""
RESTART_SECONDS = 0.3
BATCH = 16


@dataclass(frozen=True, slots=True)
class Point:
    """One run: the ``nth`` operation (from 1) of a node fails. ``nth`` 0: nothing does."""

    scenario: str
    node: str
    ailment: str
    nth: int

    def __str__(self) -> str:
        return f"--scenario {self.scenario!r} --node {self.node} --fault {self.ailment!r} " + (
            f"--point {self.nth}"
        )


@dataclass(slots=True)
class Outcome:
    """What became of a point; ``problem`` is None if every promise was kept."""

    point: Point
    problem: str | None
    operation: str
    """That failed, and on which file."""
    operations: list[tuple[str, str]] = field(default_factory=list)
    """All that counted, of a run in which nothing fails."""
    deaths: int = 0
    marks: int = 0
    succeeded: int = 0


class SweepWitness(Witness):
    """Knows of logs that lost what they had, though the host kept its power."""

    def __init__(self, world: SweepWorld) -> None:
        super().__init__(world)
        self._sweep = world

    def recovered(self, host: Host, node: Node, restored: dict[int, bytes], *, power: bool) -> None:
        """After a failed sync of the log only what was durable counts, as after a power loss; and
        an append that failed in the middle may have brought records into the log."""
        fuse, script, history = (
            self._sweep.fuses[host.name],
            self._sweep.script,
            self._sweep.history,
        )
        lost_log, fuse.lost_log = fuse.lost_log and not power, False
        half = history.head - script.head
        missing = host.end_seq - history.head
        if half >= 0 and 0 < missing <= len(script.last) - half:
            entries = [
                Entry(volume, offset, length, payload or None)
                for (volume, offset, length), payload in zip(
                    script.last, script.payloads, strict=True
                )
            ]
            history.append(history.head + 1, entries[half : half + missing])
        if lost_log:
            self._sweep.content.forget_volatile()
            host.forked = True
        super().recovered(host, node, restored, power=power)


class SweepWorld(World):
    """A world in which each host has a fuse, and one script is played."""

    fuses: dict[str, Fuse]
    script: Script

    def make_witness(self) -> Witness:
        return SweepWitness(self)


class Run:
    """One point, from a fresh pair of nodes to the verdict."""

    def __init__(self, point: Point, trace: Callable[[str], None] | None) -> None:
        self.point = point
        seed = list(SCENARIOS).index(point.scenario)
        self.world = SweepWorld(seed, options_of(point.scenario), trace=trace)
        self.rng = random.Random(str(point))
        self.deaths = 0
        self.marks = 0
        """Failures of a file that were found marked durably."""
        self._second_in = 0

    async def run(self) -> None:
        """Raises what is wrong."""
        world = self.world
        world.build()
        self.context = copy_context()
        ailment = AILMENTS[self.point.ailment]
        world.fuses = {
            name: Fuse(host, ailment, self.point.nth if name == self.point.node else 0, self.strike)
            for name, host in world.hosts.items()
        }
        world.script = Script(world, self._arm)
        self.checks = Checks(world)
        if self.point.scenario == "create":
            self._arm()
        await self._within(self._begin(), "the beginning")
        await self._within(SCENARIOS[self.point.scenario](world.script), "the script")
        await self._within(self._settle(), "the end")

    async def _begin(self) -> None:
        world = self.world
        for host in world.hosts.values():
            await self._create(host)
            world.spawn(self._keep_up(host))
        for host in world.hosts.values():
            await world.script.up(host)
        await world.script.in_sync()

    async def _create(self, host: Host) -> None:
        """A person creates the node: if that fails again, then on a healthy disk."""
        for attempt in range(3):
            if attempt == 2:
                self.world.fuses[host.name].mend()
            try:
                await self.world.create(host, force=attempt > 0)
            except Gone:
                continue
            except NbdmirrorError as error:
                self.world.trace(host.name, f"create: {error}")
                self.world.kill(host)
            else:
                return
        raise Violation(f"{host.name} cannot be created")

    def _arm(self) -> None:
        for fuse in self.world.fuses.values():
            fuse.host.disk.faults = fuse
            fuse.arm()

    async def _within(self, work: Awaitable[None], what: str) -> None:
        task = asyncio.ensure_future(work)
        broken = asyncio.ensure_future(self.world.broken.wait())
        await asyncio.wait(
            [task, broken], timeout=SCRIPT_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        broken.cancel()
        if self.world.violation is not None:
            raise self.world.violation
        if not task.done():
            raise Violation(f"{what} hangs")
        task.result()

    # -- the fault -------------------------------------------------------------------------------

    def strike(self) -> None:
        """Ends the node, in the middle of its operation."""
        host = self.world.hosts[self.point.node]
        ailment = AILMENTS[self.point.ailment]
        fuse = self.world.fuses[host.name]

        def end() -> None:
            if ailment.strike == "kill":
                self.world.kill(host)
                return
            rng = AllLost() if ailment.strike == "lost" else self.rng
            self.world.power_cut(host, rng)
            if ailment.strike == "twice" and not self._second_in:
                self._second_in = self.rng.randint(1, 14)
                fuse.nth += self._second_in

        self.context.copy().run(end)

    # -- who mends and starts --------------------------------------------------------------------

    async def _keep_up(self, host: Host) -> None:
        """Starts a node that is down, as systemd would; the second time its disk is mended."""
        world = self.world
        fuse = world.fuses[host.name]
        failures = 0
        served = False
        while True:
            if host.alive:
                await asyncio.sleep(RESTART_SECONDS)
                continue
            if host.life.number > 1:  # the first was that of ``create``
                self.deaths += 1
                await asyncio.sleep(RESTART_SECONDS)
            if failures:
                fuse.mend()
            failed, host.failed = host.failed, None
            failures += failed is not None
            if failed is not None and served and host.role == "primary":
                self._check_mark(host, failed)
            served = await world.start(host)
            if served:
                self.checks.crash_clone(host, AllLost())
            elif host.failed is not None and fuse.host.disk.faults is None:
                raise Violation(f"{host.name} does not start on a healthy disk: {host.failed}")

    def _check_mark(self, host: Host, failed: str) -> None:
        """What failed for good while the primary served is marked durably, or the next start
        could trust it (O16, M12)."""
        if AILMENTS[self.point.ailment].where == "disk":
            return  # nothing can be written down
        data = host.disk.durable_content("/state/superblock")
        _, _, state = slots.choose(
            [data[at : at + slots.SLOT_SIZE] for at in range(0, len(data), slots.SLOT_SIZE)]
        )
        trusted = [
            facet["path"]
            for volume in state["volumes"]
            for facet in volume["facets"]
            if facet["state"] == FacetState.SYNCHRONISED.value
        ]
        if "of the log" in failed and not state["log_failed"]:
            raise Violation(f"no durable mark of: {failed} (O16)")
        if any(f"facet {path} " in failed for path in trusted):
            raise Violation(f"no durable mark of: {failed} (M12)")
        self.marks += "of the log" in failed or "of facet" in failed

    async def _settle(self) -> None:
        """Everything is healthy: it must serve, and come in sync, by itself."""
        world = self.world
        world.net.heal_all()
        for fuse in world.fuses.values():
            fuse.mend()
        for host in world.hosts.values():
            await world.script.up(host)
        await asyncio.sleep(2 * RESTART_SECONDS)
        await self._facets_back()
        await self._remotes_back()
        for host in world.hosts.values():
            await world.script.up(host)
            assert host.node is not None
            for volume in host.node.volumes:
                if not volume.in_service():
                    raise Violation(f"{host.name} lives on with no facet of {volume.name}")
        script = world.script
        await script.pause(on=False)
        await script.freeze(on=False)
        before = script.succeeded
        await script.write(0, 7, count=3)
        await script.write(1, 2, fua=True)
        await script.flush()
        if script.succeeded != before + 3:
            raise Violation("the mended primary does not serve")
        await self._converge()

    async def _facets_back(self) -> None:
        """A person brings back, at once, what a remote has stood in for (M11)."""
        node = await self.world.script.primary()
        facets = [facet for volume in node.volumes for facet in volume.facets]
        for facet in facets:
            await self.world.in_life(self.world.a, node.facet("online", facet.path))
        end = self.world.loop.time() + HEAL_SECONDS
        while not all(facet.in_service for facet in facets) and self.world.loop.time() < end:
            await asyncio.sleep(0.1)

    async def _remotes_back(self) -> None:
        """A person adds what the script has removed (M17)."""
        node = await self.world.script.primary()
        there = {one["name"] for one in node.remote_list()} | {node.config.node}
        for host in self.world.hosts.values():
            if host.name not in there:
                await self.world.script.remote("add", host)

    async def _converge(self) -> None:
        """In sync, equal, and that durably; and so after a clean stop (I2, I3)."""
        world = self.world
        node = await world.script.primary()
        try:
            await world.in_life(world.a, node.wait("in-sync", None, HEAL_SECONDS))
        except NbdmirrorError as error:
            status = node.status()["remotes"]
            raise Violation(f"never in sync ({error}): {status}") from None
        while node.status()["restore"] is not None:  # the script's time bounds it
            await asyncio.sleep(RESTART_SECONDS)
        self._compare("in sync")
        self.checks.look()
        await look(world)
        for host in world.hosts.values():
            await world.stop(host)
        self._compare("stopped")

    def _compare(self, when: str) -> None:
        world = self.world
        line = world.history.lines[-1]
        for host in world.hosts.values():
            compare(host.images(), line.image(line.head), f"{host.name}, {when} (I2)")
            self.checks.crash_clone(host, AllLost())


def _unseen(loop: SimLoop) -> str:
    """The errors that only a log would have told of."""
    lines = []
    for context in loop.errors[:3]:
        error = context.get("exception")
        lines.append(str(context.get("message")))
        if isinstance(error, BaseException):
            lines += traceback.format_exception(error)[-4:]
    return "\n".join(lines)


def run_point(point: Point, trace: Callable[[str], None] | None = None) -> Outcome:
    """Runs one point."""
    run = Run(point, trace)
    world = run.world
    problem = None
    with constants(OPTIONS.constants):
        try:
            world.loop.run_until_complete(run.run())
        except Exception as error:
            problem = "".join(traceback.format_exception(error)[-3:]).strip()
        for host in world.hosts.values():
            host.life.alive = False
        world.loop.close()
    if problem is None and world.loop.errors:
        problem = _unseen(world.loop)
    fuse = world.fuses[point.node]
    operations = [] if point.nth else fuse.operations
    if problem is None and point.nth and fuse.burnt == "none":
        problem = "the fault did not happen: the run is not deterministic"
    return Outcome(
        point, problem, fuse.burnt, operations, run.deaths, run.marks, world.script.succeeded
    )


# -- the sweep ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Row:
    """A scenario and a node: what was run of them."""

    scenario: str
    node: str
    operations: int
    ailments: int = 0
    points: int = 0
    deaths: int = 0
    marks: int = 0
    failures: list[Outcome] = field(default_factory=list)


def count(scenario: str, node: str) -> Outcome:
    """The operations of a node in a scenario in which nothing fails."""
    return run_point(Point(scenario, node, "EIO once", 0))


def points(scenario: str, node: str, operations: Sequence[tuple[str, str]]) -> Iterator[Point]:
    """All points of a scenario on a node."""
    for nth, (operation, _) in enumerate(operations, 1):
        for name, ailment in AILMENTS.items():
            if ailment.suits(operation):
                yield Point(scenario, node, name, nth)


def sweep(
    scenarios: Sequence[str],
    nodes: Sequence[str],
    *,
    jobs: int = 1,
    choose: Callable[[list[Point]], list[Point]] = lambda found: found,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Row]:
    """Runs the points of the scenarios that ``choose`` leaves; ``report`` hears of failures."""
    rows = {}
    wanted: list[Point] = []
    for scenario in scenarios:
        for node in nodes:
            plain = count(scenario, node)
            row = rows[scenario, node] = Row(scenario, node, len(plain.operations))
            if plain.problem is not None:
                row.failures.append(plain)
                report(plain)
                continue
            found = choose(list(points(scenario, node, plain.operations)))
            row.ailments = len(Counter(point.ailment for point in found))
            wanted += found
    for outcome in ordered(run_point, wanted, jobs=jobs, batch=BATCH):
        row = rows[outcome.point.scenario, outcome.point.node]
        row.points += 1
        row.deaths += outcome.deaths
        row.marks += outcome.marks
        if outcome.problem is not None:
            row.failures.append(outcome)
            report(outcome)
    return list(rows.values())


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [
        f"{'scenario':18} {'node':4} {'operations':>10} {'kinds':>6} {'points':>7} {'deaths':>7}"
        f" {'marked':>7} {'failures':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row.scenario:18} {row.node:4} {row.operations:10} {row.ailments:6} {row.points:7}"
            f" {row.deaths:7} {row.marks:7} {len(row.failures):9}"
        )
    total = sum(row.points for row in rows)
    failed = sum(len(row.failures) for row in rows)
    lines.append(f"{total} points, {failed} failures")
    return "\n".join(lines)


def _report(outcome: Outcome) -> None:
    print(f"{outcome.point} ({outcome.operation}):\n{outcome.problem}\n", flush=True)


def main() -> int:
    """Returns the exit code: 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.sweep", description=__doc__)
    parser.add_argument("--scenario", choices=list(SCENARIOS), action="append")
    parser.add_argument("--node", choices=NODES, action="append")
    parser.add_argument("--fault", choices=list(AILMENTS), action="append")
    parser.add_argument("--point", type=int, metavar="K", help="only the Kth operation")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth point")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--trace", action="store_true", help="print what happens at one point")
    arguments = parser.parse_args()
    if arguments.trace:
        (scenario,), (node,), (fault,) = arguments.scenario, arguments.node, arguments.fault
        outcome = run_point(Point(scenario, node, fault, arguments.point or 0), trace=print)
        _report(outcome)
        return 1 if outcome.problem else 0

    def choose(found: list[Point]) -> list[Point]:
        faults = arguments.fault or list(AILMENTS)
        found = [point for point in found if point.ailment in faults]
        if arguments.point is not None:
            found = [point for point in found if point.nth == arguments.point]
        return found[:: arguments.every]

    began = time.monotonic()
    rows = sweep(
        arguments.scenario or list(SCENARIOS),
        arguments.node or NODES,
        jobs=arguments.jobs,
        choose=choose,
        report=_report,
    )
    print(table(rows))
    print(f"{time.monotonic() - began:.1f} s")
    return 1 if any(row.failures for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
