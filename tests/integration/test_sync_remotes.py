"""Synchronous remotes: what a reply means, and what a lost link does (V3, I3, I8)."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.process import wait_until
from tests.integration.test_replication import STALL_S, MakeCluster
from tests.integration.tools import Writer, connect, nbd_error, pattern

BLOCK = 4096


def group(make_cluster: MakeCluster, policy: str = "continue", **options: Any) -> Cluster:
    options.setdefault("remote_keys", {"mode": "sync", "on_link_loss": policy})
    return make_cluster(volumes=[Volume(size=16 * MIB)], **options).start()


def test_what_is_acknowledged_survives_both_nodes(make_cluster: MakeCluster) -> None:
    """I3: killed at any moment, the secondary holds every write that was replied to."""
    cluster = group(make_cluster)
    primary, secondary = cluster.primary, cluster.secondary
    assert primary.remote()["in_step"] is True
    handle = connect(primary.uri())
    for number in range(200):
        handle.pwrite(pattern(BLOCK, number), number * BLOCK)
    primary.kill()
    secondary.kill()
    secondary.start()
    data = secondary.facets("data")[0].read_bytes()
    assert data[: 200 * BLOCK] == b"".join(pattern(BLOCK, number) for number in range(200))
    primary.start()
    cluster.check_in_sync()


def test_a_flush_is_durable_there(make_cluster: MakeCluster) -> None:
    cluster = group(make_cluster)
    handle = connect(cluster.primary.uri())
    for number in range(20):
        handle.pwrite(pattern(BLOCK, number), number * BLOCK)
        handle.flush()
        written = cluster.primary.status()["log"]["next_seq"] - 1
        assert cluster.primary.remote()["durable_seq"] == written


def test_continue_goes_on_without_the_remote(make_cluster: MakeCluster) -> None:
    """The link is lost and comes back while a client writes: it sees no error, waits no longer
    than the time-out, and replies wait for the remote again afterwards.

    Runbook: the link to a synchronous remote is lost."""
    cluster = group(make_cluster)
    node = cluster.primary
    with Writer(node.uri(), blocks=1024) as writer:
        cluster.proxy.refuse()
        node.until("is out of step", lambda one: one["in_step"] is False)
        before = writer.writes
        wait_until("writes go on", lambda: writer.writes > before + 100)
        cluster.proxy.heal()
        node.until("is in step", lambda one: one["in_step"] is True)
    assert writer.slowest_s < cluster.tuning["timeout_seconds"] + STALL_S
    kinds = [one["kind"] for one in node.events() if "step" in one["kind"]]
    assert kinds[:3] == ["in-step", "out-of-step", "in-step"]
    cluster.check_in_sync()


def test_hold_makes_writes_wait(make_cluster: MakeCluster) -> None:
    """Runbook: the link to a synchronous remote is lost."""
    cluster = group(make_cluster, "hold")
    node = cluster.primary
    handle = connect(node.uri())
    cluster.proxy.refuse()
    node.until("lost its link", lambda one: one["link"] != "connected")
    seq = node.status()["log"]["next_seq"]
    done = threading.Event()

    def write() -> None:
        handle.pwrite(pattern(BLOCK, 1), 0)
        done.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    assert not done.wait(1.0), "replied to without the remote"
    assert node.status()["log"]["next_seq"] == seq, "changed something without the remote"
    assert connect(node.uri()).pread(BLOCK, 0) == bytes(BLOCK)
    cluster.proxy.heal()
    assert done.wait(20), "the write hangs"
    cluster.check_in_sync()


def test_hold_is_ended_by_a_pause(make_cluster: MakeCluster) -> None:
    """A person's pause lets writes go on; the remote is waited for again after a resume.

    Runbook: the link to a synchronous remote is lost."""
    cluster = group(make_cluster, "hold")
    node = cluster.primary
    node.ok("pause", "beta")
    connect(node.uri()).pwrite(pattern(BLOCK, 1), 0)
    node.ok("resume", "beta")
    node.until("is in step", lambda one: one["in_step"] is True)
    connect(node.uri()).pwrite(pattern(BLOCK, 2), 0)
    cluster.check_in_sync()


def test_fail_fails_writes(make_cluster: MakeCluster) -> None:
    """Runbook: the link to a synchronous remote is lost."""
    cluster = group(make_cluster, "fail")
    node = cluster.primary
    handle = connect(node.uri())
    handle.pwrite(pattern(BLOCK, 1), 0)
    cluster.proxy.refuse()
    node.until("lost its link", lambda one: one["link"] != "connected")
    with pytest.raises(nbd_error(), match="Input/output error"):
        handle.pwrite(pattern(BLOCK, 2), 0)
    assert handle.pread(BLOCK, 0) == pattern(BLOCK, 1)
    cluster.proxy.heal()
    node.until("is in step", lambda one: one["in_step"] is True)
    handle.pwrite(pattern(BLOCK, 3), 0)
    cluster.check_in_sync()


def test_an_asynchronous_remote_beside_it_is_not_waited_for(make_cluster: MakeCluster) -> None:
    """M1: two local facets and a remote of each kind; a dead asynchronous remote costs the
    synchronous one's clients nothing, and a synchronous remote is added in use."""
    volume = Volume(size=16 * MIB, facets=2)
    cluster = make_cluster(volumes=[volume], remotes=("beta", "gamma"))
    gamma = cluster.secondaries.pop()
    cluster.primary.write_config()
    cluster.start()
    assert gamma.create().code == 0
    gamma.start()
    try:
        node = cluster.primary
        address = cluster.remote_address(gamma)
        node.ok("remote", "add", "gamma", address, "--mode", "sync", "--on-link-loss", "hold")
        node.ok("wait", "--until", "in-sync", "--remote", "gamma", "--timeout", "30")
        cluster.secondary.freeze()
        handle = connect(node.uri())
        began = time.monotonic()
        for number in range(50):
            handle.pwrite(pattern(BLOCK, number), number * BLOCK)
        handle.flush()
        assert time.monotonic() - began < STALL_S
        assert node.remote("gamma")["durable_seq"] == node.status()["log"]["next_seq"] - 1
        cluster.secondary.thaw()
        cluster.secondaries.append(gamma)
        cluster.check_in_sync()
    finally:
        gamma.kill()
