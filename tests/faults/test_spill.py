"""A log that is partly in memory, with real daemons: outages, ends of every kind, its file (M4)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.inject import bury, check_equal, check_serves, reboot, resyncs
from tests.faults.journal import Journal, Load
from tests.faults.test_disk import SIZE, MakeCluster, files
from tests.integration.cluster import Cluster, Volume
from tests.integration.process import wait_until

KIB = 1 << 10
THRESHOLD = 64 * KIB


def spilling(make_cluster: MakeCluster, threshold: int = THRESHOLD) -> Cluster:
    """A primary with two facets whose log spills, and a secondary; running."""
    cluster = make_cluster(
        volumes=[Volume(size=SIZE, facets=2)], log_size=16 << 20, log_mode="spill"
    )
    cluster.primary.keys["log"] = [f"spill_threshold = {threshold}"]
    cluster.primary.write_config()
    return cluster.start()


def spill_of(cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = cluster.primary.status()["log"]
    assert found["mode"] == "spill"
    shares: dict[str, Any] = found["spill"]
    assert shares["memory_bytes"] + shares["file_bytes"] == found["used"]
    assert shares["memory_bytes"] <= shares["threshold"]
    return shares


@pytest.mark.parametrize("how", ["kill", "power", "stop"])
def test_an_end_past_the_threshold(make_cluster: MakeCluster, how: str) -> None:
    """M4, O1, O10: during an outage entries go to memory, then to the file; after an end of any
    kind clients have what they were promised, and the remote gets the rest. Only a clean stop
    keeps the order: there the log is whole, and nothing is compared."""
    cluster = spilling(make_cluster)
    journal = Journal(SIZE)
    node = cluster.primary
    with Load(node.nbd_socket, journal, flush_every=3) as load:
        load.run(5)
        check_equal(cluster)
        cluster.proxy.refuse()
        node.until("lost its link", lambda one: one["link"] != "connected")
        load.run(2)
        wait_until("entries in memory", lambda: spill_of(cluster)["memory_bytes"] > 0)
        while not spill_of(cluster)["file_bytes"]:
            load.run(10)
        load.run(5)
    shown = node.ok("status").out
    assert "in memory (of 64 KiB)" in shown
    pending = node.remote()["lag"]["records"]
    if how == "stop":
        node.stop()
    else:
        bury(node)
    if how == "power":
        reboot(node)
    cluster.proxy.heal()
    node.start()
    (started,) = [one for one in node.events() if one["kind"] == "started"]
    assert started["memory_lost"] == (how != "stop")
    assert started["power_loss"] == (how == "power")
    check_serves(cluster, journal)
    check_equal(cluster)
    if how == "stop":
        assert not resyncs(cluster)
        assert started["records"] >= pending
    else:
        assert [one["rule"] for one in resyncs(cluster)] == ["T4"]


def test_a_remote_that_keeps_up_leaves_the_file_alone(make_cluster: MakeCluster) -> None:
    """M4: what the remote has got in time is never written to the log; a secondary's is on disk."""
    cluster = spilling(make_cluster, 16 << 20)
    journal = Journal(SIZE)
    node = cluster.primary
    before = files(node)["log"].read_bytes()
    with Load(node.nbd_socket, journal, flush_every=3) as load:
        load.run(60)
    check_equal(cluster)
    assert spill_of(cluster)["spilled_bytes"] == 0
    assert files(node)["log"].read_bytes() == before
    assert cluster.secondary.status()["log"]["mode"] == "disk"
    bury(node)
    node.start()
    check_serves(cluster, journal)
    check_equal(cluster)
