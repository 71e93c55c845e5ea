"""SIGKILL at the Nth system call (faults 1, 5, 7, 30; I1, I2, I4, O8, O9, O19).

The daemon dies before its Nth call of a kind: while it starts, under load, in a change of mode,
in a resync. Another start, and nothing that was acknowledged may lack, nothing may be torn, and
both nodes end equal. Where the log was enough, nothing but the log travels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import pytest

from tests.faults.inject import (
    ALL_POINTS,
    bury,
    check_equal,
    check_serves,
    is_in_sync,
    requires_programs,
    resyncs,
    run_until_broken,
    start_under,
    strace,
    wait_death,
)
from tests.faults.journal import Background, Broken, Journal, Load
from tests.integration.cluster import MIB, Cluster, Node, Volume
from tests.integration.process import wait_until

pytestmark = requires_programs("strace")
MakeCluster = Callable[..., Cluster]
SIZE = 8 * MIB
BATCHES = 150
PRIMARY_POINTS = {
    "pwritev2": (1, 2, 90),
    "pwrite64": (1, 2, 3, 60, 250),
    "fdatasync": (1, 2, 3, 9),
    "fallocate": (1, 4),
    "write": (1, 6, 60),
}
"""The Ns of a sweep, by call; ``write`` is what goes to the clients, the peer and the journal."""
SECONDARY_POINTS = {
    "pwritev2": (1, 10),
    "pwrite64": (1, 3, 60),
    "fdatasync": (1, 2, 4),
    "fallocate": (2,),
    "write": (2, 12),
}
OVERFLOW_POINTS = {"pwrite64": (6, 40, 500), "fdatasync": (6, 14)}


def points(some: Sequence[int]) -> Sequence[int]:
    """The Ns of a sweep: a choice, or all, for as long as the caller asks."""
    return range(1, 100_000) if ALL_POINTS else some


def small_group(make_cluster: MakeCluster, log_size: int = 16 * MIB) -> Cluster:
    """A primary and a secondary of one volume that a sweep can look at whole."""
    return make_cluster(volumes=[Volume(size=SIZE)], log_size=log_size).start()


def dies_at(node: Node, call: str, when: int) -> bool:
    """Starts a node that is to be killed at the Nth call; whether it got ready before."""
    return start_under(node, strace(call, "signal=KILL", when))


@pytest.mark.parametrize("call", PRIMARY_POINTS)
def test_primary_dies_at_any_call(make_cluster: MakeCluster, call: str) -> None:
    """Faults 1 and 5: nothing acknowledged is lost, and the secondary goes on from the log."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    cluster.primary.stop()
    for when in points(PRIMARY_POINTS[call]):
        died = True
        if dies_at(cluster.primary, call, when):
            with Load(cluster.primary.nbd_socket, journal, seed=when) as load:
                died = run_until_broken(load, BATCHES)
            if died:
                assert wait_death(cluster.primary) == -9
            else:
                assert ALL_POINTS, f"{call} was not called {when} times"
                cluster.primary.kill()
        cluster.primary.start()
        check_serves(cluster, journal)
        check_equal(cluster)
        assert not resyncs(cluster), "more than the log was sent"
        cluster.primary.kill()
        if not died:
            break


@pytest.mark.parametrize("call", SECONDARY_POINTS)
def test_secondary_dies_at_any_call(make_cluster: MakeCluster, call: str) -> None:
    """Faults 5 and 7: alone it is a prefix of the writes (O9), and not behind what it confirmed
    (O4); with its primary it goes on from the log. Runbook: secondary dies and comes back."""
    cluster = small_group(make_cluster)
    journal = Journal(SIZE)
    secondary = cluster.secondary
    secondary.stop()
    for when in points(SECONDARY_POINTS[call]):
        if dies_at(secondary, call, when):
            _load_until_dead(cluster, secondary, journal, when)
        died = not secondary.alive
        if secondary.process is not None:
            bury(secondary)
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
            assert ALL_POINTS, f"{call} was not called {when} times"
            break


@pytest.mark.parametrize("call", OVERFLOW_POINTS)
@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_dies_in_overflow_and_resync(make_cluster: MakeCluster, side: str, call: str) -> None:
    """Fault 30: killed while the mode changes, while regions are copied, at the resync's end:
    old or new, never half; the resync is taken up again (M10, O12, O13)."""
    cluster = small_group(make_cluster, log_size=4 * MIB)
    journal = Journal(SIZE)
    node: Node = getattr(cluster, side)
    node.stop()
    for when in points(OVERFLOW_POINTS[call]):
        cluster.proxy.refuse()
        if side == "secondary":
            _overflow(cluster, journal, when)
        ready = dies_at(node, call, when)
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


def _load_until_dead(cluster: Cluster, node: Node, journal: Journal, seed: int) -> None:
    """A load that begins when the nodes have met; ends when it is replicated, or a node died."""
    wait_until("the nodes meet", lambda: not node.alive or _connected(cluster))
    with contextlib.suppress(Broken), Load(cluster.primary.nbd_socket, journal, seed=seed) as load:
        for _ in range(BATCHES):
            load.batch()
    wait_until("all is replicated", lambda: not node.alive or is_in_sync(cluster))


def _connected(cluster: Cluster) -> bool:
    return bool(cluster.primary.remote()["link"] == "connected")


def _overflow(cluster: Cluster, journal: Journal, seed: int) -> None:
    """Writes more than the log holds, or until the primary is gone."""
    with contextlib.suppress(Broken):
        load = Load(cluster.primary.nbd_socket, journal, seed=seed, sectors_max=512)
        with load:
            load.run(80)


def _dies_meanwhile(cluster: Cluster, node: Node, journal: Journal, seed: int) -> bool:
    """A load beside the resync; whether the node died before all was in sync."""
    with contextlib.suppress(Broken):
        load = Load(cluster.primary.nbd_socket, journal, seed=~seed)
        with load, Background(load, may_break=True, pause_s=0.02):
            wait_until("a resync ends", lambda: not node.alive or is_in_sync(cluster))
    died = not node.alive
    if node.process is not None:
        bury(node)
    return died
