"""How the product is broken one rule at a time, and what became of it.

Each mutant is a function that breaks the engine by a few assignments; ``broken`` undoes them. They
are in ``tests.sim.mutants``.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from tests.sim import swarm
from tests.sim.options import Options, draw

Assign = Callable[[Any, str, Any], None]
Aim = Callable[[Options], Options]
MUTANTS: dict[str, Callable[[Assign], None]] = {}
RUNS: dict[str, Callable[..., swarm.Result]] = {}
"""For a mutant of which a run of the swarm sees nothing: what is run instead."""
AIMS: dict[str, Aim] = {}
"""For a mutant that only few runs would come by: what makes more of them do so."""


def mutant(
    rule: str, aim: Aim | None = None, run: Callable[..., swarm.Result] | None = None
) -> Callable[[Callable[[Assign], None]], Callable[[Assign], None]]:
    """Registers a mutant under the rule that it breaks; under several, if it takes several runs to
    see all that it does."""

    def register(apply: Callable[[Assign], None]) -> Callable[[Assign], None]:
        MUTANTS[rule] = apply
        if aim is not None:
            AIMS[rule] = aim
        if run is not None:
            RUNS[rule] = run
        return apply

    return register


def aimed(**changes: Any) -> Aim:
    """An aim at which some options are always these."""
    return lambda options: replace(options, **changes)


@contextmanager
def broken(name: str) -> Iterator[None]:
    """The engine with one mutant applied."""
    saved: list[tuple[Any, str, Any]] = []

    def assign(owner: Any, attribute: str, value: Any) -> None:
        original = owner.__dict__[attribute]
        assert takes(value, original), f"{name}: {attribute} does not take what it used to"
        saved.append((owner, attribute, original))
        setattr(owner, attribute, value)

    MUTANTS[name](assign)
    try:
        yield
    finally:
        for owner, attribute, value in reversed(saved):
            setattr(owner, attribute, value)


def takes(value: Any, original: Any) -> bool:
    """Whether what replaces a function can be called as that one was."""
    if not (inspect.isfunction(value) and inspect.isfunction(original)):
        return True
    kinds = inspect.Parameter
    wanted = inspect.signature(original).parameters.values()
    inline = [
        one for one in wanted if one.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    named = {one.name: None for one in wanted if one.kind is kinds.KEYWORD_ONLY}
    try:
        inspect.signature(value).bind(*inline, **named)
    except TypeError:
        return False
    return True


class Fate(NamedTuple):
    """What became of a mutant: ``found`` is what the oracle saw, None if it outlived the seeds."""

    seeds: int
    found: str | None
    errors: int
    """Seeds that ended in an error of its own: those prove nothing about the oracle."""
    error: str
    """The last of these."""


def kill(name: str, seeds: range, seconds: float = float("inf")) -> Fate:
    """Runs seeds with a mutant until the oracle sees a wrong result, or for so many seconds of the
    processor."""
    sys.unraisablehook = lambda unraisable: (
        None
    )  # what a broken engine leaves behind is of no interest
    began, errors, error, count = time.process_time(), 0, "", 0
    aim, run = AIMS.get(name), RUNS.get(name, swarm.run)
    for count, seed in enumerate(seeds, 1):
        options = draw(seed) if aim is None else aim(draw(seed))
        with broken(name):
            result = run(seed, options=options)
        if result.problem is not None:
            line = result.problem.strip().splitlines()[-1]
            if result.seen:
                sound = run(seed, options=options)
                assert sound.problem is None, f"seed {seed} fails without the mutant too"
                return Fate(count, line, errors, error)
            errors, error = errors + 1, line
        if time.process_time() - began > seconds:
            break
    return Fate(count, None, errors, error)


async def nothing(*_: Any, **__: Any) -> None:
    """In the place of what is left out."""
