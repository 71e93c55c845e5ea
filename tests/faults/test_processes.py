"""Daemons that are stopped, frozen, starved (faults 24, 25, 33-35, 40; I2, I6, I8)."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable

import pytest

from tests.faults.inject import (
    Victim,
    bury,
    check_equal,
    check_message,
    check_serves,
    requires_programs,
    resyncs,
    start_under,
)
from tests.faults.journal import Background, Broken, Journal, Load
from tests.integration.cluster import MIB, READY_S, Cluster, Node, Volume
from tests.integration.process import wait_until
from tests.integration.test_replication import STALL_S

MakeCluster = Callable[..., Cluster]
SIZE = 8 * MIB


def small_group(make_cluster: MakeCluster) -> Cluster:
    """A primary and a secondary of one small volume."""
    return make_cluster(volumes=[Volume(size=SIZE)]).start()


def test_frozen_secondary(make_cluster: MakeCluster) -> None:
    """Fault 24: SIGSTOP for longer than the time-out, under load: treated as dead; when it goes
    on, what its old session still holds is refused, and the log is enough.

    Runbook: secondary hangs."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    with (
        Load(cluster.primary.nbd_socket, journal, timeout=STALL_S) as load,
        Background(load, pause_s=0.01),
    ):
        cluster.secondary.freeze()
        began = time.monotonic()
        cluster.primary.until("is lost", lambda one: one["state"] == "behind")
        assert time.monotonic() - began < 4 * cluster.tuning["timeout_seconds"]
        cluster.secondary.thaw()
        cluster.primary.until("is back", lambda one: one["link"] == "connected")
        load.wait(20)
    check_serves(cluster, journal)
    check_equal(cluster)
    assert len(resyncs(cluster)) == 1


def test_frozen_primary(make_cluster: MakeCluster) -> None:
    """Fault 25: SIGSTOP of the primary with requests under way: the secondary gives the session
    up; going on, the primary loses nothing, and its clients were only delayed."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    with (
        Load(cluster.primary.nbd_socket, journal) as load,
        Background(load, pause_s=0.001),
    ):
        load.wait(20)
        cluster.primary.freeze()
        wait_until("the session is given up", lambda: _unlinked(cluster.secondary))
        cluster.primary.thaw()
        cluster.primary.until("is back", lambda one: one["link"] == "connected")
        load.wait(20)
    assert not load.failures
    check_serves(cluster, journal)
    check_equal(cluster)
    assert len(resyncs(cluster)) == 1


def _unlinked(node: Node) -> bool:
    return bool(node.status()["upstream"]["link"] == "disconnected")


@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_sigterm_under_load(make_cluster: MakeCluster, side: str) -> None:
    """Fault 40: SIGTERM again and again while clients write: exit 0 in time, marked clean, no
    redo and no resync at the next start; what was acknowledged is there."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    node: Node = getattr(cluster, side)
    for number in range(3):
        load = Load(cluster.primary.nbd_socket, journal, seed=number)
        with load, Background(load, may_break=side == "primary"):
            load.wait(20)
            began = time.monotonic()
            node.stop()
            assert time.monotonic() - began < 20
        node.start()
        assert node.events()[0]["clean"] is True
        check_serves(cluster, journal)
    check_equal(cluster)
    assert len(resyncs(cluster)) == (0 if side == "primary" else 1)


@requires_programs("prlimit")
def test_file_descriptors_run_out(make_cluster: MakeCluster) -> None:
    """Fault 35: 64 descriptors for the primary, a crowd of clients: those that are served go on,
    replication too; when the crowd leaves, new clients are served."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    node = cluster.primary
    node.stop()
    assert start_under(node, ["prlimit", "--nofile=64"])
    cluster.primary.until("is connected", lambda one: one["link"] == "connected")
    with Load(node.nbd_socket, journal, timeout=10) as load:
        with contextlib.ExitStack() as crowd:
            served = 0
            for number in range(60):
                with contextlib.suppress(Broken):
                    one = Load(node.nbd_socket, Journal(SIZE), seed=number, timeout=0.5)
                    crowd.enter_context(one)
                    served += 1
            assert 0 < served < 60, "the crowd was not large enough"
            load.run(50)
        load.run(10)
    assert not load.failures
    wait_until("a new client is served", lambda: _served(node, journal))
    check_equal(cluster)
    assert node.alive
    check_message(node)


def _served(node: Node, journal: Journal) -> bool:
    try:
        with Load(node.nbd_socket, journal, timeout=2) as load:
            load.run(1)
    except Broken:
        return False
    return True


@requires_programs("prlimit")
def test_memory_runs_out(make_cluster: MakeCluster) -> None:
    """Fault 34: a memory limit, a narrow link, many large requests at once: budgets keep the node
    below it (I6); if it dies all the same, that is fault 1."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    node = cluster.primary
    node.stop()
    assert start_under(node, ["prlimit", f"--as={900 * MIB}"])
    cluster.proxy.shape(rate=4 * MIB)
    broken = False
    for number in range(6):
        with Load(node.nbd_socket, journal, seed=number, sectors_max=8000) as load:
            try:
                load.run(10)
            except Broken:
                broken = True
    cluster.proxy.heal()
    if not node.alive:
        bury(node)
        node.start()
    else:
        assert not broken
        check_message(node)
    check_serves(cluster, journal)
    check_equal(cluster)


JUMPING = """
import itertools, runpy, sys, time
real, jumps = time.time_ns, itertools.cycle((0, 86_400 * 10**9, -86_400 * 10**9))
time.time_ns = lambda: real() + next(jumps)
time.time = lambda: time.time_ns() / 1e9
sys.argv = ["nbdmirror", "serve", sys.argv[1]]
runpy.run_module("nbdmirror", run_name="__main__")
"""


def test_clock_jumps(make_cluster: MakeCluster) -> None:
    """Fault 33: the wall clock jumps a day forward and back with every look at it: nothing
    depends on it but what people read; no time-out, no resync, no negative lag."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    for node in cluster.nodes:
        node.stop()
        argv = [sys.executable, "-c", JUMPING, str(node.config)]
        node.process = Victim(node.name, argv, node.directory / "output", notify=READY_S)
    cluster.primary.until("is connected", lambda one: one["link"] == "connected")
    with Load(cluster.primary.nbd_socket, journal, timeout=STALL_S) as load:
        with Background(load, pause_s=0.01):
            end = time.monotonic() + 1.5 * cluster.tuning["timeout_seconds"]
            while time.monotonic() < end:
                entry = cluster.primary.remote()
                assert entry["link"] == "connected" and entry["lag"]["seconds"] >= 0
        load.flush()
    check_serves(cluster, journal)
    check_equal(cluster)
    assert not resyncs(cluster)
