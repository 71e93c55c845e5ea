"""V8: applying on the secondary can be frozen and delayed, over crashes too; status shows it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster
from tests.integration.process import wait_until
from tests.integration.tools import connect, pattern

MIB = 1 << 20


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as one:
        one.start()
        one.wait_in_sync()
        yield one


def facet_start(cluster: Cluster) -> bytes:
    with open(cluster.secondary.facets(cluster.volumes[0].name)[0], "rb") as file:
        return file.read(MIB)


def test_frozen_facets_stay_over_kill_and_restart(cluster: Cluster) -> None:
    """V8, V7: frozen, the facets keep their point though the log receives, through SIGKILL and
    through a clean restart; thawed, they follow."""
    client = connect(cluster.primary.uri())
    client.pwrite(pattern(MIB, 1), 0)
    cluster.wait_in_sync()
    cluster.secondary.ok("apply", "freeze")
    client.pwrite(pattern(MIB, 2), 0)
    client.flush()

    def received() -> bool:
        upstream = cluster.secondary.status()["upstream"]
        return bool(upstream["durable_seq"] == cluster.primary.status()["log"]["next_seq"] - 1)

    wait_until("the secondary has received the second write", received)
    for how in ("kill", "stop"):
        upstream = cluster.secondary.status()["upstream"]
        assert upstream["apply"]["frozen"] and upstream["apply"]["pending_records"] > 0
        assert upstream["next_action"] == "nbdmirror apply thaw"
        assert facet_start(cluster) == pattern(MIB, 1)
        getattr(cluster.secondary, how)()
        assert facet_start(cluster) == pattern(MIB, 1)
        cluster.secondary.start()
    assert facet_start(cluster) == pattern(MIB, 1)
    cluster.secondary.ok("apply", "thaw")
    cluster.check_in_sync()
    assert facet_start(cluster) == pattern(MIB, 2)


def test_a_frozen_synchronous_secondary_whose_log_is_full(tmp_path: Path) -> None:
    """I8, V8: clients of ``on_link_loss = "continue"`` do not wait for the thaw; the status says
    what the remote waits for; thawed, it follows without a resync."""
    keys = {"mode": "sync", "on_link_loss": "continue"}
    with Cluster(tmp_path, remote_keys=keys, log_size=64 * MIB, remote_log_size=8 * MIB) as cluster:
        cluster.start()
        cluster.secondary.ok("apply", "freeze")
        client = connect(cluster.primary.uri())
        for number in range(12):
            client.pwrite(pattern(MIB, number), number % 4 * MIB)
        entry = cluster.primary.until("is refused", lambda one: one["state"] == "refused")
        assert "its log is full: nbdmirror apply thaw" in entry["why"] and entry["next_action"], (
            entry
        )
        cluster.secondary.ok("apply", "thaw")
        cluster.check_in_sync()
        kinds = [event["kind"] for event in cluster.primary.events()]
        assert kinds.count("overflow") == 0


def test_apply_is_refused_on_a_primary(cluster: Cluster) -> None:
    """V8: exit 4, and it says where to run it."""
    result = cluster.primary.cli("apply", "freeze")
    assert result.code == 4 and "secondary" in result.err


def test_what_a_delay_holds_back_is_applied_once_the_primary_is_lost(tmp_path: Path) -> None:
    """V8, runbook "If alpha is lost for good": a stop alone would leave it in the log, which
    ``create --force`` replaces."""
    with Cluster(tmp_path, remote_keys={"apply_delay": "1h"}) as cluster:
        cluster.start()
        client = connect(cluster.primary.uri())
        client.pwrite(pattern(MIB, 3), 0)
        client.flush()
        cluster.primary.until("received", lambda one: one["lag"]["records"] == 0)
        failed = cluster.primary.cli("wait", "--until", "in-sync", "--timeout", "1s")
        assert failed.code == 3 and "not applied there: slow, or frozen or delayed" in failed.err
        cluster.primary.kill()
        assert facet_start(cluster) != pattern(MIB, 3)
        cluster.secondary.stop()
        assert "the volumes lack (a start, and nbdmirror apply" in cluster.secondary.create().err
        cluster.secondary.start()
        cluster.secondary.ok("apply", "thaw", "--now")
        cluster.secondary.ok("wait", "--until", "verified", "--timeout", "10s")
        cluster.secondary.stop()
        assert facet_start(cluster) == pattern(MIB, 3)


def test_a_wait_whose_output_nobody_reads_says_what_it_came_to(cluster: Cluster) -> None:
    """X4: ``wait | head -1 && failover`` went on though nothing was in sync."""
    node = cluster.primary
    cluster.secondary.kill()
    waits = (
        f"{sys.executable} -m nbdmirror -s {node.admin_socket} wait --until in-sync --timeout 3s"
    )
    script = f"{waits} | :; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n" and "Traceback" not in done.stderr, done


def test_errors_are_not_printed_where_output_is_read(cluster: Cluster) -> None:
    """X4: with stderr closed, as by some supervisors, stdout is still nothing but JSON."""
    command = (
        f"{sys.executable} -m nbdmirror -s {cluster.primary.admin_socket} pause nosuch --json 2>&-"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")


def test_delayed_replica(tmp_path: Path) -> None:
    """V8: with apply_delay the facets follow so much later, and not earlier."""
    delay = 2.0
    with Cluster(tmp_path, remote_keys={"apply_delay": f"{delay:g}s"}) as cluster:
        cluster.start()
        cluster.wait_in_sync()
        client = connect(cluster.primary.uri())
        began = time.monotonic()
        client.pwrite(pattern(MIB, 3), 0)
        while facet_start(cluster) != pattern(MIB, 3):
            assert time.monotonic() - began < delay + 10
        assert time.monotonic() - began >= delay
        assert cluster.secondary.status()["upstream"]["apply"]["delay_s"] == delay
        cluster.check_in_sync()


def test_errors_that_nobody_reads_keep_their_exit_code() -> None:
    """X4: ``status 2>&1 | grep -q`` reads 5, whoever has closed the pipe by then."""
    command = f"{sys.executable} -m nbdmirror -s /nonexistent status 2>&1"
    script = f"{command} | :; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("5\n", ""), done
