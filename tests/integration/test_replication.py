"""The stream to the secondary: everything arrives, in order, and after an outage only what lacks.

Rows M2, M3, M9, V2, V3, V4, V7, V13 (TRIM as such), X6; invariants I2, I4, I8; network faults
31-35: cut, one-way cut, reset, delay, flipped bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.cluster import MIB, Cluster, Json, Volume
from tests.integration.tools import Writer, connect, fio, pattern, requires

KIB = 1 << 10
MakeCluster = Callable[..., Cluster]
STALL_S = 5.0
"""No write of a client may take longer because of a remote; generous, for loaded machines."""
RECORD_OVERHEAD = 256
"""Bytes on the wire that a record may cost besides its data."""
SESSION_OVERHEAD = 256 * KIB
"""Bytes that reconnecting, heartbeats and acknowledgements may cost."""


def behind(entry: Json) -> bool:
    """The link is lost, and what is pending is in the log."""
    return bool(entry["link"] != "connected" and entry["state"] == "behind")


def test_written_data_arrives(make_cluster: MakeCluster, frontend: str) -> None:
    """M2, V3: writes of every kind are on both sides; the facets are equal bit for bit."""
    cluster = make_cluster(frontend=frontend).start()
    handle = connect(cluster.primary.uri())
    for number in range(300):
        handle.pwrite(pattern(1 + number * 37, number), number * 100_003)
    handle.trim(2 * MIB, 5 * MIB)
    handle.zero(MIB + 1, 9 * MIB + 7)
    handle.pwrite(pattern(8 * MIB, 5), 40 * MIB)
    handle.flush()
    cluster.check_in_sync()
    secondary = cluster.secondary.facets("data")[0]
    with secondary.open("rb") as file:
        file.seek(40 * MIB)
        assert file.read(8 * MIB) == pattern(8 * MIB, 5)


def test_an_acknowledgement_never_waits_for_the_remote(make_cluster: MakeCluster) -> None:
    """M2, I8, peers 29: with half a second of delay each way, writes are as fast as without."""
    cluster = make_cluster().start()
    cluster.proxy.shape(delay_s=0.5)
    handle = connect(cluster.primary.uri())
    with Writer(cluster.primary.uri()) as writer:
        for number in range(50):
            handle.pwrite(pattern(4096, number), 32 * MIB + number * 4096)
        handle.flush()
    assert writer.slowest_s < 0.4, "a write waited for the link"
    cluster.proxy.heal()
    cluster.check_in_sync()


def test_status_shows_lag_and_its_end(make_cluster: MakeCluster) -> None:
    """X4, M3: records, bytes and seconds of lag while the link is cut; all 0 when in sync.

    Runbook: link to the secondary lost."""
    cluster = make_cluster().start()
    cluster.proxy.refuse()
    handle = connect(cluster.primary.uri())
    for number in range(100):
        handle.pwrite(pattern(4096, number), number * 8192)
    entry = cluster.primary.until("is behind", lambda one: one["state"] == "behind")
    assert entry["lag"]["records"] == 100
    assert 100 * 4096 <= entry["lag"]["bytes"] < 100 * 4096 + 100 * RECORD_OVERHEAD
    assert entry["lag"]["seconds"] > 0
    assert entry["next_action"], "says what a person can do"
    cluster.proxy.heal()
    cluster.check_in_sync()
    entry = cluster.primary.remote()
    assert entry["state"] == "synchronised"
    assert entry["link"] == "connected"
    assert entry["lag"] == {"records": 0, "bytes": 0, "seconds": 0.0}
    assert entry["durable_seq"] == cluster.primary.status()["log"]["next_seq"] - 1


@pytest.mark.parametrize("fault", ["cut", "refuse", "stall up", "stall down"])
def test_catches_up_from_the_log(make_cluster: MakeCluster, fault: str) -> None:
    """V7, M9, I4: after an outage of any kind the pending entries are sent, and nothing else.

    Runbook: link to the secondary lost."""
    cluster = make_cluster().start()
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(16 * MIB, 1), 0)
    cluster.check_in_sync()
    name, _, direction = fault.partition(" ")
    if direction:
        cluster.proxy.stall(direction)
    else:
        getattr(cluster.proxy, name)()
    for number in range(500):
        handle.pwrite(pattern(4096, number), number * 65536)
    handle.flush()
    entry = cluster.primary.until("lost its link", lambda one: one["link"] != "connected", s=60)
    assert entry["lag"]["records"] == 500
    before = cluster.proxy.sent_bytes
    cluster.proxy.heal()
    cluster.check_in_sync()
    # What was on its way when a silent cut came may arrive and be sent again: at most twice.
    bound = 2 * (entry["lag"]["bytes"] + 500 * RECORD_OVERHEAD) + SESSION_OVERHEAD
    sent = cluster.proxy.sent_bytes - before
    assert sent <= bound, f"{sent} bytes sent for {entry['lag']['bytes']} pending"


def test_resets_under_load(make_cluster: MakeCluster) -> None:
    """V7, O8, I2: twenty resets while writing; reconnects by itself, nothing lost or doubled."""
    cluster = make_cluster().start()
    with Writer(cluster.primary.uri(), blocks=4096) as writer:
        for _ in range(20):
            cluster.proxy.reset()
            cluster.primary.until("is back", lambda one: one["link"] == "connected")
    assert writer.writes > 100
    assert writer.slowest_s < STALL_S
    cluster.check_in_sync()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_flipped_bytes_are_noticed(make_cluster: MakeCluster, direction: str) -> None:
    """X6, I5: a wrong byte on the wire never reaches a facet; the link recovers by itself."""
    cluster = make_cluster().start()
    handle = connect(cluster.primary.uri())
    for number in range(8):
        distance = 8 if direction == "down" else number * 3001
        cluster.proxy.flip(distance, direction)
        handle.pwrite(pattern(64 * KIB, number), number * 64 * KIB)
        handle.flush()
        cluster.check_in_sync()


def test_narrow_link(make_cluster: MakeCluster) -> None:
    """I6, I8: 2 MiB/s for 16 MiB of writes: the client does not notice, the log carries it."""
    cluster = make_cluster().start()
    cluster.proxy.shape(rate=2 * MIB)
    with Writer(cluster.primary.uri()) as writer:
        handle = connect(cluster.primary.uri())
        for number in range(16):
            handle.pwrite(pattern(MIB, number), (32 + number) * MIB)
        lag = cluster.primary.remote()["lag"]
        assert lag["bytes"] > 4 * MIB, "the link is not narrow"
    assert writer.slowest_s < STALL_S
    cluster.proxy.heal()
    cluster.check_in_sync()


def test_trim_and_zero_give_space_back_on_both_sides(make_cluster: MakeCluster) -> None:
    """A4, O22: TRIM and WRITE_ZEROES are replicated as such, not as data."""
    cluster = make_cluster().start()
    paths = [node.facets("data")[0] for node in cluster.nodes]
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(32 * MIB, 1), 0)
    handle.flush()
    cluster.check_in_sync()
    full = [_blocks(path) for path in paths]
    before = cluster.proxy.sent_bytes
    handle.trim(8 * MIB, 4 * MIB)
    handle.zero(8 * MIB, 16 * MIB)
    handle.flush()
    cluster.check_in_sync()
    assert cluster.proxy.sent_bytes - before < SESSION_OVERHEAD, "zeros travelled as data"
    for path, blocks in zip(paths, full, strict=True):
        assert _blocks(path) <= blocks - 15 * MIB, f"{path} gave nothing back"


def _blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_one_order_for_all_volumes(make_cluster: MakeCluster) -> None:
    """V4, M3: three volumes share one log: a seq for each write, whatever the volume."""
    names = ("a", "b", "c")
    cluster = make_cluster(volumes=[Volume(name, 16 * MIB) for name in names]).start()
    first = cluster.primary.status()["log"]["next_seq"]
    handles = [connect(cluster.primary.uri(name)) for name in names]
    for number in range(90):
        handles[number % 3].pwrite(pattern(4096, number), number * 4096)
    status = cluster.primary.status()
    assert status["log"]["next_seq"] == first + 90
    cluster.check_in_sync()


@requires("fio")
@pytest.mark.parametrize("region_kib", [4, 64, 16384])
def test_region_sizes(make_cluster: MakeCluster, tmp_path: Path, region_kib: int) -> None:
    """V1: regions of 4 KiB to 16 MiB."""
    cluster = make_cluster(volumes=[Volume(size=48 * MIB, region_size=region_kib * KIB)]).start()
    fio(
        cluster.primary.uri(),
        tmp_path,
        rw="randwrite",
        bs="4k",
        iodepth=16,
        size="16m",
        verify="crc32c",
        verify_fatal=1,
    )
    cluster.check_in_sync()


def test_log_entries_are_freed(make_cluster: MakeCluster) -> None:
    """M3, V2: entries leave when the remote has them; ten laps around a small log."""
    cluster = make_cluster(log_size=4 * MIB).start()
    handle = connect(cluster.primary.uri())
    for lap in range(20):
        for number in range(32):
            handle.pwrite(pattern(64 * KIB, lap), number * 64 * KIB)
        cluster.wait_in_sync()
    status = cluster.primary.status()
    assert status["log"]["used"] < status["log"]["size"]
    assert status["remotes"][0]["state"] == "synchronised"
    cluster.compare()
