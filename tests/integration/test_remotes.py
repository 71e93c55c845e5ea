"""A group with three remotes: one slow, one dead, and a third that never notices (M7, V2, M17)."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from tests.integration.cluster import MIB, Cluster
from tests.integration.process import wait_until
from tests.integration.test_replication import STALL_S, MakeCluster
from tests.integration.tools import Writer, connect, pattern

NAMES = ("beta", "gamma", "delta")


def _states(cluster: Cluster) -> dict[str, str]:
    return {one["name"]: one["state"] for one in cluster.primary.rpc("status")["remotes"]}


def test_a_slow_and_a_dead_remote_never_push_out_the_fast_one(make_cluster: MakeCluster) -> None:
    """M7: fast stays synchronised and close, slow and dead go to their own DCM; then all agree."""
    cluster = make_cluster(remotes=NAMES, log_size=8 * MIB).start()
    cluster.proxies["gamma"].shape(rate=MIB)
    cluster.secondaries[2].kill()
    handle = connect(cluster.primary.uri())
    slowest_s = 0.0
    for number in range(48):
        began = time.monotonic()
        handle.pwrite(pattern(MIB, number), number * MIB)
        slowest_s = max(slowest_s, time.monotonic() - began)
        cluster.primary.until("keeps up", lambda one: one["lag"]["bytes"] < 2 * MIB)
        assert _states(cluster)["beta"] == "synchronised"
    assert _states(cluster)["delta"] == "tracking"
    overflowed = {one["remote"] for one in cluster.primary.events() if one["kind"] == "overflow"}
    assert overflowed == {"gamma", "delta"}
    assert slowest_s < STALL_S
    cluster.proxies["gamma"].heal()
    cluster.secondaries[2].start()
    cluster.check_in_sync(90)


def test_each_remote_has_its_own_position(make_cluster: MakeCluster) -> None:
    """V2: each reads the log at its own rate; an entry stays until every remote has it."""
    cluster = make_cluster(remotes=NAMES[:2]).start()
    handle = connect(cluster.primary.uri())
    cluster.proxies["gamma"].refuse()
    cluster.primary.until("lost its link", lambda one: one["link"] != "connected", remote="gamma")
    used = cluster.primary.status()["log"]["used"]
    for number in range(100):
        handle.pwrite(pattern(4096, number), number * 65536)
    cluster.primary.ok("wait", "--until", "in-sync", "--remote", "beta", "--timeout", "30")
    assert cluster.primary.remote("gamma")["lag"]["records"] == 100
    assert cluster.primary.status()["log"]["used"] >= used + 100 * 4096
    cluster.proxies["gamma"].heal()
    cluster.check_in_sync()


def test_remotes_are_added_and_removed_in_use(make_cluster: MakeCluster) -> None:
    """M17: a third copy is made and dropped while a client writes."""
    cluster = make_cluster(remotes=NAMES[:2])
    gamma = cluster.secondaries.pop()
    cluster.primary.write_config()
    cluster.start()
    assert gamma.create().code == 0
    gamma.start()
    try:
        with Writer(cluster.primary.uri(), blocks=4096) as writer:
            address = cluster.remote_address(gamma)
            cluster.primary.ok("remote", "add", "gamma", address)
            cluster.primary.ok("wait", "--until", "in-sync", "--remote", "gamma", "--timeout", "60")
            names = [one["name"] for one in cluster.primary.ok("remote", "list", "--json").json]
            assert names == ["beta", "gamma"]
        assert writer.slowest_s < STALL_S
        cluster.secondaries.append(gamma)
        cluster.check_in_sync()
        cluster.primary.ok("remote", "remove", "gamma")
        cluster.secondaries.remove(gamma)
        assert list(_states(cluster)) == ["beta"]
        wait_until("gamma is left alone", lambda: gamma.status()["upstream"]["link"] != "connected")
    finally:
        gamma.kill()
    connect(cluster.primary.uri()).pwrite(pattern(MIB, 9), 0)
    cluster.check_in_sync()


def test_a_wait_for_a_remote_ends_when_that_is_removed(make_cluster: MakeCluster) -> None:
    """M17: who waits for it alone is told; who waits for all goes on with those that stay."""
    cluster = make_cluster(remotes=NAMES[:2]).start()
    cluster.secondaries[1].kill()
    connect(cluster.primary.uri()).pwrite(pattern(4096, 1), 0)
    wait = ("wait", "--until", "in-sync", "--timeout", "60")
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(cluster.primary.cli, *wait, "--remote", "gamma")
        of_all = pool.submit(cluster.primary.cli, *wait)
        wait_until("both wait", lambda: _admin_connections(cluster) == 3)
        cluster.primary.ok("remote", "remove", "gamma")
        assert of_all.result().code == 0
        refused = alone.result()
    assert refused.code == 4
    assert "remote gamma was removed before it was in-sync" in refused.err


def _admin_connections(cluster: Cluster) -> int:
    """Those that are open, this question's among them."""
    count: int = cluster.primary.status()["connections"]["admin"]["open"]
    return count
