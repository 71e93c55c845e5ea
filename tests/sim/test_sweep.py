"""Nth-operation sweeps: whichever I/O operation fails, and however, nothing promised is lost.

By default a sample of the points of every scenario; ``SWEEP=all`` runs every one (minutes).
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from nbdmirror.engine.log import Log
from nbdmirror.engine.store import Store
from tests.sim import sweep
from tests.sim.ailments import AILMENTS
from tests.sim.scenarios import SCENARIOS
from tests.sim.sweep import NODES, Point

ALL = os.environ.get("SWEEP") == "all"
SAMPLE = 83
"""One point of so many, if not all: a prime, so that every kind of fault has its turn."""
SAMPLES = {"spill": 197, "no facet": 197}
"""Of scenarios with several times the operations of the others, or whose points take longer."""


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_operation_may_fail(scenario: str) -> None:
    """Faults 1-13, O1-O23, I1-I5: see ``tests.sim.sweep`` for what must hold at each point."""
    told: list[str] = []

    def choose(found: list[Point]) -> list[Point]:
        return found if ALL else found[len(scenario) :: SAMPLES.get(scenario, SAMPLE)]

    rows = sweep.sweep(
        [scenario],
        NODES,
        jobs=2 if ALL else 1,
        choose=choose,
        report=lambda outcome: told.append(f"{outcome.point} ({outcome.operation})"),
    )
    assert not told, f"python -m tests.sim.sweep {told[0]} --trace"
    assert all(row.operations > 20 and row.points > 0 for row in rows)
    if ALL:
        assert rows[0].marks > 0, "no failed file was found marked"
        assert all(row.ailments == len(AILMENTS) for row in rows if row.node == "a")


def test_a_last_facet_comes_back_from_the_log() -> None:
    """M8, M11, O16: no remote can be reached, the log fills, and the facet's disk failed once."""
    outcome = sweep.run_point(Point("overflow", "a", "EIO once", 2))
    assert outcome.problem is None
    assert outcome.operation == "pwrite /facets/v0.0"
    assert outcome.deaths == 0


def test_nobody_waits_for_ever_for_a_remote_that_is_all_that_is_left() -> None:
    """I8, M11: the facet's disk stays broken, so the node ends and says so; nothing is lost."""
    outcome = sweep.run_point(Point("overflow", "a", "EIO file", 2))
    assert outcome.problem is None
    assert outcome.deaths > 0


def test_the_points_are_the_same_each_time() -> None:
    """The Nth operation of one run is that of the next, or a sweep would miss some."""
    first, second = (sweep.count("power in resync", "a") for _ in range(2))
    assert first.problem is None
    assert first.operations == second.operations


def test_every_kind_of_operation_is_met() -> None:
    """A scenario that no longer writes a map, say, would sweep nothing of it."""
    met: Counter[tuple[str, str]] = Counter()
    for scenario in SCENARIOS:
        for node in NODES:
            for operation, path in sweep.count(scenario, node).operations:
                top, _, name = path.strip("/").partition("/")
                met[operation, f"{top}/{name.partition('/')[0].partition('.')[0]}"] += 1
    state = ("log", "superblock", "active", "dcm")
    wanted = [("sync", f"state/{name}") for name in state]
    wanted += [("pwrite", f"state/{name}") for name in state]
    wanted += [("pread", f"state/{name}") for name in state]
    wanted += [("pwritev", "state/log"), ("write", "state/log"), ("read", "state/log")]
    wanted += [("truncate", "state/dcm"), ("allocate", "state/log"), ("unlink", "state/incomplete")]
    wanted += [("open", f"state/{name}") for name in state] + [("open", "facets/v0")]
    wanted += [("list", "state/snapshots"), ("make_directory", "state/restore")]
    for operation in ("pwrite", "sync", "punch", "zero", "try_pread", "create", "truncate"):
        wanted.extend((operation, f"facets/v{index}") for index in range(2))
    missing = [pair for pair in wanted if not met[pair] and pair != ("zero", "facets/v0")]
    assert not missing


@pytest.mark.parametrize("broken", ["log", "superblock"])
def test_a_sweep_sees_a_sync_that_is_left_out(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep can fail: without the sync of a file a power cut at some point shows it."""
    if broken == "log":

        async def no_sync(self: Log, upto: int | None = None) -> None:
            self.durable_seq = self.next_seq - 1

        monkeypatch.setattr(Log, "sync", no_sync)
    else:

        async def no_save(self: Store) -> None:
            return None

        monkeypatch.setattr(Store, "_save", no_save)

    def lost(found: list[Point]) -> list[Point]:
        return [point for point in found if point.ailment == "power, all lost"]

    rows = sweep.sweep(["write"], ["a"], choose=lost)
    assert rows[0].failures
