"""No local facet is left: the volume goes on through a remote (M5, M11, M14, M15, I8)."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nbdmirror.engine.rescue import REACH_SECONDS
from tests.faults.inject import (
    bury,
    check_equal,
    check_message,
    check_serves,
    requires_programs,
    start_under,
    strace,
    wait_death,
)
from tests.faults.journal import Background, Journal, Load
from tests.faults.test_disk import SIZE, MakeCluster, small_group
from tests.integration.cluster import Cluster, Volume
from tests.integration.process import wait_until
from tests.integration.tools import connect, nbd_error

MORE_S = 20.0
"""A loaded machine is late by so much."""


def facet(cluster: Cluster) -> dict[str, Any]:
    (found,) = cluster.primary.rpc("facet.list")
    entry: dict[str, Any] = found
    return entry


def failing(cluster: Cluster, call: str, when: str) -> None:
    node = cluster.primary
    node.stop()
    prefix = strace(call, "error=EIO", when, path=node.facets("data")[0])
    assert start_under(node, prefix)
    node.until("is connected", lambda one: one["link"] == "connected")


def lose_the_facet(cluster: Cluster, journal: Journal) -> None:
    """The only facet fails for good under a load that notices nothing."""
    failing(cluster, "pwrite64", "30+")
    node = cluster.primary
    with Load(node.nbd_socket, journal) as load, Background(load):
        wait_until("the facet failed", lambda: facet(cluster)["state"] == "not-synchronised")
        load.wait(30)
    assert not load.failures


@requires_programs("strace")
def test_the_last_facet_is_lost_and_comes_back(make_cluster: MakeCluster) -> None:
    """M11: neither an error nor wrong data, over a kill of the primary too; then the facet gets
    what it lacks from the remote, while a client writes.

    Runbook: the last facet is lost, a remote follows."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    node = cluster.primary
    lose_the_facet(cluster, journal)
    check_serves(cluster, journal)
    refused = node.cli("pause", "beta")
    assert refused.code == 4 and "holds the only copy" in refused.err
    bury(node)
    assert start_under(node, strace("pwrite64", "error=EIO", "1+", path=node.facets("data")[0]))
    assert facet(cluster)["state"] == "not-synchronised"
    check_serves(cluster, journal)
    bury(node)
    node.start()
    with Load(node.nbd_socket, journal) as load, Background(load):
        node.ok("facet", "online", facet(cluster)["path"], "--wait", "--timeout", "30")
    check_serves(cluster, journal)
    check_equal(cluster)


@requires_programs("strace")
def test_the_log_is_laid_over_what_a_remote_holds(make_cluster: MakeCluster) -> None:
    """M5: the remote's facets are older than the log: what is read is not."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    lose_the_facet(cluster, journal)
    cluster.secondary.ok("apply", "freeze")
    with Load(cluster.primary.nbd_socket, journal) as load:
        load.run(40)
    assert cluster.primary.remote()["applied_seq"] < cluster.primary.remote()["durable_seq"]
    check_serves(cluster, journal)
    cluster.secondary.ok("apply", "thaw")
    check_serves(cluster, journal)


@requires_programs("strace")
def test_a_read_waits_for_the_link(make_cluster: MakeCluster) -> None:
    """I8: the link breaks while a remote stands in: requests wait until it is back."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    lose_the_facet(cluster, journal)
    node = cluster.primary
    with Load(node.nbd_socket, journal) as load, Background(load):
        for _ in range(3):
            cluster.proxy.reset()
            load.wait(20)
        cluster.proxy.refuse()
        node.until("lost its link", lambda one: one["link"] != "connected")
        cluster.proxy.heal()
    assert not load.failures
    check_serves(cluster, journal)


@requires_programs("strace")
def test_writes_wait_rather_than_push_out_the_remote(make_cluster: MakeCluster) -> None:
    """M7, M11: the remote that stands in is not forced to its DCM: what would be copied then?"""
    cluster = small_group(make_cluster, log_size=4 << 20).start()
    journal = Journal(SIZE)
    lose_the_facet(cluster, journal)
    node = cluster.primary
    cluster.proxy.refuse()
    node.until("lost its link", lambda one: one["link"] != "connected")
    load = Load(node.nbd_socket, journal, sectors_max=1024)
    with load, Background(load):
        wait_until("writes wait", lambda: node.status()["log"]["waiting_writes"])
        wait_until("it was decided", lambda: any(e["kind"] == "log-full" for e in node.events()))
        assert node.remote()["state"] == "behind"
        cluster.proxy.heal()
        load.wait(20)
    assert not load.failures
    check_serves(cluster, journal)


@requires_programs("strace")
@pytest.mark.parametrize("what", ["reads", "writes"])
def test_a_remote_that_hangs_is_not_waited_for_for_ever(
    make_cluster: MakeCluster, what: str
) -> None:
    """M11, M15, I8: the remote that stands in hangs: reads wait for it, and then get EIO; writes
    do once the log is full, and then the node ends, with exit code 1; nothing is answered that
    nobody holds; then both are back, and all that was promised is there.

    Runbook: the last facet is lost, a remote follows; secondary hangs."""
    cluster = small_group(make_cluster, log_size=4 << 20).start()
    journal = Journal(SIZE)
    lose_the_facet(cluster, journal)
    node, remote = cluster.primary, cluster.secondary
    reader = connect(node.uri())
    remote.freeze()
    node.until("lost its link", lambda one: one["link"] != "connected")
    began = time.monotonic()
    if what == "reads":
        with pytest.raises(nbd_error()):
            reader.pread(4096, 0)
        assert any(event["kind"] == "remote-awaited" for event in node.events())
    else:
        load = Load(node.nbd_socket, journal, sectors_max=1024)
        with load, Background(load, may_break=True):
            wait_until("writes wait", lambda: node.status()["log"]["waiting_writes"])
            wait_until("they wait no longer", lambda: not node.alive, REACH_SECONDS + MORE_S)
        assert load.successes_after_failure == 0
    waited = time.monotonic() - began
    assert REACH_SECONDS <= waited < REACH_SECONDS + MORE_S, waited
    remote.thaw()
    if what == "writes":
        assert wait_death(node) == 1, node.daemon.output()
        check_message(node, "no facet of volume data is in service")
    else:
        check_serves(cluster, journal)  # again, by itself
        bury(node)
    node.start()
    check_serves(cluster, journal)
    node.ok("facet", "online", facet(cluster)["path"], "--wait", "--timeout", "30")
    check_serves(cluster, journal)
    check_equal(cluster)


@requires_programs("strace")
@pytest.mark.parametrize("when", ["1", "1+"])
def test_a_failed_read_is_served_by_the_remote(make_cluster: MakeCluster, when: str) -> None:
    """M14, I8: one facet, one bad sector, one remote: the client gets its data."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    with Load(cluster.primary.nbd_socket, journal) as load:
        load.run(20)
    check_equal(cluster)
    failing(cluster, "pread64,preadv,preadv2", when)
    check_serves(cluster, journal)
    assert facet(cluster)["errors"] > 0
    node = cluster.primary
    wait_until("mended", lambda: any(one["kind"] == "read-mended" for one in node.events()))
    bury(node)
    node.start()
    check_serves(cluster, journal)
    check_equal(cluster)


def test_the_only_disk_is_missing_at_start(make_cluster: MakeCluster) -> None:
    """M15: local disk lost: the node starts and serves; one command puts a new disk in.

    Runbook: the last facet is lost, a remote follows."""
    cluster = small_group(make_cluster).start()
    journal = Journal(SIZE)
    node = cluster.primary
    with Load(node.nbd_socket, journal) as load:
        load.run(20)
    node.stop()
    path = node.facets("data")[0]
    path.unlink()
    node.start()
    check_serves(cluster, journal)
    with Load(node.nbd_socket, journal) as load, Background(load):
        node.ok("facet", "replace", str(path), "--wait", "--timeout", "60")
    assert not load.failures
    check_serves(cluster, journal)
    check_equal(cluster)


def test_a_paused_remote_does_not_stand_in(make_cluster: MakeCluster) -> None:
    """M11, V14, I8: a disk is missing while the only remote is paused. The log is kept for it; once
    that is full, other volumes are not served either, and the node ends. Resumed, all goes on.

    Runbook: the last facet is lost, a remote follows."""
    cluster = make_cluster(volumes=[Volume(size=SIZE), Volume("other", SIZE)], log_size=4 << 20)
    cluster.start().wait_in_sync()
    node = cluster.primary
    (path,) = node.facets("data")
    connect(node.uri()).pwrite(b"d" * 4096, 0)
    cluster.wait_in_sync()
    node.ok("pause", "beta")
    node.stop()
    path.rename(path.with_suffix(".away"))
    node.start()
    with pytest.raises(nbd_error()):
        connect(node.uri()).pread(512, 0)
    other = connect(node.uri("other"))
    began = time.monotonic()
    with pytest.raises(nbd_error()):
        for _ in range(100):
            began = time.monotonic()
            other.pwrite(b"o" * (256 << 10), 0)
    assert REACH_SECONDS - 1 <= time.monotonic() - began < REACH_SECONDS + MORE_S
    assert wait_death(node) == 1, node.daemon.output()
    check_message(node, "no facet of volume data is in service, and remote beta is paused")
    node.start()
    node.ok("resume", "beta")
    node.until("is connected", lambda one: one["link"] == "connected")
    assert connect(node.uri()).pread(4096, 0) == b"d" * 4096
    path.with_suffix(".away").rename(path)
    node.ok("facet", "online", str(path), "--wait", "--timeout", "30")
    connect(node.uri("other")).pwrite(b"o" * (256 << 10), 0)
    cluster.wait_in_sync()
    check_equal(cluster)
