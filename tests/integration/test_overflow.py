"""The log is full: block, or the DCM takes over; and the way back (M7, V1, V6, M10, M16, O12, O13).

The loads run through all of it: no error, no stall at the client (I8), and at the end both sides
are equal with writes that ran during the resync (I2).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.cluster import MIB, Cluster, Json
from tests.integration.process import wait_until
from tests.integration.test_replication import (
    RECORD_OVERHEAD,
    SESSION_OVERHEAD,
    STALL_S,
    MakeCluster,
)
from tests.integration.tools import Fio, Writer, connect, extents, pattern, requires

KIB = 1 << 10
REGION = 64 * KIB
SMALL_LOG = 4 * MIB
DIRTY = "nbdmirror:dirty:beta"


def tracking(entry: Json) -> bool:
    """The DCM has taken over from the log."""
    return bool(entry["state"] == "tracking" and entry["dirty"]["regions"] > 0)


def overflow(cluster: Cluster, *, regions: int = 256) -> None:
    """Writes one block to each of ``regions`` regions, often enough to overflow a small log."""
    handle = connect(cluster.primary.uri())
    for lap in range(1 + 2 * SMALL_LOG // (regions * 4096)):
        for region in range(regions):
            handle.pwrite(pattern(4096, lap * regions + region), region * REGION)
    handle.flush()
    handle.shutdown()


@requires("fio")
def test_overflow_and_back_under_load(
    make_cluster: MakeCluster, tmp_path: Path, frontend: str
) -> None:
    """A, peers 28: cut, overflow, heal, resync, all while fio verifies; then ``cmp`` is silent."""
    cluster = make_cluster(log_size=SMALL_LOG, frontend=frontend).start()
    load: dict[str, object] = {
        "rw": "randwrite",
        "bs": "4k",
        "iodepth": 16,
        "size": "48m",
        "rate": "12m",
        "verify": "crc32c",
        "verify_fatal": 1,
        "do_verify": 1,
    }
    with (
        Fio(cluster.primary.uri(), tmp_path, **load) as client,
        Writer(cluster.primary.uri(), offset=56 * MIB) as writer,
    ):
        wait_until("the load runs", lambda: cluster.primary.remote()["received_seq"] > 100)
        cluster.proxy.cut()
        cluster.primary.until("is tracked by the DCM", tracking, s=60)
        assert client.running
        cluster.proxy.heal()
        cluster.primary.until("left the DCM", lambda one: one["state"] == "synchronised", s=60)
        writes = writer.writes
        wait_until("writes go on", lambda: writer.writes > writes + 100)
        client.result()
    assert writer.slowest_s < STALL_S, "the client was stalled"
    cluster.check_in_sync()


def test_bytes_after_an_overflow_are_bounded(make_cluster: MakeCluster) -> None:
    """I4: at most the marked regions and the pending entries travel, by proxy and by status.

    Runbook: for so long that the log fills."""
    cluster = make_cluster(log_size=SMALL_LOG).start()
    cluster.proxy.refuse()
    overflow(cluster)
    entry = cluster.primary.until("is tracked", lambda one: one["state"] == "tracking")
    assert 1 <= entry["dirty"]["regions"] <= 256
    assert entry["dirty"]["bytes"] == entry["dirty"]["regions"] * REGION
    status = cluster.primary.status()
    pending = max(entry["lag"]["bytes"], status["log"]["used"])
    before = cluster.proxy.sent_bytes
    cluster.proxy.heal()
    cluster.check_in_sync()
    sent = cluster.proxy.sent_bytes - before
    marked = entry["dirty"]["bytes"]
    bound = marked + marked // 100 + pending + SESSION_OVERHEAD
    assert sent <= bound, f"{sent} bytes for {marked} marked and {pending} pending"
    entry = cluster.primary.remote()
    assert entry["dirty"] == {"regions": 0, "bytes": 0}
    assert entry["resync"] is None


def test_a_tracked_remote_costs_no_log(make_cluster: MakeCluster) -> None:
    """semantics 6: once the DCM has taken over, twenty logs full of writes go through freely."""
    cluster = make_cluster(log_size=SMALL_LOG).start()
    cluster.proxy.refuse()
    overflow(cluster)
    cluster.primary.until("is tracked", tracking)
    with Writer(cluster.primary.uri(), blocks=4096) as writer:
        handle = connect(cluster.primary.uri())
        for number in range(20):
            handle.pwrite(pattern(SMALL_LOG // 2, number), 32 * MIB)
    assert writer.slowest_s < STALL_S
    cluster.proxy.heal()
    cluster.check_in_sync()


def test_overflow_again_during_the_resync(make_cluster: MakeCluster) -> None:
    """X3: link lost in mid-resync, new overflow, again and again: it converges.

    The log holds two seconds of the writer: as fast as it can be it fills the log in a fifth of
    one, and where a disk stalls for so long no resync ends.
    """
    cluster = make_cluster(log_size=SMALL_LOG).start()
    with Writer(cluster.primary.uri(), blocks=8192, rate=SMALL_LOG / 2) as writer:
        for _ in range(4):
            cluster.proxy.refuse()
            overflow(cluster)
            cluster.primary.until("is tracked", tracking, s=60)
            cluster.proxy.heal()
            cluster.primary.until("resyncs", lambda one: one["link"] == "connected")
        cluster.primary.until("converged", lambda one: one["state"] == "synchronised", s=90)
    assert writer.slowest_s < STALL_S
    cluster.check_in_sync()


def test_progress_of_a_resync_is_monotone(make_cluster: MakeCluster) -> None:
    """X3, X4: ``done_bytes`` never falls within a pass and never passes ``total_bytes``."""
    cluster = make_cluster(log_size=SMALL_LOG).start()
    cluster.proxy.refuse()
    overflow(cluster, regions=512)
    cluster.primary.until("is tracked", tracking)
    cluster.proxy.heal()
    cluster.proxy.shape(rate=12 * MIB)
    seen: list[Json] = []

    def finished() -> bool:
        entry = cluster.primary.rpc("status")["remotes"][0]
        if entry["resync"] is not None:
            seen.append(entry["resync"])
        return bool(entry["state"] == "synchronised" and entry["resync"] is None)

    wait_until("the resync is finished", finished, 60)
    assert seen, "the resync was never seen"
    done = [(one["pass"], one["done_bytes"]) for one in seen]
    assert done == sorted(done)
    for one in seen:
        assert one["kind"] == "dcm"
        assert 0 <= one["done_bytes"] <= one["total_bytes"]
        assert set(one) >= {"sent_bytes", "skipped_bytes", "rate", "eta_s"}
    cluster.proxy.heal()
    cluster.check_in_sync()


def test_the_client_never_reads_a_marked_region_wrong(make_cluster: MakeCluster) -> None:
    """I5, I8: reads on the primary are right at every moment of overflow and resync."""
    cluster = make_cluster(log_size=SMALL_LOG).start()
    cluster.proxy.refuse()
    overflow(cluster)
    handle = connect(cluster.primary.uri())
    last = 2 * SMALL_LOG // (256 * 4096) * 256
    for region in range(256):
        assert handle.pread(4096, region * REGION) == pattern(4096, last + region)
    cluster.proxy.heal()
    cluster.wait_in_sync()
    for region in range(256):
        assert handle.pread(4096, region * REGION) == pattern(4096, last + region)


def test_dirty_context_is_what_the_remote_lacks(make_cluster: MakeCluster, frontend: str) -> None:
    """A2: a backup tool reads over NBD which regions a remote lacks, from log and DCM."""
    if frontend != "native":
        pytest.skip("nbdkit's plugins cannot offer contexts of their own")
    cluster = make_cluster(log_size=SMALL_LOG).start()
    size = cluster.volumes[0].size
    handle = connect(cluster.primary.uri(), contexts=[DIRTY])
    assert extents(handle, DIRTY, size) == [(size, 0)]
    cluster.proxy.refuse()
    handle.pwrite(pattern(4096, 1), 32 * MIB)
    cluster.primary.until("lost its link", lambda one: one["link"] != "connected")
    assert _covered(extents(handle, DIRTY, size), 32 * MIB, 4096), "a pending entry"
    overflow(cluster)
    cluster.primary.until("is tracked", tracking)
    found = extents(handle, DIRTY, size)
    assert all(_covered(found, region * REGION, 4096) for region in range(256))
    assert _covered(found, 32 * MIB, 4096)
    assert sum(length for length, flags in found if flags & 1) <= 257 * REGION
    cluster.proxy.heal()
    cluster.check_in_sync()
    assert extents(handle, DIRTY, size) == [(size, 0)]


def _covered(found: list[tuple[int, int]], offset: int, length: int) -> bool:
    """Whether all of the range is flagged dirty."""
    position = 0
    for size, flags in found:
        overlaps = position < offset + length and offset < position + size
        if overlaps and not flags & 1:
            return False
        position += size
    return True


def test_on_full_block_waits_and_goes_on(make_cluster: MakeCluster) -> None:
    """M7: ``block``: writes wait until the log has room, without an error, and then go on.

    Runbook: for so long that the log fills."""
    cluster = make_cluster(log_size=SMALL_LOG, on_full="block").start()
    cluster.proxy.refuse()
    with Writer(cluster.primary.uri(), blocks=4096) as writer:
        wait_until("the log is full", _stalled(writer), 60)
        entry = cluster.primary.remote()
        assert entry["state"] == "behind", "block never forces a remote out"
        assert entry["dirty"]["regions"] == 0
        log = cluster.primary.status()["log"]
        assert log["used"] > log["size"] // 2
        kinds = [one["kind"] for one in cluster.primary.events()]
        assert any("stall" in kind or "full" in kind for kind in kinds), kinds
        blocked = writer.writes
        cluster.proxy.heal()
        wait_until("writes go on", lambda: writer.writes > blocked + 1000)
    cluster.check_in_sync()


def _stalled(writer: Writer) -> Callable[[], bool]:
    """A probe: no write has ended for 50 polls in a row."""
    seen: list[int] = []

    def probe() -> bool:
        seen.append(writer.writes)
        return len(seen) > 50 and seen[-50] == seen[-1] > 0

    return probe


def test_resync_full(make_cluster: MakeCluster) -> None:
    """A6: ``resync --full --wait``: every region is looked at; the stream goes on meanwhile."""
    cluster = make_cluster().start()
    connect(cluster.primary.uri()).pwrite(pattern(8 * MIB, 1), 0)
    cluster.wait_in_sync()
    with Writer(cluster.primary.uri(), offset=16 * MIB) as writer:
        cluster.primary.ok("resync", "beta", "--full", "--wait")
    assert writer.slowest_s < STALL_S
    cluster.check_in_sync()


def test_resync_full_repairs_a_damaged_facet(make_cluster: MakeCluster) -> None:
    """I2: bytes changed behind the secondary's back are found and put right by a full resync."""
    cluster = make_cluster().start()
    connect(cluster.primary.uri()).pwrite(pattern(8 * MIB, 1), 0)
    cluster.check_in_sync()
    cluster.secondary.stop()
    with cluster.secondary.facets("data")[0].open("r+b") as file:
        file.seek(3 * MIB + 5)
        file.write(b"damage")
    cluster.secondary.start()
    cluster.wait_in_sync()
    cluster.primary.ok("resync", "beta", "--full", "--wait")
    cluster.check_in_sync()


def test_full_resync_does_not_send_what_is_equal(make_cluster: MakeCluster) -> None:
    """X1: hashes prove that nothing differs: a full resync of equal facets is cheap."""
    cluster = make_cluster().start()
    connect(cluster.primary.uri()).pwrite(pattern(48 * MIB, 1), 0)
    cluster.check_in_sync()
    before = cluster.proxy.sent_bytes
    cluster.primary.ok("resync", "beta", "--full", "--wait")
    sent = cluster.proxy.sent_bytes - before
    assert sent < 2 * MIB, f"{sent} bytes for facets that are equal"


def test_pause_and_resume(make_cluster: MakeCluster) -> None:
    """A6, peers 19: a person stops a remote and starts it again; only changes meanwhile travel."""
    cluster = make_cluster().start()
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(16 * MIB, 1), 0)
    cluster.wait_in_sync()
    cluster.primary.ok("pause", "beta")
    entry = cluster.primary.until("is paused", lambda one: one["state"] == "paused")
    assert "resume" in entry["next_action"]
    before = cluster.proxy.sent_bytes
    for number in range(100):
        handle.pwrite(pattern(4096, number), number * REGION)
    handle.flush()
    assert cluster.proxy.sent_bytes - before < SESSION_OVERHEAD, "sent while paused"
    cluster.primary.ok("resume", "beta")
    cluster.check_in_sync()
    bound = 100 * (REGION + RECORD_OVERHEAD) + SESSION_OVERHEAD
    assert cluster.proxy.sent_bytes - before <= bound


def test_pause_survives_a_restart(make_cluster: MakeCluster) -> None:
    """semantics 7: a pause is durable; it ends only when a person says so."""
    cluster = make_cluster().start()
    cluster.primary.ok("pause", "beta")
    cluster.primary.restart()
    connect(cluster.primary.uri()).pwrite(pattern(MIB, 1), 0)
    assert cluster.primary.remote()["state"] == "paused"
    assert cluster.primary.cli("wait", "--until", "in-sync", "--timeout", "1").code == 3
    cluster.primary.ok("resume", "beta")
    cluster.check_in_sync()
