"""What happens in a campaign: drawn from a seed, carried out, counted.

A seed makes one pair of machines and its history of cuts. The same seed draws the same plans; the
moment of a cut falls where the machines' timing lets it fall.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tests.guest.cuts.disk import Fate
from tests.guest.cuts.pair import Options, Pair

CUTS_PER_PAIR = 10
SIDES = ("primary", "secondary", "both")
LIE_S = 5.0
LOAD_S = (1.0, 10.0)
AGAIN_S = (2.0, 14.0)
"""After switching on: from the boot of the kernel to the resync."""


@dataclass(frozen=True)
class Plan:
    """One cut."""

    side: str
    load_s: float
    fate: Fate
    silent: bool
    """The survivor is not told; else its connection is reset."""
    link: str
    """Before the cut: ``up``, ``down`` (since the load began), ``back`` (down, and just back)."""
    again_s: tuple[float, ...]
    """The power goes again so long after it came back, before anything was checked."""
    hurry: bool
    """A primary's client does not wait for the resync."""

    def __str__(self) -> str:
        return " ".join(f"{one.name}={_text(getattr(self, one.name))}" for one in fields(self))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, tuple):
        return "+".join(map(_text, value)) or "no"
    return value.value if isinstance(value, Fate) else str(value)


def draw_options(rng: random.Random) -> Options:
    """A pair."""
    return Options(
        facet=rng.choice(("file", "block")),
        journal=rng.choice(("wal", "delete", "truncate")),
        fio=rng.choice(("ioengine=psync", "ioengine=libaio\niodepth=8\ndirect=1")),
        mount=rng.choice(("noatime", "noatime,discard")),
        log_mib=rng.choice((4, 16)),
        extent_kib=rng.choice((256, 4096)),
        hot_extents=rng.choice((64, 1024)),
        eager=rng.choice(("", "50", "200")),
    )


def draw_plan(rng: random.Random, side: str) -> Plan:
    """A cut."""
    return Plan(
        side=side,
        load_s=rng.uniform(*LOAD_S),
        fate=rng.choice((Fate.KEPT, Fate.LOST, Fate.MIXED, Fate.MIXED)),
        silent=rng.random() < 0.5,
        link=rng.choice(("up", "up", "up", "down", "back")),
        again_s=tuple(rng.uniform(*AGAIN_S) for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))),
        hurry=rng.random() < 0.5,
    )


def calm(plan: Plan) -> Plan:
    """The plan without what makes it long: one cut, under a short load, with the link up."""
    return replace(plan, load_s=3.0, link="up", again_s=(), hurry=False)


class Campaign:
    """One seed's history; ``tell`` gets a line for each thing that is done. ``lying``: the disks
    ignore flushes from the first cut's load on, so something must be found wrong."""

    def __init__(
        self, directory: Path, seed: int, tell: Callable[[str], None], *, lying: bool = False
    ) -> None:
        self._seed = seed
        self._tell = tell
        self._lying = lying
        options = draw_options(self._stream("pair"))
        tell(f"seed {seed}: {options}")
        self.pair = Pair(directory, options)
        self._rng = self._stream("begin")

    def _stream(self, subject: str) -> random.Random:
        """Numbers of its own for each subject: one more draw for one does not shift the others."""
        return random.Random(f"{self._seed}:{subject}")

    def plans(self, sides: Sequence[str]) -> list[Plan]:
        """What is drawn for so many cuts, of these sides in turn."""
        return [draw_plan(self._stream(f"plan {n}"), side) for n, side in enumerate(sides, 1)]

    def run(self, plans: Sequence[Plan]) -> None:
        """Carries them out; AssertionError (Wrong, GuestError, ...) if something is not right."""
        began = time.monotonic()
        with self.pair:
            self.pair.begin()
            self._tell(f"up and in sync after {time.monotonic() - began:.0f} s")
            if self._lying:
                self.pair.alpha.pass_time(LIE_S)
                self.pair.lie()
            for number, plan in enumerate(plans, 1):
                self._rng = self._stream(f"cut {number}")
                self._tell(f"cut {number}: {plan}")
                began = time.monotonic()
                self._cut(plan)
                rows, files = self.pair.promise.rows, self.pair.promise.files
                took = time.monotonic() - began
                self._tell(f"cut {number}: good, {rows} rows, {files} files, {took:.0f} s")
            self.pair.equal_under_way()
            self.pair.count_handshakes()

    def _cut(self, plan: Plan) -> None:
        pair = self.pair
        self._load(plan)
        machines = {
            "primary": [pair.alpha],
            "secondary": [pair.beta],
            "both": [pair.alpha, pair.beta],
        }[plan.side]
        if pair.alpha in machines:
            pair.count_handshakes()
        pair.cut(machines, plan.fate, self._rng, silent=plan.silent)
        former, least_seq = None, 0
        if pair.beta not in machines:
            former = pair.secondary_alone()
        elif pair.alpha not in machines:
            least_seq = pair.durable_there()
            pair.load_goes_on()
        for seconds in plan.again_s:
            pair.power_on(machines)
            pair.join()
            time.sleep(seconds)
            pair.cut(machines, plan.fate, self._rng, silent=plan.silent)
        pair.power_on(machines)
        for machine in machines:
            machine.connect()
            pair.recovered(machine)
        if pair.beta in machines:
            pair.secondary_alone(least_seq)
        self._come_back(plan, former)

    def _load(self, plan: Plan) -> None:
        pair = self.pair
        if plan.link == "up":
            pair.alpha.pass_time(plan.load_s)
            return
        pair.isolate()
        pair.alpha.pass_time(plan.load_s)
        if plan.link == "back":
            pair.join()
            pair.alpha.pass_time(self._rng.uniform(0.2, 3.0))

    def _come_back(self, plan: Plan, former: Path | None) -> None:
        pair = self.pair
        if plan.side == "secondary":
            pair.join()
            pair.equal_under_way()
        elif plan.hurry:
            pair.join()
            pair.primary_back()
            pair.alpha.pass_time(self._rng.uniform(1, 3))
            pair.equal_under_way()
        else:
            known = former if plan.link == "up" and not plan.again_s else None
            pair.equal_with_little_sent(known)
            pair.primary_back()
