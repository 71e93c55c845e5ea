"""Descriptors are few: a flood ends where the reserve begins (fault 35, reliability.md 4.1)."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.inject import start_under
from tests.integration.cluster import MIB, Cluster
from tests.integration.process import children, wait_until
from tests.integration.rawnbd import RawClient
from tests.integration.tools import connect, pattern

MakeCluster = Callable[..., Cluster]


@pytest.mark.parametrize("frontend", ["native", "nbdkit"])
def test_descriptors_are_reserved(make_cluster: MakeCluster, frontend: str) -> None:
    """Fault 35: with few descriptors, a flood neither stops a volume nor a new link."""
    cluster = make_cluster(frontend=frontend, tcp=True)
    cluster.create()
    cluster.secondary.start()
    cluster.primary.start()
    pid = cluster.primary.daemon.pid
    used = max(len(os.listdir(f"/proc/{one}/fd")) for one in (pid, *children(pid)))
    cluster.primary.stop()
    cluster.primary.keys["limits"] = ["descriptors_reserved = 8"]
    cluster.primary.write_config()
    count = used + 8 + 12
    assert start_under(cluster.primary, ["prlimit", f"--nofile={count}:{count}"])
    handle = connect(cluster.primary.uri())
    with contextlib.ExitStack() as stack:
        served = 0
        for _ in range(60):
            with contextlib.suppress(OSError, EOFError):
                client = stack.enter_context(RawClient(cluster.primary.nbd_socket))
                client.go("data")
                served += 1
        assert 0 < served <= 12, "what is reserved is not for clients"
        handle.pwrite(pattern(MIB, 1), 0)
        handle.flush()
        cluster.proxy.refuse()
        cluster.proxy.heal()
        cluster.check_in_sync()
        assert cluster.primary.status()["limits"]["descriptors_left"] <= 12
    assert handle.pread(MIB, 0) == pattern(MIB, 1)


def test_snapshots_get_no_descriptors_that_are_reserved(make_cluster: MakeCluster) -> None:
    """Fault 35: one snapshot too many is refused with the reason; those that there are leave a
    node that starts again with the same limit."""
    cluster = make_cluster(remotes=())
    cluster.create()
    cluster.primary.start()
    used = len(os.listdir(f"/proc/{cluster.primary.daemon.pid}/fd"))
    cluster.primary.stop()
    few = ["prlimit", f"--nofile={used + 16 + 10}"]
    assert start_under(cluster.primary, few)
    taken = 0
    while (done := cluster.primary.cli("snapshot", "create")).code == 0:
        taken += 1
        assert taken < 40, "nothing was reserved"
    assert 2 <= taken <= 10
    assert "reserved" in done.err and "LimitNOFILE" in done.err, done.err
    left = cluster.primary.status()["limits"]["descriptors_left"]
    assert 0 < left <= 10 - taken + 1
    cluster.primary.stop()
    assert start_under(cluster.primary, few), "it starts again"
    listed = cluster.primary.ok("snapshot", "list", "--json").json
    assert [one["state"] for one in listed] == ["ok"] * taken


def test_strangers_at_the_replication_port_take_no_reserved_descriptors(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    """Fault 35: a flood at a secured port ends where the reserve begins, and the primary that lost
    its link gets in."""
    secret = tmp_path / "secret"
    secret.write_text(os.urandom(32).hex())
    secret.chmod(0o600)
    cluster = make_cluster()
    for node in cluster.nodes:
        node.keys["replication"] = [f'secret_file = "{secret}"']
        node.keys["limits"] = ["handshake_seconds = 60"]
        node.write_config()
    cluster.start()
    beta = cluster.secondary
    used = len(os.listdir(f"/proc/{beta.daemon.pid}/fd"))
    beta.stop()
    assert start_under(beta, ["prlimit", f"--nofile={used + 16 + 10}"])
    cluster.check_in_sync()
    pid = beta.daemon.pid
    with contextlib.ExitStack() as stack:
        for number in range(60):
            sock = stack.enter_context(socket.socket())
            sock.bind((f"127.0.0.{2 + number % 4}", 0))
            sock.connect(("127.0.0.1", beta.replication_port))
        gate = "replication"
        wait_until("the flood is in", lambda: len(os.listdir(f"/proc/{pid}/fd")) >= used + 6)
        cluster.proxy.refuse()
        cluster.proxy.heal()
        cluster.check_in_sync()
        assert len(os.listdir(f"/proc/{pid}/fd")) <= used + 10 + 2, "the reserve is not for them"
        assert beta.status()["connections"][gate]["open"] == 1


def test_too_few_descriptors_to_serve(make_cluster: MakeCluster) -> None:
    """It says so, and does not begin."""
    cluster = make_cluster(remotes=())
    cluster.primary.keys["limits"] = ["descriptors_reserved = 65536"]
    cluster.primary.write_config()
    cluster.create()
    done = subprocess.run(
        [sys.executable, "-m", "nbdmirror", "serve", str(cluster.primary.config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 0:
        pytest.skip("this machine has more descriptors than that")
    assert done.returncode == 2 and "LimitNOFILE" in done.stderr, done.stderr
