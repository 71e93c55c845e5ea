"""The disk of the log fails under load, and a new one is put in: clients see nothing (M13)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.inject import (
    bury,
    check_equal,
    check_serves,
    needs_root,
    reboot,
    requires_programs,
    start_under,
    strace,
    tmpfs,
)
from tests.faults.journal import Background, Journal, Load
from tests.faults.test_disk import SIZE, MakeCluster, files, small_group
from tests.integration.cluster import Cluster
from tests.integration.process import wait_until


def log_of(cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = cluster.primary.status()["log"]
    return found


def lose_the_log(
    cluster: Cluster,
    journal: Journal,
    call: str = "pwritev2",
    when: str = "30+",
    path: Path | None = None,
) -> None:
    """The log's disk fails for good under a load that notices nothing."""
    node = cluster.primary
    node.stop()
    assert start_under(node, strace(call, "error=EIO", when, path=path or files(node)["log"]))
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
    assert _redone(cluster) > 0, "nothing came from the new log"
    check_serves(cluster, journal)
    check_equal(cluster)


@needs_root
@requires_programs("strace")
def test_a_log_on_a_disk_of_its_own(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """M13: `log.path` names another disk than that of state and facets: a death is redone from
    there; that disk fails under load, and the log goes on beside the facets; clients see nothing.
    """
    with tmpfs(tmp_path / "fast", 20 << 20) as disk:
        path = disk / "db.log"
        cluster = small_group(make_cluster)
        node = cluster.primary
        node.keys["log"] = [f'path = "{path}"']
        node.write_config()
        cluster.start()
        assert path.exists() and not files(node)["log"].exists()
        journal = Journal(SIZE)
        with Load(node.nbd_socket, journal, flush_every=2) as load:
            load.run(20)
        bury(node)
        node.start()
        assert _redone(cluster) > 0, "nothing came from the log on its own disk"
        check_serves(cluster, journal)
        lose_the_log(cluster, journal, path=path)
        with Load(node.nbd_socket, journal, flush_every=2) as load, Background(load):
            node.ok("log", "replace", str(files(node)["log"]))
            load.wait(20)
        assert not load.failures
        bury(node)
    node.start()  # without that disk
    assert _redone(cluster) > 0, "nothing came from the log beside the facets"
    check_serves(cluster, journal)
    check_equal(cluster)


def _redone(cluster: Cluster) -> int:
    """How many records the primary's last start found in its log."""
    (started,) = [one for one in cluster.primary.events() if one["kind"] == "started"]
    records: int = started["records"]
    return records


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
    missing = node.directory / "not-mounted"
    refused = node.cli("log", "replace", str(missing / "moved.log"))
    assert refused.code == 1 and f"no directory {missing}" in refused.err
    assert not missing.exists()
    node.restart()
    check_serves(cluster, journal)
