"""Nodes that do not fit refuse each other, say why with both values, harm nothing (A5, I9)."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
from pathlib import Path

import pytest

from nbdmirror.codec import repl
from tests.integration.cluster import MIB, READY_S, Cluster, Json, Node, Volume
from tests.integration.process import Process, wait_until
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
    """Volume sizes differ: both are in the message.

    Runbook: wrong peer, another primary, other group, other size."""
    _, why = _refusal(
        make_cluster,
        {"volumes": [Volume(size=64 * MIB)]},
        {"volumes": [Volume(size=32 * MIB)]},
    )
    assert str(64 * MIB) in why and str(32 * MIB) in why, why


def test_other_group(make_cluster: MakeCluster) -> None:
    """Group names differ: both are in the message.

    Runbook: wrong peer, another primary, other group, other size."""
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


@pytest.mark.parametrize("proof", ["none", "secret"])
def test_two_primaries(make_cluster: MakeCluster, tmp_path: Path, proof: str) -> None:
    """T13, I5: a primary takes no replication: the other hears so at once, with the reason; no
    data moves, and both serve on. Runbook: wrong peer, another primary, other group, other size."""
    first, second = make_cluster(), make_cluster(remotes=())
    if proof == "secret":
        key = tmp_path / "secret"
        key.write_text("5ecret" * 10)
        key.chmod(0o600)
        for node in (first.primary, second.primary):
            node.keys["replication"] = [f'secret_file = "{key}"']
        second.primary.name = "beta"  # the name that the first one asks for
    first.proxies.pop("beta").close()
    first.secondary.replication_port = second.primary.replication_port
    for node in (second.primary, first.primary):
        node.write_config()
        assert node.create().code == 0
        node.start()
    connect(second.primary.uri()).pwrite(pattern(MIB, 2), 0)
    entry = first.primary.until("is refused", lambda one: one["state"] == "refused")
    assert entry["why"] == f"T13: {second.primary.name} is a primary, and takes no replication"
    assert entry["next_action"]
    (told,) = [one for one in second.primary.events() if one["kind"] == "stranger-refused"]
    assert told["listener"] == "replication" and "is a primary" in told["why"]
    connect(first.primary.uri()).pwrite(pattern(MIB, 1), 0)
    assert connect(second.primary.uri()).pread(MIB, 0) == pattern(MIB, 2)
    assert second.primary.status()["connections"]["replication"]["open"] == 0


def test_what_is_said_to_a_primary_instead_of_hello(make_cluster: MakeCluster) -> None:
    """I6, I9: noise and silence at the replication port of a primary cost it nothing: it hangs
    up, on the silent ones within the time that handshakes have."""
    cluster = make_cluster(remotes=())
    cluster.primary.keys["limits"] = ["handshake_seconds = 1"]
    cluster.primary.write_config()
    cluster.start(synced=False)
    address = ("127.0.0.1", cluster.primary.replication_port)
    for sample in (b"", b"noise" * 100, _frame(repl.Type.START, {}), _frame(repl.Type.PING, {})):
        with socket.create_connection(address, 10) as sock:
            sock.settimeout(20)
            sock.sendall(sample)
            assert _until_end(sock) == b""
    assert cluster.primary.status()["connections"]["replication"]["open"] == 0
    assert connect(cluster.primary.uri()).pread(4096, 0) == bytes(4096)
    with socket.create_connection(address, 10):
        cluster.primary.stop()  # nobody who waits there holds it up


def test_a_peer_for_whom_there_is_no_room_is_hung_up_on(make_cluster: MakeCluster) -> None:
    """I6: one connection more than there may be does not stay open; the primary keeps its own."""
    cluster = make_cluster()
    cluster.secondary.keys["limits"] = ["replication_connections_max = 1"]
    cluster.secondary.write_config()
    cluster.start()
    for _ in range(3):
        with _dial(cluster) as sock:
            assert _until_end(sock) == b""
    assert cluster.secondary.status()["connections"]["replication"]["refused"] == 3
    cluster.check_in_sync()
    assert len([one for one in cluster.primary.events() if one["kind"] == "handshake"]) == 1


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


OTHER_VERSIONS = """
import runpy, sys
from nbdmirror.codec import repl
repl.PROTOCOL_VERSIONS = int(sys.argv[1]), int(sys.argv[2])
sys.argv = ["nbdmirror", "serve", sys.argv[3]]
runpy.run_module("nbdmirror", run_name="__main__")
"""


@pytest.mark.parametrize("side", ["primary", "secondary"])
@pytest.mark.parametrize("first", [-1, 0, 1], ids=["older", "both", "newer"])
def test_peers_of_other_versions(make_cluster: MakeCluster, side: str, first: int) -> None:
    """Fault 39, A5: a daemon that speaks other versions, on either side: one that both speak is
    used; if there is none the primary says so with both ranges, and nothing moves."""
    cluster = make_cluster()
    cluster.create()
    low, high = repl.PROTOCOL_VERSIONS
    theirs = (low, high + 1) if not first else (low + 9 * first, high + 9 * first)
    odd: Node = getattr(cluster, side)
    for node in cluster.nodes:
        if node is odd:
            argv = [sys.executable, "-c", OTHER_VERSIONS, *map(str, theirs), str(node.config)]
            node.process = Process(node.name, argv, node.directory / "output", notify=READY_S)
        else:
            node.start()
    if not first:
        connect(cluster.primary.uri()).pwrite(pattern(MIB, 1), 0)
        cluster.check_in_sync()
        return
    entry = cluster.primary.until("is refused", lambda one: one["state"] == "refused")
    for versions in (theirs, (low, high)):
        assert f"{versions[0]}..{versions[1]}" in entry["why"], entry
    assert entry["next_action"]
    odd.stop()
    odd.start()  # upgraded, or downgraded
    cluster.primary.ok("resync", "beta")
    cluster.check_in_sync()


def test_unknown_version(make_cluster: MakeCluster) -> None:
    """Fault 39, A5: a peer of another version is refused; both ranges are in the message."""
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
