"""``python -m tests.sim``: sweeps over seeds, replays one, or lets the mutants loose."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.sim import marks, mutants, mutation, swarm
from tests.sim.options import FAULTS, draw, pairs, unchanged
from tests.sim.pool import ordered, settle_memory

BATCH = 20
COMPLETE_SEEDS = 300
"""A sweep over so many seeds must have met every fault and every mark."""


def main() -> int:
    """Returns the exit code: 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, metavar="N", help="run N seeds")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first of them")
    parser.add_argument("--seed", type=int, help="run one seed")
    parser.add_argument("--trace", action="store_true", help="print what happens (with --seed)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--failures", type=int, default=3, help="stop after so many (default 3)")
    parser.add_argument("--pairs", action="store_true", help="always two facets and two remotes")
    parser.add_argument("--counts", action="store_true", help="print how often things happened")
    parser.add_argument("--mutants", action="store_true", help="which mutants N seeds kill")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of the processor, for a mutant"
    )
    parser.add_argument("--only", default="", help="of the mutants: those with this in their name")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + (arguments.seeds or 2000))
    aim = pairs if arguments.pairs else unchanged
    if arguments.mutants:
        return _mutants(arguments.only, seeds, arguments.jobs, arguments.seconds)
    if arguments.seed is not None:
        return _one(arguments.seed, trace=arguments.trace, aim=aim)
    return _sweep(
        seeds,
        arguments.jobs,
        arguments.failures,
        counts=arguments.counts,
        aim=aim,
    )


def _one(seed: int, *, trace: bool, aim: mutation.Aim) -> int:
    result = _run(seed, aim=aim, trace=print if trace else None)
    if trace:
        print(aim(draw(seed)))
    print(f"seed {seed}: {result.problem or 'passed'}")
    print(f"{result.steps} steps, {result.seconds:.1f} s of virtual time, trace {result.digest}")
    return 1 if result.problem else 0


def _run(
    seed: int, *, aim: mutation.Aim, trace: Callable[[str], None] | None = None
) -> swarm.Result:
    return swarm.run(seed, options=aim(draw(seed)), trace=trace)


def _sweep(seeds: range, jobs: int, failures_max: int, *, counts: bool, aim: mutation.Aim) -> int:
    began = time.monotonic()
    fired: Counter[str] = Counter()
    failed = done = steps = 0
    for result in ordered(partial(_run, aim=aim), seeds, jobs=jobs, batch=BATCH):
        done += 1
        steps += result.steps
        if done % 1000 == 0:
            print(f"{done} seeds, {failed} failed", file=sys.stderr, flush=True)
        fired.update(result.fired)
        if result.problem is not None:
            failed += 1
            print(f"seed {result.seed}: {result.problem}", flush=True)
            if failed >= failures_max:
                break
    if counts:
        for name, count in sorted(fired.items()):
            print(f"{count:9} {name}")
    if done >= COMPLETE_SEEDS:
        wanted = [*(f"fault {kind}" for kind in FAULTS), *marks.LABELS]
        for name in wanted:
            if not fired[name]:
                failed += 1
                print(f"never happened: {name}")
    seconds = time.monotonic() - began
    print(f"{done} seeds, {failed} failed, {steps} steps, {done / seconds:.1f} seeds/s")
    return 1 if failed else 0


def _mutants(only: str, seeds: range, jobs: int, seconds: float) -> int:
    assert mutants  # imported for what it registers
    names = [name for name in mutation.MUTANTS if only in name]
    alive = 0
    for name, fate in zip(names, _fates(names, seeds, jobs, seconds), strict=True):
        alive += fate.found is None
        text = f"{fate.seeds:5}  {fate.found}"
        if fate.found is None:
            text = f"ALIVE after {fate.seeds} seeds"
        if fate.errors:
            text += f" ({fate.errors} seeds with errors of its own: {fate.error})"
        print(f"{name:75} {text[:160]}", flush=True)
    print(f"{len(names)} mutants, {alive} outlived their seeds")
    return 1 if alive else 0


def _fates(names: list[str], seeds: range, jobs: int, seconds: float) -> Iterator[mutation.Fate]:
    if jobs == 1:
        yield from (mutation.kill(name, seeds, seconds) for name in names)
        return
    with ProcessPoolExecutor(jobs, initializer=settle_memory) as pool:
        fates = [pool.submit(mutation.kill, name, seeds, seconds) for name in names]
        yield from (fate.result() for fate in fates)


if __name__ == "__main__":
    sys.exit(main())
