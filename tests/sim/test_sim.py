"""The simulation in small: some seeds, the same run in two processes, and a canary.

The campaigns are ``python -m tests.sim``; see also ``mutants``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nbdmirror.engine.follower import Follower
from tests.sim import convergence, mutants, mutation, swarm
from tests.sim.mutants import aims
from tests.sim.options import draw

SEEDS = 48
BATCH = 8
DIGESTS = """
import json
from tests.sim import swarm
print(json.dumps([[r.digest, r.steps] for r in map(swarm.run, range(100, 106))]))
"""

PLAYED = [rule for rule, run in mutation.RUNS.items() if run is not convergence.run]


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_no_promise_is_broken(first: int) -> None:
    for seed in range(first, first + BATCH):
        result = swarm.run(seed)
        assert result.problem is None, f"python -m tests.sim --seed {seed} --trace"


@pytest.mark.parametrize(
    ("aim", "seed"),
    [
        (aims.BESIDE, 1),  # what was changed beside the write path was not durable (V13)
        (aims.BESIDE, 4),  # ... and a snapshot was taken before it was taken in
        (aims.MARKERS, 58),  # a session read a log that was not kept for it any more
        (aims.UNFINISHED, 3054),  # a place in the log was looked for from one that was released
    ],
)
def test_what_an_aim_has_found_stays_mended(aim: mutation.Aim, seed: int) -> None:
    assert swarm.run(seed, options=aim(draw(seed))).problem is None


@pytest.mark.parametrize("rule", PLAYED)
def test_what_is_played_ends_well_without_its_mutant(rule: str) -> None:
    for seed in range(10):
        assert mutation.RUNS[rule](seed).problem is None, f"seed {seed}"


def _digests(hash_seed: str) -> list[tuple[str, int]]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", DIGESTS]
    output = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    result: list[tuple[str, int]] = json.loads(output)
    return result


def test_the_same_seed_is_the_same_run_in_another_process() -> None:
    assert _digests("1") == _digests("4242")


@pytest.mark.parametrize(
    "rule",
    [
        "I3 a flush syncs nothing",
        "O5 space is used again before the tail is durable",
        "O7 a region is acknowledged before it is on disk",
        "O12 the map is left before the remote is READY",
        *PLAYED,
    ],
)
def test_a_canary_dies(rule: str) -> None:
    assert mutation.kill(rule, range(40)).found is not None


def test_an_error_of_a_mutant_s_own_does_not_count_as_its_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says nothing about what the oracle would have seen."""

    def raising(assign: mutation.Assign) -> None:
        assign(Follower, "left_out", lambda self, told, epoch: len(epoch))

    monkeypatch.setitem(mutation.MUTANTS, "raising", raising)
    fate = mutation.kill("raising", range(3))
    assert fate.found is None and fate.errors == 3 and "TypeError" in fate.error


def test_a_mutant_leaves_no_trace() -> None:
    """Else the seeds that run after it would test something else."""
    before = swarm.run(7).digest
    mutation.kill("I3 a flush syncs nothing", range(3))
    assert swarm.run(7).digest == before


def test_a_mutant_that_does_not_take_what_it_is_given_fits_no_more() -> None:
    """Else it would die of that, in every seed."""

    def original(self: object, seq: int, *, redone: bool) -> None: ...
    def less(self: object, seq: int) -> None: ...
    def anything(*_: object, **__: object) -> None: ...

    assert mutation.takes(anything, original) and mutation.takes(original, original)
    assert not mutation.takes(less, original)


@pytest.mark.parametrize("rule", mutation.MUTANTS)
def test_every_mutant_still_fits_the_engine(rule: str) -> None:
    """What it breaks is there under that name: else its campaign ends before it begins."""
    assert mutants  # imported for what it registers
    with mutation.broken(rule):
        pass
