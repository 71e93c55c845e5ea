"""``python -m tests.sim.sweep``: every I/O operation of a scenario fails once, in every way.

A scenario (``tests.sim.scenarios``) is run once to list the operations of a node; then again for
each of them and each kind of fault that suits it. The simulation is deterministic, so the run is
the same up to the fault. Afterwards the disk is mended, the node started, and everything must
be as promised: answers, durable data, prefix, convergence, a service that goes on (I1-I5).
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field

from nbdmirror.errors import NbdmirrorError
from tests.sim.checks import Checks
from tests.sim.faults import READS, Fault, Kind
from tests.sim.loop import SimLoop
from tests.sim.oracle import Entry, Violation, compare
from tests.sim.scenarios import OPTIONS, SCENARIOS, Script
from tests.sim.world import Gone, Host, World, constants

NODES = ("a", "b")
SCRIPT_SECONDS = 300.0
"""Of virtual time: a script that takes longer hangs."""
HEAL_SECONDS = 120.0
"""Of virtual time: once everything is healthy the remote is in sync within these (I2)."""
RESTART_SECONDS = 0.3
WRITES = ("pwrite", "pwritev", "write", "allocate")
BATCH = 16


@dataclass(frozen=True, slots=True)
class Ailment:
    """A kind of fault: what it does to an operation, and for how long it stays."""

    fault: Fault | None = None
    where: str = "once"
    """``once``: that operation; ``file``: and all later ones on that file; ``disk``: on any."""
    strike: str = ""
    """``lost``, ``torn`` or ``kill``: the node ends instead; ``twice``: and again, recovering."""
    draw: int = 0

    def suits(self, operation: str) -> bool:
        """Whether that operation can have it."""
        if self.fault is None:
            return operation not in READS
        if self.fault.number == errno.ENOSPC and operation in (*READS, "unlink"):
            return False
        return self.fault.suits(operation)


AILMENTS: dict[str, Ailment] = {
    "EIO once": Ailment(Fault(Kind.ERROR)),
    "EIO file": Ailment(Fault(Kind.ERROR), "file"),
    "EIO disk": Ailment(Fault(Kind.ERROR), "disk"),
    "ENOSPC once": Ailment(Fault(Kind.ERROR, errno.ENOSPC)),
    "ENOSPC disk": Ailment(Fault(Kind.ERROR, errno.ENOSPC), "disk"),
    "short once": Ailment(Fault(Kind.SHORT)),
    "short file": Ailment(Fault(Kind.SHORT), "file"),
    "sync lost once": Ailment(Fault(Kind.LOSE)),
    "sync lost file": Ailment(Fault(Kind.LOSE), "file"),
    "power, all lost": Ailment(strike="lost"),
    "power, torn 1": Ailment(strike="torn", draw=1),
    "power, torn 2": Ailment(strike="torn", draw=2),
    "power twice": Ailment(strike="twice"),
    "kill": Ailment(strike="kill"),
}


class AllLost(random.Random):
    """The draws of a power cut after which nothing unsynced is left."""

    def random(self) -> float:
        return 0.99

    def randint(self, a: int, b: int) -> int:
        return a

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return 0 if stop is None else start


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
    succeeded: int = 0


class Fuse:
    """The injector of the node under test."""

    def __init__(self, host: Host, ailment: Ailment, nth: int, strike: Callable[[], None]) -> None:
        self.host = host
        self.armed = False
        self.operations: list[tuple[str, str]] = []
        self.lost_log = False
        """A sync of the log failed, and what was not durable may be gone."""
        self._ailment = ailment
        self.nth = nth
        self._strike = strike
        self._failed: tuple[str, str] | None = None

    def arm(self) -> None:
        """From here on operations count."""
        self.armed = True

    def mend(self) -> None:
        """The disk is healthy."""
        self.armed = False
        self.host.disk.faults = None

    @property
    def burnt(self) -> str:
        """The operation that failed."""
        return "none" if self._failed is None else " ".join(self._failed)

    def __call__(self, operation: str, path: str, nth: int) -> Fault | None:
        if not self.armed:
            return None
        self.operations.append((operation, path))
        count = len(self.operations)
        if count == self.nth and self._ailment.suits(operation):
            self._failed = self._failed or (operation, path)
            if self._ailment.fault is None:
                self._strike()
                return None
        elif self._failed is None or not self._again(operation, path):
            return None
        fault = self._ailment.fault
        if fault is not None and fault.kind is Kind.LOSE and path.endswith("/log"):
            self.lost_log = True
        return fault

    def _again(self, operation: str, path: str) -> bool:
        where = self._ailment.where
        if where == "once" or not self._ailment.suits(operation):
            return False
        return where == "disk" or (self._failed is not None and path == self._failed[1])


class SweepWorld(World):
    """A world that knows of disks that lost what they had."""

    fuses: dict[str, Fuse]
    script: Script

    def _primary_recovered(self, host: Host, *, power: bool) -> None:
        """After a failed sync of the log only what was durable counts, as after a power loss; and
        an append that failed in the middle may have brought records into the log."""
        assert host.node is not None
        fuse = self.fuses[host.name]
        power, fuse.lost_log = power or fuse.lost_log, False
        missing = host.node.log.next_seq - 1 - self.history.head
        if 0 < missing <= len(self.script.last):
            entries = [
                Entry(volume, offset, length, payload or None)
                for (volume, offset, length), payload in zip(
                    self.script.last, self.script.payloads, strict=True
                )
            ]
            self.history.append(self.history.head + 1, entries[:missing])
        super()._primary_recovered(host, power=power)


class Run:
    """One point, from a fresh pair of nodes to the verdict."""

    def __init__(self, point: Point, trace: Callable[[str], None] | None) -> None:
        self.point = point
        seed = list(SCENARIOS).index(point.scenario)
        self.world = SweepWorld(seed, OPTIONS, trace=trace)
        self.rng = random.Random(str(point))
        self.deaths = 0
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

    async def _within(self, work: object, what: str) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
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
            if await world.start(host):
                self.checks.crash_clone(host, AllLost())
            elif host.failed is not None and fuse.host.disk.faults is None:
                raise Violation(f"{host.name} does not start on a healthy disk: {host.failed}")

    async def _settle(self) -> None:
        """Everything is healthy: it must serve, and come in sync, by itself."""
        world = self.world
        world.net.heal_all()
        for fuse in world.fuses.values():
            fuse.mend()
        for host in world.hosts.values():
            await world.script.up(host)
        await asyncio.sleep(2 * RESTART_SECONDS)
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

    async def _converge(self) -> None:
        """In sync, equal, and that durably; and so after a clean stop (I2, I3)."""
        world = self.world
        node = await world.script.primary()
        try:
            await world.in_life(world.a, node.wait("in-sync", None, HEAL_SECONDS))
        except NbdmirrorError as error:
            status = node.status()["remotes"]
            raise Violation(f"never in sync ({error}): {status}") from None
        self._compare("in sync")
        self.checks.look()
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
        point, problem, fuse.burnt, operations, run.deaths, succeeded=world.script.succeeded
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


def _run_batch(batch: Sequence[Point]) -> list[Outcome]:
    return [run_point(point) for point in batch]


def run_all(batch: Sequence[Point], jobs: int) -> Iterator[Outcome]:
    """The outcomes of the points, in their order."""
    batches = [batch[at : at + BATCH] for at in range(0, len(batch), BATCH)]
    if jobs <= 1:
        for one in batches:
            yield from _run_batch(one)
        return
    with ProcessPoolExecutor(jobs) as pool:
        try:
            for done in pool.map(_run_batch, batches):
                yield from done
        finally:
            pool.shutdown(cancel_futures=True)


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
    for outcome in run_all(wanted, jobs):
        row = rows[outcome.point.scenario, outcome.point.node]
        row.points += 1
        row.deaths += outcome.deaths
        if outcome.problem is not None:
            row.failures.append(outcome)
            report(outcome)
    return list(rows.values())


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [
        f"{'scenario':18} {'node':4} {'operations':>10} {'kinds':>6} {'points':>7} {'deaths':>7}"
        f" {'failures':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row.scenario:18} {row.node:4} {row.operations:10} {row.ailments:6} {row.points:7}"
            f" {row.deaths:7} {len(row.failures):9}"
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
