"""The disk of the log fails under load, and a new one is put in: clients see nothing (M13)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.inject import (
    bury,
    check_equal,
    check_serves,
    reboot,
    requires_programs,
    start_under,
    strace,
)
from tests.faults.journal import Background, Journal, Load
from tests.faults.test_disk import SIZE, MakeCluster, files, small_group
from tests.integration.cluster import Cluster
from tests.integration.process import wait_until


def log_of(cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = cluster.primary.status()["log"]
    return found


def lose_the_log(
    cluster: Cluster, journal: Journal, call: str = "pwritev2", when: str = "30+"
) -> None:
    """The log's disk fails for good under a load that notices nothing."""
    node = cluster.primary
    node.stop()
    assert start_under(node, strace(call, "error=EIO", when, path=files(node)["log"]))
    with Load(node.nbd_socket, journal, flush_every=2) as load, Background(load):
        wait_until("the log is in memory", lambda: log_of(cluster)["in_memory"])
        load.wait(20)
    assert not load.failures


@requires_programs("strace")
@pytest.mark.parametrize(
    ("call", "when"),
    [("pwritev2", "30+"), ("pwritev2", "30"), ("fdatasync", "1+"), ("fdatasync", "2")],
)
def test_the_log_is_lost_and_replaced(make_cluster: MakeCluster, call: str, when: str) -> None:
    """M13, O16: a failed write or sync of the log, and be it one only: neither an error nor wrong
    data; the remote catches up; `log replace` goes back to a disk under load; then all is as ever,
    over a kill too. Runbook: the log's disk fails."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    node = cluster.primary
    lose_the_log(cluster, journal, call, when)
    assert any(one["kind"] == "log-lost" for one in node.events())
    (shown,) = [one for one in node.ok("status").out.splitlines() if one.startswith("log ")]
    assert "in memory only" in shown, shown
    check_serves(cluster, journal)
    check_equal(cluster)
    new = node.directory / "new.log"
    with Load(node.nbd_socket, journal, flush_every=2) as load, Background(load):
        load.wait(5)
        node.ok("log", "replace", str(new))
        load.wait(20)
    assert not load.failures
    assert not log_of(cluster)["in_memory"]
    check_equal(cluster)
    with Load(node.nbd_socket, journal, flush_every=2) as load:
        load.run(20)
    bury(node)
    node.start()
    started = [one for one in node.events() if one["kind"] == "started"]
    assert started[0]["records"] > 0, "nothing came from the new log"
    check_serves(cluster, journal)
    check_equal(cluster)


@requires_programs("strace")
@pytest.mark.parametrize("how", ["kill", "power", "stop"])
def test_an_end_while_the_log_is_in_memory(make_cluster: MakeCluster, how: str) -> None:
    """M13, O1: what the log in memory held for a remote is found again by the active map, or was
    marked in a clean stop; what was flushed is in the facets."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    node = cluster.primary
    lose_the_log(cluster, journal)
    cluster.proxy.refuse()
    node.until("lost its link", lambda one: one["link"] != "connected")
    with Load(node.nbd_socket, journal, flush_every=2) as load:
        load.run(20)
    if how == "stop":
        node.stop()
    else:
        bury(node)
    if how == "power":
        reboot(node)
    cluster.proxy.heal()
    files(node)["log"].unlink()
    node.start()
    assert log_of(cluster)["in_memory"]
    check_serves(cluster, journal)
    check_equal(cluster)
    node.ok("log", "replace", str(node.directory / "new.log"))
    node.restart()
    assert not log_of(cluster)["in_memory"]
    check_serves(cluster, journal)
    check_equal(cluster)


def test_the_log_is_moved_in_use(make_cluster: MakeCluster) -> None:
    """The same command moves a healthy log; a remote that is connected is not resynchronised."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    node = cluster.primary
    with Load(node.nbd_socket, journal) as load:
        load.run(10)
        check_equal(cluster)
        since = node.events()[-1]["cursor"]
        node.ok("log", "replace", str(node.directory / "moved.log"))
        load.run(10)
    check_equal(cluster)
    actions = [one["action"] for one in node.events(since) if one["kind"] == "handshake"]
    assert actions == ["continue"]
    refused = node.cli("log", "replace", str(node.directory / "moved.log"))
    assert refused.code == 4 and "exists" in refused.err
    node.restart()
    check_serves(cluster, journal)
