"""A resync sends what differs and no more, comes to an end under any load, and yields (X1, X3).

Each test names the complaint of others that it answers (the list of what goes wrong elsewhere).
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.integration.cluster import MIB, Cluster, Json, Node, Volume
from tests.integration.process import wait_until
from tests.integration.test_overflow import overflow, tracking
from tests.integration.test_replication import STALL_S, MakeCluster
from tests.integration.tools import Writer, connect

KIB = 1 << 10
REGION = 64 * KIB
SMALL_LOG = 4 * MIB


def _put(node: Node, content: bytes | bytearray) -> None:
    """What the facet begins with, while no daemon runs."""
    with node.facets("data")[0].open("r+b") as file:
        file.write(content)


def overflowed(cluster: Cluster) -> int:
    """How often the log overflowed."""
    return sum(event["kind"] == "overflow" for event in cluster.primary.events())


def test_only_blocks_that_differ_travel(make_cluster: MakeCluster) -> None:
    """4 KiB written in each of 256 regions: 1 MiB travels, not the 16 MiB that are marked."""
    cluster = make_cluster(log_size=SMALL_LOG).start()
    handle = connect(cluster.primary.uri())
    handle.pwrite(os.urandom(32 * MIB), 0)
    cluster.check_in_sync()
    cluster.proxy.refuse()
    overflow(cluster)
    cluster.primary.until("is tracked", tracking)
    before = cluster.proxy.sent_bytes
    cluster.proxy.heal()
    cluster.check_in_sync()
    sent = cluster.proxy.sent_bytes - before
    assert 256 * 4 * KIB <= sent < 4 * MIB, f"{sent} bytes for 1 MiB that differs"


def test_a_copy_that_was_brought_is_taken_over_by_comparison(make_cluster: MakeCluster) -> None:
    """peers 18, 20, 23: first synchronisation moves nothing that is there already."""
    cluster = make_cluster()
    content = bytearray(random.Random(1).randbytes(48 * MIB))
    cluster.create()
    _put(cluster.primary, content)
    for block in range(0, 48 * MIB, 4 * MIB):
        content[block : block + 4096] = bytes(4096)
    _put(cluster.secondary, content)
    for node in cluster.nodes:
        node.start()
    cluster.check_in_sync()
    sent = cluster.proxy.sent_bytes
    assert sent < MIB, f"{sent} bytes for 12 blocks that differ"


def _image(node: Node, target: Path) -> None:
    """What a snapshot of its machine holds."""
    node.freeze()
    shutil.copytree(node.directory, target)
    node.thaw()


def _set_back(node: Node, image: Path) -> None:
    """The machine is set back to it; its files stay the files that they are."""
    node.kill()
    for path in (one for one in image.rglob("*") if one.is_file()):
        (node.directory / path.relative_to(image)).write_bytes(path.read_bytes())
    node.start()


@pytest.mark.parametrize("within", [True, False], ids=["within", "later"])
def test_a_remote_that_is_set_back_into_a_resync_is_compared(
    make_cluster: MakeCluster, tmp_path: Path, within: bool
) -> None:
    """Within that resync, or when it had ended and the next one was due: no record tells it."""
    cluster = make_cluster(volumes=[Volume(size=16 * MIB)], log_size=SMALL_LOG)
    cluster.create()
    _put(cluster.primary, os.urandom(16 * MIB))
    for node in cluster.nodes:
        node.start()
    cluster.proxy.shape(rate=3 * MIB)
    primary, secondary = cluster.primary, cluster.secondary

    def has(share: float) -> None:
        wanted = share * 16 * MIB
        primary.until("is on its way", lambda o: o["resync"] and o["resync"]["done_bytes"] > wanted)

    has(0.25)
    _image(secondary, tmp_path / "image")
    if within:
        has(0.6)
    else:
        cluster.proxy.heal()
        cluster.check_in_sync()
        cluster.proxy.refuse()
        overflow(cluster, regions=64)
        primary.until("is tracked", tracking)
    _set_back(secondary, tmp_path / "image")
    cluster.proxy.heal()
    cluster.check_in_sync()
    why = [one["why"] for one in primary.events() if one["kind"] == "handshake"][-1]
    assert "an old copy of it" in why, why


def test_zeros_are_holes_on_the_wire_and_on_the_disk(make_cluster: MakeCluster) -> None:
    """Written zeros and holes cost neither link nor space."""
    cluster = make_cluster()
    cluster.create()
    facet = cluster.primary.facets("data")[0]
    with facet.open("r+b") as file:
        file.write(bytes(32 * MIB))
        file.write(os.urandom(MIB))
    for node in cluster.nodes:
        node.start()
    cluster.check_in_sync()
    assert cluster.proxy.sent_bytes < 2 * MIB
    there = cluster.secondary.facets("data")[0]
    assert there.stat().st_blocks * 512 < 3 * MIB
    handle = connect(cluster.primary.uri())
    handle.pwrite(os.urandom(16 * MIB), 0)
    cluster.check_in_sync()
    assert there.stat().st_blocks * 512 > 16 * MIB
    cluster.proxy.refuse()
    cluster.primary.until("is lost", lambda one: one["link"] != "connected")
    handle.pwrite(bytes(16 * MIB), 0)
    cluster.primary.rpc("resync", remote="beta", full=True)
    before = cluster.proxy.sent_bytes
    cluster.proxy.heal()
    cluster.check_in_sync()
    assert cluster.proxy.sent_bytes - before < 3 * MIB
    assert there.stat().st_blocks * 512 < 3 * MIB, "what was data is a hole now"


def test_lz4_where_it_pays(make_cluster: MakeCluster) -> None:
    """A resync of what compresses sends less than there is."""
    cluster = make_cluster(remote_keys={"compression": "lz4"})
    cluster.create()
    cluster.primary.facets("data")[0].write_bytes(b"the same again and again " * (2 * MIB))
    with cluster.primary.facets("data")[0].open("r+b") as file:
        file.truncate(64 * MIB)
    for node in cluster.nodes:
        node.start()
    cluster.check_in_sync()
    assert cluster.proxy.sent_bytes < 8 * MIB


def test_max_rate_caps_the_resync(make_cluster: MakeCluster) -> None:
    """peers 21, 22, 29: one number, kept, and no client is blocked by it."""
    cluster = make_cluster(remote_keys={"max_rate": "4MiB"})
    cluster.create()
    _put(cluster.primary, os.urandom(24 * MIB))
    cluster.secondary.start()
    cluster.primary.start()
    began = time.monotonic()
    with Writer(cluster.primary.uri(), offset=32 * MIB, blocks=64) as writer:
        cluster.primary.until("is resyncing", lambda one: one["resync"] is not None)
        wait_until("8 MiB are sent", lambda: cluster.proxy.sent_bytes > 8 * MIB)
        took = time.monotonic() - began
        assert 1.5 <= took <= 20, f"8 MiB in {took:.1f} s"
    assert writer.slowest_s < STALL_S
    cluster.check_in_sync()


def test_a_client_that_rewrites_all_faster_than_the_link(make_cluster: MakeCluster) -> None:
    """peers 12, 28: passes over the map, then in order: the time to in-sync is bounded.

    The volume is rewritten at more than what the link takes; the log holds the difference for as
    long as the end takes: once the volume at half of the link, and then that backlog.

    Runbook: clients write faster than the link."""
    cluster = make_cluster(volumes=[Volume(size=4 * MIB)], log_size=512 * MIB)
    cluster.create()
    _put(cluster.primary, os.urandom(4 * MIB))
    cluster.secondary.start()
    cluster.proxy.shape(rate=MIB)
    cluster.primary.start()
    with Writer(cluster.primary.uri(), blocks=1024, rate=3 * MIB) as writer:
        began = time.monotonic()
        cluster.primary.until("is on its way", lambda one: one["state"] == "resyncing")
        cluster.wait_in_sync(120)
        took = time.monotonic() - began
        rate = writer.writes * 4096 / took
        assert overflowed(cluster) == 0
    copying = 4.0
    load = rate / MIB
    assert took < copying * (1 + 2 * (1 + load) + 2 * load) + 15
    assert rate > MIB, "or the link was not too slow"
    assert writer.slowest_s < STALL_S
    print(f"in sync after {took:.1f} s, written {rate / MIB:.1f} MiB/s over a link of 1 MiB/s")
    cluster.proxy.heal()
    cluster.check_in_sync()


def test_a_log_that_blocks_brings_any_client_in_sync(make_cluster: MakeCluster) -> None:
    """``on_full = "block"``: with a small log too, because writes wait for the link.

    Runbook: clients write faster than the link."""
    cluster = make_cluster(volumes=[Volume(size=8 * MIB)], log_size=2 * MIB, on_full="block")
    cluster.create()
    cluster.secondary.start()
    cluster.proxy.shape(rate=3 * MIB)
    cluster.primary.start()
    with Writer(cluster.primary.uri(), blocks=2048):
        cluster.wait_in_sync(60)
        assert overflowed(cluster) == 0
    cluster.proxy.heal()
    cluster.check_in_sync()


def test_a_log_that_is_too_small_says_so_and_does_not_loop(make_cluster: MakeCluster) -> None:
    """peers 11, 12, 25: the cause is told, with the numbers; no storm of overflows.

    Runbook: clients write faster than the link."""
    cluster = make_cluster(volumes=[Volume(size=8 * MIB)], log_size=1 * MIB)
    cluster.create()
    cluster.secondary.start()
    cluster.proxy.shape(rate=1 * MIB)
    cluster.primary.start()
    with Writer(cluster.primary.uri(), blocks=2048) as writer:
        entry = cluster.primary.until(
            "says why", lambda one: one["why"] and "the log needs" in one["why"], s=60
        )
        assert entry["resync"]["phase"] == "passes"
        passes = entry["resync"]["pass"]
        seen: list[Json] = []
        for _ in range(20):
            seen.append(cluster.primary.remote()["resync"])
            time.sleep(0.2)  # so long there could be a storm
        assert overflowed(cluster) <= 2
    assert passes >= 1 and writer.slowest_s < STALL_S
    cluster.check_in_sync()


def test_a_link_that_flaps_at_the_threshold(make_cluster: MakeCluster) -> None:
    """peers 12: each time the link is up something is done for good; it ends."""
    cluster = make_cluster(volumes=[Volume(size=64 * MIB)], log_size=SMALL_LOG)
    cluster.create()
    _put(cluster.primary, os.urandom(40 * MIB))
    cluster.secondary.start()
    cluster.proxy.shape(rate=4 * MIB)
    cluster.primary.start()
    with Writer(cluster.primary.uri(), offset=48 * MIB, blocks=512, rate=MIB / 2) as writer:
        dirty = [cluster.primary.remote()["dirty"]["bytes"]]
        for _ in range(6):
            cluster.primary.until("is connected", lambda one: one["link"] == "connected")
            time.sleep(1.0)  # how long the link is up each time
            dirty.append(cluster.primary.remote()["dirty"]["bytes"])
            cluster.proxy.reset()
        slack = 3 * MIB  # what the writer marks again
        assert all(b <= a + slack for a, b in itertools.pairwise(dirty)), dirty
        assert dirty[-1] < dirty[0] - 6 * MIB, dirty
        cluster.wait_in_sync(90)
        assert overflowed(cluster) <= 2
    assert writer.slowest_s < STALL_S
    cluster.check_in_sync()


def test_lag_is_a_time_in_the_map_too(make_cluster: MakeCluster) -> None:
    """peers 27: how far behind, in seconds, also once the log has overflowed."""
    cluster = make_cluster(log_size=SMALL_LOG).start()
    cluster.proxy.refuse()
    overflow(cluster)
    cluster.primary.until("is tracked", tracking)
    first = cluster.primary.remote()["lag"]["seconds"]
    time.sleep(1.0)  # what the lag has to grow by
    second = cluster.primary.remote()["lag"]["seconds"]
    assert first > 0 and 0.9 <= second - first < 5
    cluster.proxy.heal()
    cluster.check_in_sync()
    assert cluster.primary.remote()["lag"]["seconds"] < 1


def test_a_comparison_that_is_asked_for_hides_no_lag(make_cluster: MakeCluster) -> None:
    """peers 27: what a remote lacks is as old as it was, though its records have left the log; also
    while it is copied, and over a restart."""
    cluster = make_cluster(remote_keys={"max_rate": "1MiB"}).start()
    cluster.proxy.refuse()
    cluster.primary.until("is lost", lambda one: one["link"] != "connected")
    began = time.monotonic()
    connect(cluster.primary.uri()).pwrite(os.urandom(4 * MIB), 0)
    written = time.monotonic()

    def check() -> None:
        asked = time.monotonic()
        lag = cluster.primary.rpc("status")["remotes"][0]["lag"]["seconds"]
        assert asked - written - 0.1 <= lag <= time.monotonic() - began + 0.1, lag

    cluster.primary.rpc("resync", remote="beta", full=True)
    time.sleep(1.0)  # what the lag has to grow by
    check()
    cluster.primary.restart()
    check()
    cluster.proxy.heal()
    cluster.primary.until("copies", lambda one: (one["resync"] or {}).get("done_bytes"))
    check()
    cluster.check_in_sync()
    assert cluster.primary.remote()["lag"]["seconds"] == 0


def _fair(found: list[int], size: int) -> None:
    """When one of them is through the others have done their part, too."""
    assert min(found) >= size // 5, found


def test_two_resyncs_do_not_starve_each_other(make_cluster: MakeCluster) -> None:
    """Both remotes of one node, and a client that they yield to: all make progress at once."""
    size = 64 * MIB
    cluster = make_cluster(remotes=["beta", "gamma"], log_size=SMALL_LOG)
    cluster.create()
    _put(cluster.primary, os.urandom(size))
    for node in cluster.nodes:
        node.start()
    with Writer(cluster.primary.uri(), blocks=256, rate=MIB) as writer:
        _fair(_when_one_is_through([(cluster.primary, name) for name in ("beta", "gamma")]), size)
    assert writer.slowest_s < STALL_S
    cluster.check_in_sync()


def test_resyncs_of_two_groups_do_not_starve_each_other(make_cluster: MakeCluster) -> None:
    """Each daemon by itself, on one host."""
    size = 64 * MIB
    clusters = [make_cluster(group=group, log_size=SMALL_LOG) for group in ("one", "two")]
    for cluster in clusters:
        cluster.create()
        _put(cluster.primary, os.urandom(size))
        cluster.secondary.start()
    for cluster in clusters:
        cluster.proxy.shape(rate=MIB / 2)
        cluster.primary.start()
    for cluster in clusters:
        cluster.primary.until("began", lambda one: one["state"] == "resyncing")
    for cluster in clusters:  # to a rate that is not the machine's: who else is at work there?
        cluster.proxy.shape(rate=16 * MIB)
    _fair(_when_one_is_through([(cluster.primary, "beta") for cluster in clusters]), size)
    for cluster in clusters:
        cluster.check_in_sync()


def _when_one_is_through(resyncs: list[tuple[Node, str]]) -> list[int]:
    """Bytes of the volume that each has, once one has all."""
    found: list[int] = []

    def one_is() -> bool:
        found.clear()
        for node, name in resyncs:
            (entry,) = (r for r in node.rpc("status")["remotes"] if r["name"] == name)
            found.append(node.cluster.volumes[0].size - entry["dirty"]["bytes"])
        return max(found) == resyncs[0][0].cluster.volumes[0].size

    wait_until("one is through", one_is, 60)
    return found
