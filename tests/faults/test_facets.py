"""One of several facets fails: the client sees nothing, and it comes back (M12, M14, M15, I8)."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.inject import (
    bury,
    check_equal,
    check_serves,
    needs_root,
    requires_programs,
    start_under,
    strace,
)
from tests.faults.journal import Background, Journal, Load
from tests.faults.test_disk import SIZE, MakeCluster, looped
from tests.integration.cluster import Cluster, Volume
from tests.integration.process import wait_until
from tests.integration.tools import connect, pattern


def two_facets(make_cluster: MakeCluster) -> Cluster:
    return make_cluster(volumes=[Volume(size=SIZE, facets=2)], log_size=16 << 20).start()


def failing(cluster: Cluster, call: str, when: str | int, number: int = 1) -> str:
    """Restarts the primary so that calls on one facet fail; returns the facet's path."""
    node = cluster.primary
    node.stop()
    path = node.facets("data")[number]
    assert start_under(node, strace(call, "error=EIO", when, path=path))
    return str(path)


def entry(cluster: Cluster, path: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = cluster.primary.rpc("facet.list")
    return next(one for one in found if one["path"] == path)


@requires_programs("strace")
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("call", "when"), [("pwrite64", "30"), ("fdatasync", "1")])
def test_a_failing_facet_is_not_noticed(
    make_cluster: MakeCluster, call: str, when: str, number: int
) -> None:
    """M12, I8: a write or sync of one facet fails under load: out of service, durably, and the
    client sees neither an error nor wrong data, over a kill too; one command brings it back.

    Runbook: one of several facets fails on write or sync."""
    cluster = two_facets(make_cluster)
    journal = Journal(SIZE)
    path = failing(cluster, call, when, number)
    node = cluster.primary
    with Load(node.nbd_socket, journal, flush_every=2) as load, Background(load):
        out = "not-synchronised"
        wait_until("the facet failed", lambda: entry(cluster, path)["state"] == out)
        load.wait(20)
    assert not load.failures
    check_serves(cluster, journal)
    assert "failed" in entry(cluster, path)["why"]
    # More than once: the fault is injected once into each thread that syncs.
    online = ("facet", "online", path, "--wait", "--timeout", "30")
    wait_until("it is back", lambda: node.cli(*online).code == 0)
    check_equal(cluster)
    bury(node)
    node.start()
    check_serves(cluster, journal)
    check_equal(cluster)


@needs_root
@requires_programs("losetup")
@pytest.mark.parametrize("number", [0, 1])
def test_a_facet_is_pulled_out(make_cluster: MakeCluster, number: int) -> None:
    """M12, M14, I5: the kernel gives a device that is gone no capacity: reads of it end at once,
    without an error, and nothing of it is data. Nobody takes that for zeros or for holes: not a
    client, not a resync, nor a clearing for done.

    Runbook: one of several facets fails on write or sync."""
    cluster = make_cluster(volumes=[Volume(size=SIZE, facets=2)], log_size=16 << 20)
    node = cluster.primary
    image = node.directory / "image"
    image.touch()
    os.truncate(image, SIZE)
    with looped(image) as device:
        paths = [*node.facets("data")]
        node.config.write_text(node.config.read_text().replace(str(paths[number]), device))
        paths[number] = Path(device)
        node.facets = lambda volume: paths  # type: ignore[method-assign]
        cluster.start()
        data = bytearray(pattern(SIZE, 7))
        handle = connect(node.uri())
        handle.pwrite(bytes(data), 0)
        handle.flush()
        os.sync()  # or what the device still has to write makes the file longer again
        os.truncate(image, 0)
        subprocess.run(["losetup", "-c", device], check=True)
        assert Path(f"/sys/block/{Path(device).name}/size").read_text() == "0\n"
        for offset in range(0, SIZE, SIZE // 4):
            assert handle.pread(4096, offset) == data[offset : offset + 4096]
        node.ok("resync", "beta", "--full")
        node.until("is in sync again", lambda one: one["state"] == "synchronised")
        handle.trim(65536, 65536)
        data[65536:131072] = bytes(65536)
        wait_until("it is out", lambda: entry(cluster, device)["state"] == "not-synchronised")
        handle.flush()
        assert handle.pread(SIZE, 0) == data
        os.truncate(image, SIZE)
        subprocess.run(["losetup", "-c", device], check=True)
        node.ok("facet", "online", device, "--wait", "--timeout", "30")
        check_equal(cluster)
        assert Path(device).read_bytes() == data
        for one in reversed(cluster.nodes):
            one.stop()


@requires_programs("strace")
def test_reads_are_shared_out(make_cluster: MakeCluster) -> None:
    """M5: reads all over the volume go to both facets; those of a sequential stream to one."""
    cluster = two_facets(make_cluster)
    node = cluster.primary
    node.stop()
    trace = node.directory / "reads"
    calls = ["-y", "-o", str(trace), "-e", "trace=pread64,preadv,preadv2"]
    assert start_under(node, ["strace", "-D", "-f", "-qqq", *calls])
    handle = connect(node.uri())
    places = random.Random(5)

    def reads(offsets: Iterable[int]) -> list[int]:
        """How many the facets have served, the one who did most first."""
        before = trace.read_text().count
        known = [before(str(path)) for path in node.facets("data")]
        for offset in offsets:
            handle.pread(4096, offset)
        after = trace.read_text().count
        paths = zip(node.facets("data"), known, strict=True)
        return sorted((after(str(path)) - count for path, count in paths), reverse=True)

    most, fewest = reads(places.randrange(SIZE // 4096) * 4096 for _ in range(200))
    assert most + fewest >= 200 and fewest >= 50, (most, fewest)
    most, fewest = reads(range(0, 200 * 4096, 4096))
    assert fewest <= 2, (most, fewest)


@requires_programs("strace")
@pytest.mark.parametrize("number", [0, 1])
def test_a_facet_and_a_remote_fail_at_once(make_cluster: MakeCluster, number: int) -> None:
    """M15, I8: two local facets, two remotes, one of each fails under load: the client sees neither
    an error nor wrong data; both come back by themselves, and all copies are equal.

    Runbook: a local facet and a remote fail at once."""
    cluster = make_cluster(
        volumes=[Volume(size=SIZE, facets=2)], remotes=("beta", "gamma"), log_size=16 << 20
    ).start()
    journal = Journal(SIZE)
    path = failing(cluster, "pwrite64", "30+", number)
    node, remote = cluster.primary, cluster.secondaries[number]
    with Load(node.nbd_socket, journal, flush_every=2) as load, Background(load):
        remote.kill()
        out = "not-synchronised"
        wait_until("the facet failed", lambda: entry(cluster, path)["state"] == out)
        node.until("is lost", lambda one: one["state"] == "behind", remote=remote.name)
        load.wait(20)
    assert not load.failures
    check_serves(cluster, journal)
    bury(node)
    node.start()
    remote.start()
    with Load(node.nbd_socket, journal, seed=2) as load, Background(load):
        wait_until("it is back", lambda: entry(cluster, path)["state"] == "synchronised")
    assert not load.failures
    check_serves(cluster, journal)
    check_equal(cluster)


@requires_programs("strace")
def test_a_failed_facet_is_not_trusted_after_a_kill(make_cluster: MakeCluster) -> None:
    """M12, O16: what failed for good is out of service after a death too, until it was mended from
    the log; nothing that it lacks is ever read."""
    cluster = two_facets(make_cluster)
    journal = Journal(SIZE)
    path = failing(cluster, "pwrite64", "10+", 0)
    node = cluster.primary
    with Load(node.nbd_socket, journal) as load:
        load.run(30)
        assert not load.failures
    bury(node)
    if start_under(node, strace("pwrite64", "error=EIO", "1+", path=node.facets("data")[0])):
        assert entry(cluster, path)["state"] == "not-synchronised"
        check_serves(cluster, journal)
        bury(node)
    node.start()
    check_serves(cluster, journal)
    wait_until("it is back", lambda: entry(cluster, path)["state"] == "synchronised")
    check_equal(cluster)


@requires_programs("strace")
def test_a_failed_read_is_served_and_mended(make_cluster: MakeCluster) -> None:
    """M14: the client gets the data of the other facet, the one that failed is written anew, and
    the error is counted. Runbook: a facet has a bad sector."""
    cluster = two_facets(make_cluster)
    journal = Journal(SIZE)
    with Load(cluster.primary.nbd_socket, journal) as load:
        load.run(20)
    path = failing(cluster, "pread64,preadv,preadv2", "1+", 0)
    check_serves(cluster, journal)
    node = cluster.primary
    kinds = {"read-error", "read-mended"}
    wait_until("mended", lambda: kinds <= {one["kind"] for one in node.events()})
    assert entry(cluster, path)["errors"] > 0
    assert entry(cluster, path)["state"] == "synchronised"
    with Load(node.nbd_socket, journal) as load:
        for _ in range(32):
            load.read()
    assert entry(cluster, path)["state"] == "not-synchronised", "too many errors, still trusted"
    check_serves(cluster, journal)
    bury(node)
    node.start()
    check_equal(cluster)
    check_serves(cluster, journal)
