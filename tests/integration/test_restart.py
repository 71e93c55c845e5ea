"""Daemons that end, die and freeze, under load (V7, M9, M15; semantics 4 and 5; I2, I4, I8)."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import threading
from pathlib import Path

import pytest

from tests.integration.cluster import MIB, Cluster, Json, Volume, nbdmirror
from tests.integration.test_replication import SESSION_OVERHEAD, STALL_S, MakeCluster
from tests.integration.tools import Fio, Writer, connect, nbd_error, pattern, requires

KIB = 1 << 10


@requires("fio")
def test_secondary_dies_and_returns_under_load(
    make_cluster: MakeCluster, tmp_path: Path, frontend: str
) -> None:
    """M15, O9: SIGKILL of the secondary, five times, while fio verifies; it catches up itself.

    Runbook: secondary dies and comes back."""
    cluster = make_cluster(frontend=frontend).start()
    load: dict[str, object] = {
        "rw": "randwrite",
        "bs": "4k",
        "iodepth": 8,
        "size": "32m",
        "rate": "8m",
        "verify": "crc32c",
        "verify_fatal": 1,
    }
    with (
        Fio(cluster.primary.uri(), tmp_path, **load) as client,
        Writer(cluster.primary.uri(), offset=40 * MIB) as writer,
    ):
        for _ in range(5):
            _wait_received(cluster, 50)
            cluster.secondary.kill()
            cluster.primary.until("lost its link", lambda one: one["link"] != "connected")
            cluster.secondary.start()
        client.result()
    assert writer.slowest_s < STALL_S
    cluster.check_in_sync()


def _wait_received(cluster: Cluster, records: int) -> None:
    """Returns when the secondary has so many more records than now."""
    since = cluster.primary.remote()["received_seq"]
    cluster.primary.until("receives", lambda one: one["received_seq"] >= since + records)


def test_secondary_stops_and_starts(make_cluster: MakeCluster) -> None:
    """semantics 5: a clean stop and start: it goes on at its durable seq, nothing is resent."""
    cluster = make_cluster().start()
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(16 * MIB, 1), 0)
    cluster.check_in_sync()
    before = cluster.proxy.sent_bytes
    cluster.secondary.restart()
    cluster.check_in_sync()
    assert cluster.proxy.sent_bytes - before < SESSION_OVERHEAD


def test_frozen_secondary_costs_the_client_nothing(make_cluster: MakeCluster) -> None:
    """I8, I6: SIGSTOP: connections stay open and nothing moves; the client does not notice."""
    cluster = make_cluster(log_size=8 * MIB).start()
    cluster.secondary.freeze()
    with Writer(cluster.primary.uri(), blocks=4096) as writer:
        handle = connect(cluster.primary.uri())
        for number in range(32):
            handle.pwrite(pattern(MIB, number), 24 * MIB + number % 16 * MIB)
            handle.flush()
        cluster.primary.until("is tracked", lambda one: one["state"] == "tracking", s=60)
    assert writer.slowest_s < STALL_S, "the client waited for the secondary"
    cluster.secondary.thaw()
    cluster.check_in_sync()


def test_primary_stops_and_starts(make_cluster: MakeCluster, frontend: str) -> None:
    """semantics 4: a clean stop: nothing to do at the start, nothing to resend, data as it was."""
    cluster = make_cluster(frontend=frontend).start()
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(16 * MIB, 1), 0)
    handle.flush()
    cluster.wait_in_sync()
    before = cluster.proxy.sent_bytes
    cluster.primary.restart()
    assert connect(cluster.primary.uri()).pread(16 * MIB, 0) == pattern(16 * MIB, 1)
    cluster.check_in_sync()
    assert cluster.proxy.sent_bytes - before < SESSION_OVERHEAD
    assert not _resyncs(cluster)


def test_told_to_stop_again_and_again(make_cluster: MakeCluster, frontend: str) -> None:
    """A stop that is under way stays a clean one, to the very end of every process, however often
    each of them is told."""
    node = make_cluster(frontend=frontend, remotes=()).start(synced=False).primary
    pid = node.daemon.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert (children != []) == (frontend == "nbdkit")
    while node.daemon.alive:
        for one in (pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGTERM)
    assert node.daemon.popen.returncode == 0, node.daemon.output()
    node.kill()  # gives back what the harness holds for it
    dump = nbdmirror("dump", "superblock", str(node.config), "--json")
    assert dump.json["clean"] is True


def test_primary_stops_with_entries_pending(make_cluster: MakeCluster) -> None:
    """V7: what was pending at a clean stop is sent after the start, from the log, no resync."""
    cluster = make_cluster().start()
    cluster.proxy.refuse()
    handle = connect(cluster.primary.uri())
    for number in range(200):
        handle.pwrite(pattern(4096, number), number * 64 * KIB)
    cluster.primary.restart()
    assert cluster.primary.remote()["lag"]["records"] == 200
    before = cluster.proxy.sent_bytes
    cluster.proxy.heal()
    cluster.check_in_sync()
    assert cluster.proxy.sent_bytes - before < 200 * 4096 + 200 * 256 + SESSION_OVERHEAD
    assert not _resyncs(cluster)


def test_primary_dies_idle(make_cluster: MakeCluster, frontend: str) -> None:
    """semantics 4: SIGKILL, same boot: the log holds at least what the facets hold; no resync."""
    cluster = make_cluster(frontend=frontend).start()
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(16 * MIB, 1), 0)
    cluster.wait_in_sync()
    before = cluster.proxy.sent_bytes
    cluster.primary.kill()
    cluster.primary.start()
    assert connect(cluster.primary.uri()).pread(16 * MIB, 0) == pattern(16 * MIB, 1)
    cluster.check_in_sync()
    assert cluster.proxy.sent_bytes - before < SESSION_OVERHEAD
    assert not _resyncs(cluster)


def test_primary_dies_under_load(make_cluster: MakeCluster) -> None:
    """I3, I4, peers 18: five SIGKILLs under load: every acknowledged write is there, at most the
    pending entries are sent again, no resync. Runbook: primary's daemon dies (same boot)."""
    cluster = make_cluster().start()
    for turn in range(5):
        acknowledged = _write_until_killed(cluster, turn)
        cluster.primary.start()
        handle = connect(cluster.primary.uri())
        for block, data in acknowledged.items():
            assert handle.pread(4096, block * 4096) == data, f"block {block} lost"
        handle.shutdown()
        cluster.check_in_sync()
    assert not _resyncs(cluster)


def test_what_the_secondary_had_is_not_sent_again(make_cluster: MakeCluster) -> None:
    """I4: SIGKILL with a log of which one remote has half and another nothing: the one is sent what
    it lacks, and nothing else. (With a full log of 1 GiB: ``tests.bench.recovery``.)"""
    remotes = ("beta", "gamma")
    cluster = make_cluster(remotes=remotes, remote_keys={"compression": "off"}).start()
    proxies, node = cluster.proxies, cluster.primary
    proxies["gamma"].refuse()
    node.until("is lost", lambda one: one["link"] != "connected", remote="gamma")
    handle = connect(node.uri())
    handle.pwrite(pattern(16 * MIB, 1), 0)
    node.rpc("wait", until="in-sync", remote="beta", timeout=30.0)
    proxies["beta"].refuse()
    node.until("is lost", lambda one: one["link"] != "connected")
    for at in range(0, 16 * MIB, MIB):
        handle.pwrite(pattern(MIB, at + 2), 8 * MIB + at)
    pending = node.remote()["lag"]["bytes"]
    assert node.status()["log"]["used"] >= 32 * MIB, "the log has let go of what beta has"
    node.kill()
    before = proxies["beta"].sent_bytes
    node.start()
    proxies["beta"].heal()
    node.rpc("wait", until="in-sync", remote="beta", timeout=30.0)
    sent = proxies["beta"].sent_bytes - before
    assert 16 * MIB <= pending <= sent <= pending + pending // 100 + SESSION_OVERHEAD
    proxies["gamma"].heal()
    cluster.check_in_sync()
    assert not _resyncs(cluster)


def _write_until_killed(cluster: Cluster, seed: int) -> dict[int, bytes]:
    """Writes blocks while the primary is killed; what was acknowledged, without the last block
    that was asked for: it may be old or new."""
    handle = connect(cluster.primary.uri())
    acknowledged: dict[int, bytes] = {}
    enough = threading.Event()

    def kill() -> None:
        enough.wait(60)
        cluster.primary.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(nbd_error()):
        for number in range(1_000_000):
            block = (number * 7919 + seed) % 8192
            acknowledged.pop(block, None)
            data = pattern(4096, seed * 1_000_000 + number)
            handle.pwrite(data, block * 4096)
            acknowledged[block] = data
            if number == 500 + seed * 100:
                enough.set()
    killer.join()
    return acknowledged


def test_secondary_that_lost_its_primary_is_a_prefix(make_cluster: MakeCluster) -> None:
    """I1, V4, V7: both die under load; the secondary alone, over three volumes together, is the
    group after some seq: the last write that it has, and all before, and none behind."""
    names, blocks = ("a", "b", "c"), 64
    cluster = make_cluster(volumes=[Volume(name, 8 * MIB) for name in names]).start()
    handles = [connect(cluster.primary.uri(name)) for name in names]
    for stamp in range(1, 3000):
        block = (stamp * 7) % blocks
        handles[stamp % 3].pwrite(struct.pack("<Q", stamp) * 512, block * 4096)
    cluster.secondary.kill()
    cluster.primary.kill()
    cluster.secondary.start()
    cluster.secondary.stop()
    found = {}
    for number, name in enumerate(names):
        content = cluster.secondary.facets(name)[0].read_bytes()
        for block in range(blocks):
            page = content[block * 4096 : (block + 1) * 4096]
            (found[number, block],) = {stamp for (stamp,) in struct.iter_unpack("<Q", page)}
    last = max(found.values())
    expected = dict.fromkeys(found, 0)
    for stamp in range(1, last + 1):
        expected[stamp % 3, (stamp * 7) % blocks] = stamp
    assert last > 0, "nothing arrived"
    assert found == expected


def test_primary_dies_while_tracking(make_cluster: MakeCluster) -> None:
    """O12: the DCM is durable: SIGKILL with a remote in DCM logging, only marked regions travel."""
    cluster = make_cluster(log_size=4 * MIB).start()
    cluster.proxy.refuse()
    handle = connect(cluster.primary.uri())
    for lap in range(20):
        for region in range(64):
            handle.pwrite(pattern(4096, lap * 64 + region), region * 64 * KIB)
    entry = cluster.primary.until("is tracked", lambda one: one["state"] == "tracking")
    cluster.primary.kill()
    cluster.primary.start()
    again = cluster.primary.remote()
    assert again["dirty"]["regions"] >= entry["dirty"]["regions"], "marks were lost"
    pending = cluster.primary.status()["log"]["used"]
    before = cluster.proxy.sent_bytes
    cluster.proxy.heal()
    cluster.check_in_sync()
    sent = cluster.proxy.sent_bytes - before
    assert sent <= again["dirty"]["bytes"] + pending + SESSION_OVERHEAD


def test_both_die_in_the_middle_of_a_resync(make_cluster: MakeCluster) -> None:
    """M10: a resync that was interrupted on both sides continues and ends."""
    cluster = make_cluster(log_size=4 * MIB).start()
    handle = connect(cluster.primary.uri())
    cluster.proxy.refuse()
    for number in range(24):
        handle.pwrite(pattern(MIB, number), number * MIB)
    cluster.primary.until("is tracked", lambda one: one["state"] == "tracking")
    cluster.proxy.heal()
    cluster.proxy.shape(rate=4 * MIB)
    cluster.primary.until(
        "is half done", lambda one: one["resync"] and one["resync"]["done_bytes"] > 2 * MIB
    )
    cluster.primary.kill()
    cluster.secondary.kill()
    cluster.secondary.start()
    cluster.primary.start()
    cluster.proxy.heal()
    cluster.check_in_sync()
    assert connect(cluster.primary.uri()).pread(MIB, 23 * MIB) == pattern(MIB, 23)


def test_start_without_the_secondary(make_cluster: MakeCluster) -> None:
    """A, I8: the primary serves though no remote is there; later all goes by itself."""
    cluster = make_cluster()
    cluster.create()
    cluster.primary.start()
    handle = connect(cluster.primary.uri())
    handle.pwrite(pattern(MIB, 1), 0)
    assert handle.pread(MIB, 0) == pattern(MIB, 1)
    cluster.secondary.start()
    cluster.check_in_sync()


def test_start_does_not_depend_on_size(make_cluster: MakeCluster) -> None:
    """I7, A4: a volume of 8 TiB is created and started like any other (sparse facets)."""

    huge = Volume(size=8 << 40, region_size=16 * MIB)
    cluster = make_cluster(volumes=[huge])
    cluster.create()
    cluster.primary.start()
    handle = connect(cluster.primary.uri())
    handle.pwrite(b"far out", huge.size - 4096)
    assert handle.pread(7, huge.size - 4096) == b"far out"


def test_daemon_says_why_it_cannot_start(make_cluster: MakeCluster) -> None:
    """I9: no state: exit code and message say what to do."""

    cluster = make_cluster()
    result = nbdmirror("serve", str(cluster.primary.config), timeout=30)
    assert result.code == 1
    assert "create" in result.err, result


def test_second_daemon_on_the_same_state_is_refused(make_cluster: MakeCluster) -> None:
    """I9: two daemons never share a state directory."""

    cluster = make_cluster().start()
    result = nbdmirror("serve", str(cluster.primary.config), timeout=30)
    assert result.code == 1, result
    assert cluster.primary.alive
    connect(cluster.primary.uri()).pwrite(pattern(4096, 1), 0)
    cluster.check_in_sync()


def _resyncs(cluster: Cluster) -> list[Json]:
    """Events of this run of the primary that tell of more than going on in the log."""
    return [
        event
        for event in cluster.primary.events()
        if event["kind"] == "synchronised"
        or (event["kind"] == "handshake" and event["action"] != "continue")
    ]
