"""SIGKILL at the Nth system call (faults 1, 5, 7, 30; I1, I2, I4, O8, O9, O19).

The daemon dies before its Nth call of a kind: while it starts, under load, in a change of mode,
in a resync. Another start, and nothing that was acknowledged may lack, nothing may be torn, and
both nodes end equal. Where the log was enough, nothing but the log travels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.faults.inject import (
    ALL_POINTS,
    MAIN_CALLS,
    THREAD_CALLS,
    check_equal,
    check_serves,
    requires_programs,
    resyncs,
    run_until_broken,
    start_under,
    strace,
    wait_death,
)
from tests.faults.journal import Background, Journal, Load
from tests.integration.cluster import MIB, Cluster, Node, Volume

pytestmark = requires_programs("strace")
MakeCluster = Callable[..., Cluster]
SIZE = 8 * MIB
BATCHES = 150
POINTS = {
    MAIN_CALLS: (1, 2, 3, 5, 8, 13, 21, 40, 75, 130, 210, 320),
    THREAD_CALLS: (1, 2, 3, 5, 8, 12),
}


def points(calls: str, some: slice) -> Iterator[int]:
    """The Ns of a sweep: a choice, or all, for as long as the caller asks."""
    yield from range(1, 100_000) if ALL_POINTS else POINTS[calls][some]


def small_group(make_cluster: MakeCluster, log_size: int = 16 * MIB) -> Cluster:
    """A primary and a secondary of one volume that a sweep can look at whole."""
    return make_cluster(volumes=[Volume(size=SIZE)], log_size=log_size).start()


def dies_at(node: Node, calls: str, when: int) -> bool:
    """Starts a node that is to be killed at the Nth call; whether it got ready before."""
    if start_under(node, strace(calls, "signal=KILL", when)):
        return True
    assert node.daemon.popen.returncode == -9, node.daemon.failure("was not killed")
    return False


@pytest.mark.parametrize("calls", [MAIN_CALLS, THREAD_CALLS], ids=["main", "threads"])
def test_primary_dies_at_any_call(make_cluster: MakeCluster, calls: str) -> None:
    """Faults 1 and 5: nothing acknowledged is lost, and the secondary goes on from the log."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    cluster.primary.stop()
    for when in points(calls, slice(None)):
        died = True
        if dies_at(cluster.primary, calls, when):
            with Load(cluster.primary.nbd_socket, journal, seed=when) as load:
                died = run_until_broken(load, BATCHES)
            if died:
                assert wait_death(cluster.primary) == -9
            else:
                assert calls == THREAD_CALLS or ALL_POINTS, f"never called {when} times"
                cluster.primary.kill()
        cluster.primary.start()
        check_serves(cluster, journal)
        check_equal(cluster)
        assert not resyncs(cluster), "more than the log was sent"
        cluster.primary.kill()
        if not died:
            break


@pytest.mark.parametrize("calls", [MAIN_CALLS, THREAD_CALLS], ids=["main", "threads"])
def test_secondary_dies_at_any_call(make_cluster: MakeCluster, calls: str) -> None:
    """Faults 5 and 7: alone it is a prefix of the writes (O9), and not behind what it confirmed
    (O4); with its primary it goes on from the log."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    secondary = cluster.secondary
    secondary.stop()
    for when in points(calls, slice(0, 9)):
        if dies_at(secondary, calls, when):
            with Load(cluster.primary.nbd_socket, journal, seed=when) as load:
                for _ in range(BATCHES):
                    load.batch()
                    if not secondary.alive:
                        break
        died = not secondary.alive
        secondary.kill()
        cluster.primary.until("lost its link", lambda one: one["link"] != "connected")
        confirmed = cluster.primary.remote()["durable_seq"]
        cluster.proxy.refuse()
        secondary.start()
        assert secondary.status()["upstream"]["durable_seq"] >= confirmed
        secondary.stop()
        journal.check_prefix(secondary.facets("data")[0].read_bytes())
        cluster.proxy.heal()
        secondary.start()
        check_equal(cluster)
        assert not resyncs(cluster)[1:], "more than the log was sent"
        secondary.kill()
        if not died:
            assert calls == THREAD_CALLS or ALL_POINTS, f"never called {when} times"
            break


@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_dies_in_overflow_and_resync(make_cluster: MakeCluster, side: str) -> None:
    """Fault 30: killed while the mode changes, while regions are copied, at the resync's end:
    old or new, never half; the resync is taken up again (M10, O12, O13)."""
    cluster = small_group(make_cluster, log_size=4 * MIB)
    journal = Journal(SIZE)
    node: Node = getattr(cluster, side)
    node.stop()
    whens = points(MAIN_CALLS, slice(4, 12, 2 if side == "primary" else 3))
    for when in whens:
        cluster.proxy.refuse()
        if side == "secondary":
            _overflow(cluster, journal, when)
        ready = dies_at(node, MAIN_CALLS, when * 2)
        if ready and side == "primary":
            _overflow(cluster, journal, when)
        cluster.proxy.heal()
        died = _dies_meanwhile(cluster, node, journal, when)
        cluster.proxy.heal()
        node.start()
        if side == "primary":
            check_serves(cluster, journal)
        check_equal(cluster)
        node.kill()
        if not died:
            break


def _overflow(cluster: Cluster, journal: Journal, seed: int) -> None:
    """Writes more than the log holds, or until the primary is gone."""
    if not cluster.primary.alive:
        return
    with Load(cluster.primary.nbd_socket, journal, seed=seed, sectors_max=512) as load:
        run_until_broken(load, 80)


def _dies_meanwhile(cluster: Cluster, node: Node, journal: Journal, seed: int) -> bool:
    """A load beside the resync; whether the node died before all was in sync."""
    if cluster.primary.alive:
        load = Load(cluster.primary.nbd_socket, journal, seed=~seed)
        with load, Background(load, may_break=True, pause_s=0.02):
            try:
                cluster.primary.rpc("wait", until="in-sync", timeout=8.0)
            except (AssertionError, OSError, ValueError):
                pass  # the node died, or its peer did
    died = not node.alive
    node.kill()
    return died
