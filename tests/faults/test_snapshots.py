"""Faults that meet snapshots and restores (faults 1, 11, 30; V9, V12, O21): the volume goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from tests.faults.inject import (
    ALL_POINTS,
    check_equal,
    check_serves,
    is_in_sync,
    needs_root,
    requires_programs,
    start_under,
    strace,
    tmpfs,
    wait_death,
)
from tests.faults.journal import SECTOR, Broken, Journal, Load
from tests.integration.cluster import MIB, Cluster, Json, Node, Volume
from tests.integration.process import wait_until
from tests.integration.tools import connect

MakeCluster = Callable[..., Cluster]
SIZE = 8 * MIB
COPY_S = 60.0
REGION_SECTORS = 65536 // SECTOR
POINTS = {
    ("primary", "pwrite64"): (30, 100, 200),
    ("primary", "fdatasync"): (4, 11, 15),
    ("secondary", "pwrite64"): (3, 6, 12),
    ("secondary", "fdatasync"): (5, 8),
}
"""The Ns of a sweep, by side and call: within the taking, the copies on write, the restore. Each
thread of a node counts for itself, and a secondary writes in batches: so its Ns are small."""


def small_group(make_cluster: MakeCluster) -> Cluster:
    """A primary and a secondary of one small volume."""
    return make_cluster(volumes=[Volume(size=SIZE)], log_size=16 * MIB)


def content(node: Node, name: str = "data") -> bytes:
    """A volume, or a snapshot of it, as a client reads it."""
    handle = connect(node.uri(name))
    try:
        return b"".join(bytes(handle.pread(MIB, at)) for at in range(0, SIZE, MIB))
    finally:
        handle.shutdown()


def snapshots(node: Node) -> list[Json]:
    """All that it lists, oldest first."""
    found: list[Json] = node.rpc("snapshot.list")
    return found


@needs_root
@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_the_disk_of_the_snapshots_runs_full(make_cluster: MakeCluster, side: str) -> None:
    """Fault 11, for real: the layers are on a file system that fills up under load. The oldest
    snapshot that is not protected goes, then the others; each is told of, no request fails, and
    what a protected one needed of one that went has moved to it."""
    cluster = small_group(make_cluster)
    node: Node = getattr(cluster, side)
    journal = Journal(SIZE)
    with tmpfs(node.directory / "layers", 6 * MIB) as disk:
        node.write_config(f'[snapshots]\npath = "{disk}"\n')
        cluster.start()
        write(cluster, journal, 0, 128)
        first = content(cluster.primary)
        cluster.primary.rpc("snapshot.create", protected=True)
        write(cluster, journal, 0, 24)
        cluster.primary.rpc("snapshot.create")
        write(cluster, journal, 8, 24)
        cluster.primary.rpc("snapshot.create")
        wait_until("it has them", lambda: states(node) == ["ok"] * 3)
        with Load(cluster.primary.nbd_socket, journal) as load:
            while states(node) == ["ok"] * 3:
                load.run(1)
                wait_until("it is replicated", lambda: is_in_sync(cluster))
            assert states(node) == ["ok", "lost", "ok"]
            assert content(node, "data@1") == first
            load.run(60)
            assert not load.failures
        check_serves(cluster, journal)
        check_equal(cluster)
        wait_until("all went", lambda: states(node) == ["lost"] * 3)
        lost = [event for event in node.events() if event["kind"] == "snapshot-lost"]
        assert [event["number"] for event in lost] == [2, 3, 1] and "space" in lost[0]["why"]
        node.kill()
        node.start()
        assert states(node) == ["lost"] * 3
        check_serves(cluster, journal)
        check_equal(cluster)
        for one in reversed(cluster.nodes):
            one.stop()


def write(cluster: Cluster, journal: Journal, first: int, count: int) -> None:
    """Overwrites regions of the volume."""
    handle = connect(cluster.primary.uri())
    for region in range(first, first + count):
        sectors = range(region * REGION_SECTORS, (region + 1) * REGION_SECTORS)
        change = journal.issue(sectors[0], len(sectors), zero=False)
        handle.pwrite(b"".join(map(change.content, sectors)), sectors[0] * SECTOR)
        change.acknowledged = journal.clock()
    handle.flush()
    handle.shutdown()


def states(node: Node) -> list[str]:
    """Of its snapshots."""
    return [one["state"] for one in snapshots(node)]


@requires_programs("strace")
@pytest.mark.parametrize(("side", "call"), POINTS)
def test_dies_in_snapshot_and_restore(make_cluster: MakeCluster, side: str, call: str) -> None:
    """Faults 1 and 30: killed while a snapshot is taken, while regions are kept for it, while it is
    restored and the copy runs: the volume is old or new, new if that was said, and stays so;
    the snapshot is what it was taken of, on both nodes."""
    cluster = small_group(make_cluster).start()
    journal, node = Journal(SIZE), getattr(cluster, side)
    deaths = 0
    for when in range(1, 100_000) if ALL_POINTS else POINTS[side, call]:
        act = Act(cluster, journal, when)
        node.stop()
        died = True
        if start_under(node, strace(call, "signal=KILL", when)):
            died = not act.play() or died_in_sync(cluster, node)
            if died:
                assert wait_death(node) == -9
            else:
                node.kill()
        deaths += died
        node.start()
        act.judge()
        if not died and ALL_POINTS:
            break
    assert deaths, f"{call} is never called that often"


def died_in_sync(cluster: Cluster, node: Node) -> bool:
    """Whether the node dies before the remote has everything."""
    wait_until("all is replicated", lambda: not node.alive or is_in_sync(cluster))
    return not node.alive


class Act:
    """A snapshot is taken, the volume overwritten, and restored; any step may be the last."""

    def __init__(self, cluster: Cluster, journal: Journal, seed: int) -> None:
        self._cluster = cluster
        self._journal = journal
        self._seed = seed
        self._taken: str | None = None
        """Its uuid, once that was said."""
        self._asked = self._restored = False
        with Load(cluster.primary.nbd_socket, journal, seed=seed) as load:
            load.run(10)
            self._image = load.read()
        journal.settle(self._image)

    def play(self) -> bool:
        """Whether it came to its end: else the primary has died."""
        with contextlib.suppress(Broken, OSError, ValueError):
            self._play(self._cluster.primary)
            return True
        return False

    def _play(self, primary: Node) -> None:
        self._taken = primary.rpc("snapshot.create")["uuid"]
        with Load(primary.nbd_socket, self._journal, seed=~self._seed) as load:
            load.run(15)
            load.flush()
            self._asked = True
            primary.rpc("restore", snapshot=self._taken, while_attached=True)
            self._restored = True
        self._copied()

    def _copied(self) -> None:
        primary = self._cluster.primary
        what = "the copy ends"
        wait_until(what, lambda: primary.rpc("status")["restore"] is None, COPY_S)

    def judge(self) -> None:
        """Both nodes are up again."""
        primary = self._cluster.primary
        image = content(primary)
        if self._restored:
            assert image == self._image, "a restore that was complete is undone"
        elif not (self._asked and image == self._image):
            self._journal.check(image)
        self._copied()
        assert content(primary) == image
        self._journal.settle(image)
        check_equal(self._cluster)
        for one in self._cluster.nodes:
            self._judge_snapshots(one)
        for found in snapshots(primary):
            primary.rpc("snapshot.delete", snapshot=found["uuid"], everywhere=True)

    def _judge_snapshots(self, node: Node) -> None:
        there = {one["uuid"]: one["state"] for one in snapshots(node)}
        if self._taken is not None:
            assert self._taken in there
        if there.get(self._taken or "") == "ok":
            assert content(node, f"data@{(self._taken or '')[:8]}") == self._image
