"""What goes wrong in a resync elsewhere, by the number of the complaint (peers, section 3).

Those that are about speed, loops and yielding are in ``test_resync``; about verify in
``test_verify``; others where what they are about is tested, ``peers`` and the number in their
docstrings (``tests/unit/test_complaints``).
"""

from __future__ import annotations

import os
import time
from functools import partial

from tests.integration.cluster import MIB, Cluster, Json, Volume, nbdmirror
from tests.integration.process import wait_until
from tests.integration.test_replication import MakeCluster
from tests.integration.tools import Writer, connect

KIB = 1 << 10


def fill(cluster: Cluster, content: bytes, *, both: bool = False) -> None:
    """What the facets begin with, while no daemon runs."""
    for node in cluster.nodes if both else [cluster.primary]:
        with node.facets("data")[0].open("r+b") as file:
            file.write(content)


def start(cluster: Cluster) -> None:
    """Starts every node."""
    for node in cluster.nodes:
        node.start()


def _sent_more(cluster: Cluster, size: int) -> bool:
    return cluster.proxy.sent_bytes > size


def test_peers_13_no_copy_counts_before_it_has_the_data(make_cluster: MakeCluster) -> None:
    """UpToDate without data: until the last region is there neither side calls it consistent."""
    cluster = make_cluster(volumes=[Volume(size=16 * MIB)])
    cluster.create()
    fill(cluster, os.urandom(16 * MIB))
    cluster.proxy.shape(rate=6 * MIB)
    start(cluster)
    seen = 0
    while cluster.proxy.sent_bytes < 14 * MIB:
        here = cluster.primary.rpc("status")["remotes"][0]
        there = cluster.secondary.rpc("status")["upstream"]
        if cluster.proxy.sent_bytes < 14 * MIB:
            assert here["state"] != "synchronised", here
            assert there is None or not there["consistent"], there
            seen += 1
    assert seen > 5
    late = cluster.primary.cli("wait", "--until", "in-sync", "--timeout", "0.1")
    assert late.code in (0, 3)
    cluster.check_in_sync()
    assert cluster.secondary.rpc("status")["upstream"]["consistent"]


def test_peers_17_a_slow_link_drops_no_replica(make_cluster: MakeCluster) -> None:
    """Below any rate that was hoped for: one session, no abort, and it ends."""
    cluster = make_cluster(volumes=[Volume(size=2 * MIB)])
    cluster.create()
    fill(cluster, os.urandom(2 * MIB))
    cluster.proxy.shape(rate=256 * KIB)
    start(cluster)
    cluster.check_in_sync()
    assert cluster.proxy.connections == 1
    kinds = [event["kind"] for event in cluster.primary.events()]
    assert kinds.count("handshake") == 1, kinds


def test_peers_23_a_lost_link_does_not_begin_from_zero(make_cluster: MakeCluster) -> None:
    """Lost twice in the middle of a first synchronisation: what was acknowledged stays done."""
    size = 24 * MIB
    cluster = make_cluster(volumes=[Volume(size=size)])
    cluster.create()
    fill(cluster, os.urandom(size))
    cluster.proxy.shape(rate=8 * MIB)
    start(cluster)
    for part in (8 * MIB, 16 * MIB):
        wait_until("some is sent", partial(_sent_more, cluster, part))
        cluster.proxy.reset()
    cluster.check_in_sync()
    # What was on its way each time, at most what a slow link takes in a moment, goes twice.
    assert cluster.proxy.sent_bytes < size + 10 * MIB


def test_peers_25_a_copy_that_is_reused_shows_progress(make_cluster: MakeCluster) -> None:
    """Always 0 % on reuse, or above 100 %: what is found to be the same is done, and told as
    saved; the hashes are slowed down so that it can be watched."""
    size = 64 * MIB
    cluster = make_cluster(remote_keys={"max_rate": 16 * KIB})
    cluster.create()
    fill(cluster, os.urandom(size), both=True)
    start(cluster)
    seen: list[Json] = []

    def ended() -> bool:
        entry = cluster.primary.rpc("status")["remotes"][0]
        if entry["resync"] is not None:
            seen.append(entry["resync"])
        return bool(entry["state"] == "synchronised")

    wait_until("in sync", ended, 60)
    done = [(one["pass"], one["done_bytes"]) for one in seen]
    assert done == sorted(done) and len(set(done)) > 3, done
    assert all(one["done_bytes"] <= one["total_bytes"] for one in seen)
    last = seen[-1]
    assert last["skipped_bytes"] >= size // 2 and last["sent_bytes"] < size // 1000, last
    cluster.compare()


def test_peers_27_what_is_behind_is_told_by_its_oldest_record(make_cluster: MakeCluster) -> None:
    """Lag in seconds grows with the clock while a record is not durable there, whatever is written
    after it; and is none once it is."""
    cluster = make_cluster().start()
    cluster.proxy.refuse()
    cluster.primary.until("is lost", lambda one: one["link"] != "connected")
    handle = connect(cluster.primary.uri())
    handle.pwrite(os.urandom(4096), 0)
    began = time.monotonic()
    first = cluster.primary.rpc("status")["remotes"][0]["lag"]["seconds"]
    time.sleep(1.0)  # what the lag has to grow by
    handle.pwrite(os.urandom(4096), 4096)
    lag = cluster.primary.rpc("status")["remotes"][0]["lag"]
    assert lag["records"] == 2
    assert first < 0.9 <= lag["seconds"] <= time.monotonic() - began + 0.5
    cluster.proxy.heal()
    cluster.check_in_sync()
    assert cluster.primary.rpc("status")["remotes"][0]["lag"]["seconds"] == 0


def test_peers_10_a_clean_reboot_decides_once(make_cluster: MakeCluster) -> None:
    """15,943 aborted handshakes in 20 minutes: after clean restarts of either side, and of both,
    one handshake is enough and nothing is copied; a link that is turned down is tried again seldom,
    and costs few lines of history."""
    cluster = make_cluster().start()
    connect(cluster.primary.uri()).pwrite(os.urandom(4 * MIB), 0)
    cluster.wait_in_sync()
    sent = cluster.proxy.sent_bytes
    for stopped in ([cluster.secondary], [cluster.primary], cluster.nodes):
        for node in stopped:
            node.stop()
        for node in stopped:
            node.start()
        cluster.check_in_sync()
    kinds = [(e["kind"], e.get("action")) for e in cluster.primary.events()]
    assert [one for one in kinds if one[0] == "handshake"] == [("handshake", "continue")], kinds
    assert cluster.proxy.sent_bytes - sent < MIB
    stranger = make_cluster(group="another")
    assert stranger.secondary.create().code == 0
    stranger.secondary.start()
    cluster.proxies.pop("beta").close()
    cluster.secondary.replication_port = stranger.secondary.replication_port
    cluster.primary.write_config()
    cluster.primary.restart()
    entry = cluster.primary.until("is refused", lambda one: one["state"] == "refused")
    assert entry["next_action"]
    before = len(cluster.primary.events())
    time.sleep(8.0)  # in which others made a hundred attempts
    assert len(cluster.primary.events()) - before <= 6


def test_peers_15_a_first_synchronisation_can_be_stopped(make_cluster: MakeCluster) -> None:
    """A panic, or a stop that hangs until the power is cut: each side stops cleanly, and at once,
    in the middle of it; killed, it takes nobody along; and it goes on."""
    size = 24 * MIB
    cluster = make_cluster(volumes=[Volume(size=size)])
    cluster.create()
    fill(cluster, content := os.urandom(size))
    cluster.proxy.shape(rate=6 * MIB)
    start(cluster)
    for part, node, end in (
        (2 * MIB, cluster.secondary, cluster.secondary.stop),
        (6 * MIB, cluster.primary, cluster.primary.stop),
        (10 * MIB, cluster.secondary, cluster.secondary.kill),
    ):
        wait_until("some is sent", partial(_sent_more, cluster, part))
        began = time.monotonic()
        end()
        assert time.monotonic() - began < 10
        others = [one for one in cluster.nodes if one is not node]
        assert all(one.alive for one in others)
        node.start()
        assert connect(cluster.primary.uri()).pread(MIB, 8 * MIB) == content[8 * MIB : 9 * MIB]
    cluster.check_in_sync()


def test_peers_16_another_size_leaves_nothing_behind(make_cluster: MakeCluster) -> None:
    """A resize that left every copy inconsistent: a size that is not what was created is refused on
    either side, by name, and changes nothing; with the right one all is as it was."""
    cluster = make_cluster().start()
    connect(cluster.primary.uri()).pwrite(os.urandom(MIB), 0)
    cluster.check_in_sync()
    sent = cluster.proxy.sent_bytes
    for node in cluster.nodes:
        node.stop()
        right = node.config.read_text()
        node.config.write_text(right.replace(f"size = {64 * MIB}", f"size = {96 * MIB}", 2))
        assert node.config.read_text() != right
        refused = nbdmirror("serve", str(node.config))
        assert refused.code != 0 and "data" in refused.err and str(96 * MIB) in refused.err, refused
        node.config.write_text(right)
        node.start()
        cluster.check_in_sync()
    assert cluster.proxy.sent_bytes - sent < MIB


def test_peers_30_a_copy_is_seconds_behind(make_cluster: MakeCluster) -> None:
    """Days of data at risk, because a copy follows backups only: here it follows the writes, and
    says by how much."""
    cluster = make_cluster().start()
    lags = []
    with Writer(cluster.primary.uri(), rate=2 * MIB):
        for _ in range(20):
            lags.append(cluster.primary.rpc("status")["remotes"][0]["lag"]["seconds"])
            time.sleep(0.2)  # between two looks
    assert sorted(lags)[15] < 2, lags
    cluster.check_in_sync()
