"""Nodes that do not fit refuse each other, say why with both values, harm nothing (A5, I9)."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

import pytest

from nbdmirror.codec import repl
from tests.integration.cluster import MIB, Cluster, Json, Volume
from tests.integration.process import wait_until
from tests.integration.test_replication import MakeCluster
from tests.integration.tools import connect, pattern


def _join(primary: Cluster, stranger: Cluster) -> None:
    """Makes the secondary of ``stranger`` the remote that ``primary`` dials."""
    port = stranger.secondary.replication_port
    primary.proxies.pop("beta").close()
    primary.secondary.replication_port = port
    primary.primary.write_config()


def _refusal(make_cluster: MakeCluster, ours: Json, theirs: Json) -> tuple[Cluster, str]:
    """The refusal that a primary sees at the secondary of another cluster."""
    primary, stranger = make_cluster(**ours), make_cluster(**theirs)
    _join(primary, stranger)
    assert primary.primary.create().code == 0
    assert stranger.secondary.create().code == 0
    stranger.secondary.start()
    primary.primary.start()
    entry = primary.primary.until("is refused", lambda one: one["state"] == "refused")
    assert entry["why"], "the refusal has no reason"
    assert entry["next_action"], "the refusal does not say what to do"
    handle = connect(primary.primary.uri(primary.volumes[0].name))
    handle.pwrite(pattern(MIB, 1), 0)
    assert handle.pread(MIB, 0) == pattern(MIB, 1), "a refused remote costs the client nothing"
    facet = stranger.secondary.facets(stranger.volumes[0].name)[0]
    assert facet.stat().st_blocks == 0, "a refused primary wrote to the facet"
    result = primary.primary.cli("wait", "--until", "in-sync", "--timeout", "1")
    assert result.code == 3, result
    return primary, str(entry["why"])


def test_other_size(make_cluster: MakeCluster) -> None:
    """Volume sizes differ: both are in the message."""
    _, why = _refusal(
        make_cluster,
        {"volumes": [Volume(size=64 * MIB)]},
        {"volumes": [Volume(size=32 * MIB)]},
    )
    assert str(64 * MIB) in why and str(32 * MIB) in why, why


def test_other_group(make_cluster: MakeCluster) -> None:
    """Group names differ: both are in the message."""
    _, why = _refusal(make_cluster, {"group": "payroll"}, {"group": "archive"})
    assert "payroll" in why and "archive" in why, why


def test_other_volumes(make_cluster: MakeCluster) -> None:
    """Volumes differ in name or number: the odd ones are in the message."""
    _, why = _refusal(
        make_cluster,
        {"volumes": [Volume("accounts", 8 * MIB), Volume("letters", 8 * MIB)]},
        {"volumes": [Volume("accounts", 8 * MIB)]},
    )
    assert "letters" in why, why


def test_other_region_size_is_no_obstacle_or_is_told(make_cluster: MakeCluster) -> None:
    """Region sizes differ: replicates all the same, or refuses with both values."""
    primary = make_cluster(volumes=[Volume(region_size=65536)])
    stranger = make_cluster(volumes=[Volume(region_size=131072)])
    _join(primary, stranger)
    assert primary.primary.create().code == 0
    assert stranger.secondary.create().code == 0
    stranger.secondary.start()
    primary.primary.start()
    entry = primary.primary.until("decided", lambda one: one["state"] != "uninitialised")
    if entry["state"] == "refused":
        assert "65536" in entry["why"] and "131072" in entry["why"], entry
    else:
        primary.primary.ok("wait", "--until", "in-sync", "--timeout", "30")


def test_two_primaries(make_cluster: MakeCluster) -> None:
    """I5: a primary does not take replication."""
    first, second = make_cluster(), make_cluster(remotes=())
    port = second.primary.replication_port
    first.proxies.pop("beta").close()
    first.secondary.replication_port = port
    first.primary.write_config()
    for node in (second.primary, first.primary):
        assert node.create().code == 0
        node.start()
    connect(second.primary.uri()).pwrite(pattern(MIB, 2), 0)
    assert first.primary.cli("wait", "--until", "connected", "--timeout", "3").code == 3
    entry = first.primary.remote()
    assert entry["state"] != "refused" or "primary" in entry["why"], entry
    assert connect(second.primary.uri()).pread(MIB, 0) == pattern(MIB, 2)


def test_a_second_primary_cannot_take_over_a_remote(make_cluster: MakeCluster) -> None:
    """I5: a secondary that follows one primary refuses another that was created apart."""
    ours = make_cluster(proxied=False).start()
    connect(ours.primary.uri()).pwrite(pattern(MIB, 1), 0)
    ours.check_in_sync()
    thief = make_cluster(proxied=False)
    thief.secondary.replication_port = ours.secondary.replication_port
    thief.primary.write_config()
    assert thief.primary.create().code == 0
    thief.primary.start()
    thief.primary.until("is refused", lambda one: one["state"] in ("refused", "diverged"))
    connect(ours.primary.uri()).pwrite(pattern(MIB, 3), 2 * MIB)
    ours.check_in_sync()


def test_corrected_refusal_heals_by_itself(make_cluster: MakeCluster) -> None:
    """A5: once the configuration fits, the link comes up without a command."""
    primary, stranger = make_cluster(), make_cluster(volumes=[Volume(size=32 * MIB)])
    _join(primary, stranger)
    assert primary.primary.create().code == 0
    assert stranger.secondary.create().code == 0
    stranger.secondary.start()
    primary.primary.start()
    primary.primary.until("is refused", lambda one: one["state"] == "refused")
    stranger.secondary.stop()
    stranger.volumes = primary.volumes
    stranger.secondary.write_config()
    result = stranger.secondary.create("--force")
    assert result.code == 0, result
    stranger.secondary.start()
    primary.primary.ok("wait", "--until", "in-sync", "--timeout", "60", timeout=90)


# -- raw frames at the secondary's port --------------------------------------------------------


def _frame(kind: repl.Type, content: Json) -> bytes:
    return b"".join(repl.encode_json(kind, 1, content))


def _dial(cluster: Cluster) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", cluster.secondary.replication_port), 10)
    sock.settimeout(20)
    return sock


def _until_end(sock: socket.socket) -> bytes:
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            received += data
    return bytes(received)


def test_unknown_version(make_cluster: MakeCluster) -> None:
    """A5: a peer of another version is refused; both ranges are in the message."""
    cluster = make_cluster().start()
    low, high = repl.PROTOCOL_VERSIONS
    with _dial(cluster) as sock:
        sock.sendall(_frame(repl.Type.HELLO, {"versions": [high + 40, high + 41], "group": "db"}))
        answer = _until_end(sock)
    assert str(high + 40).encode() in answer, answer
    assert str(low).encode() in answer, answer
    cluster.check_in_sync()


@pytest.mark.parametrize("seed", range(5))
def test_garbage_at_the_replication_port(make_cluster: MakeCluster, seed: int) -> None:
    """I9: noise, lies about lengths, silence: hung up on, and the true primary goes on."""
    cluster = make_cluster().start()
    noise = random.Random(seed)
    hello = _frame(repl.Type.HELLO, {"versions": [1, 1], "group": "db"})
    position = noise.randrange(len(hello))
    samples = [
        noise.randbytes(100_000),
        hello[:position]
        + bytes([hello[position] ^ 1 << noise.randrange(8)])
        + hello[position + 1 :],
        hello[:8] + b"\xff\xff\xff\xff" + hello[12:],
        _frame(repl.Type.HELLO, {"versions": "many", "group": ["db"]}),
        _frame(repl.Type.START, {"action": "reset", "seq": 0}),
        hello + noise.randbytes(5000),
    ]
    for sample in samples:
        with _dial(cluster) as sock, contextlib.suppress(OSError):
            sock.sendall(sample)
            sock.shutdown(socket.SHUT_WR)
            _until_end(sock)
    connect(cluster.primary.uri()).pwrite(pattern(MIB, 1), 0)
    cluster.check_in_sync()
    assert cluster.primary.daemon.alive and cluster.secondary.daemon.alive


def test_silent_connections_are_limited(make_cluster: MakeCluster) -> None:
    """I6: a hundred silent peers cost neither the link nor its return after a cut."""
    cluster = make_cluster().start()
    silent = [_dial(cluster) for _ in range(100)]
    try:
        cluster.proxy.reset()
        handle = connect(cluster.primary.uri())
        handle.pwrite(pattern(MIB, 4), 0)
        cluster.check_in_sync()
    finally:
        for sock in silent:
            sock.close()


def test_state_of_another_node_is_refused(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """I9: a configuration that points at another group's state does not start."""
    first, second = make_cluster(group="first"), make_cluster(group="second")
    assert first.primary.create().code == 0
    text = second.primary.config.read_text()
    text = text.replace(f"{second.primary.directory}/state", f"{first.primary.directory}/state")
    second.primary.config.write_text(text)
    with pytest.raises(AssertionError, match="first"):
        second.primary.start()
    wait_until("it has ended", lambda: not second.primary.alive)
