"""The doors that are not TLS: limits, descriptors, the admin socket, metrics (4.1, faults 35, 36).

What is refused is refused early and with a reason; who means it is served meanwhile.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import re
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from nbdmirror.codec import prometheus
from nbdmirror.config import Limits
from tests.integration.cluster import MIB, Cluster, nbdmirror
from tests.integration.process import children, free_port, wait_until
from tests.integration.rawnbd import OPT_INFO, OPT_LIST, REP_ACK, REP_ERR_TOO_BIG, WRITE, RawClient
from tests.integration.tools import connect, nbd_error, pattern, requires

MakeCluster = Callable[..., Cluster]
TREE = Path(__file__).parents[2]
KIB = 1 << 10


def alone(make_cluster: MakeCluster, **keys: list[str]) -> Cluster:
    """A primary without remotes; ``keys`` as ``Node.keys``."""
    cluster = make_cluster(remotes=(), tcp=True)
    cluster.primary.keys.update(keys)
    cluster.primary.write_config()
    cluster.create()
    cluster.primary.start()
    return cluster


# -- limits --------------------------------------------------------------------------------------


def test_every_limit_is_in_the_configuration_and_in_the_status(make_cluster: MakeCluster) -> None:
    """I6, issue E: each key of ``[limits]`` is taken, and the daemon says that it holds it."""
    wanted = {
        key: value + (1 if isinstance(value, int) else 0.5)
        for key, value in asdict(Limits()).items()
    }
    wanted["request_bytes_max"] -= 2  # its default is the most that there may be
    cluster = make_cluster()
    for node in cluster.nodes:
        node.keys["limits"] = [f"{key} = {value}" for key, value in wanted.items()]
        node.write_config()
    cluster.start()
    for node in cluster.nodes:
        status = node.status()["limits"]
        assert {key: status[key] for key in wanted} == wanted
    connect(cluster.primary.uri()).pwrite(pattern(MIB, 1), 0)
    cluster.check_in_sync()


def test_how_long_an_option_may_be(make_cluster: MakeCluster) -> None:
    """4.1, huge lengths: the daemon holds the configured one, and the client may go on."""
    cluster = alone(make_cluster, limits=["option_bytes_max = 8192"])
    with RawClient(cluster.primary.nbd_socket) as client:
        (reply,) = client.replies(OPT_LIST, bytes(8193))
        assert reply.kind == REP_ERR_TOO_BIG and b"8192" in reply.data
        assert client.go("data")[-1].kind == REP_ACK
        client.check_usable()


# -- strangers -----------------------------------------------------------------------------------


def test_strangers_make_room_for_strangers(make_cluster: MakeCluster) -> None:
    """A hundred silent connections: the oldest go, a client that means it never waits."""
    cluster = alone(make_cluster, limits=["strangers_max = 8"])
    with contextlib.ExitStack() as stack:
        silent = []
        for _ in range(100):
            with contextlib.suppress(OSError, EOFError):
                silent.append(stack.enter_context(RawClient(cluster.primary.nbd_socket)))
            if len(silent) == 50:
                assert connect(cluster.primary.uri()).get_size()
        assert silent[0].hung_up()
        assert connect(cluster.primary.uri()).get_size()
        counts = cluster.primary.status()["connections"]["nbd"]
        assert counts["strangers"] <= 8 and counts["evicted"] >= 90


def test_one_address_does_not_push_out_another(make_cluster: MakeCluster) -> None:
    """Per address: 127.0.0.2 may stall as much as it likes, 127.0.0.1 keeps its place."""
    cluster = alone(make_cluster, limits=["strangers_max = 20", "strangers_per_address_max = 4"])
    where = ("127.0.0.1", cluster.primary.nbd_port)
    with RawClient(where) as patient, contextlib.ExitStack() as stack:
        for _ in range(50):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.2", 0))
            sock.connect(where)
        wait_until(
            "the flood was seen",
            lambda: cluster.primary.status()["connections"]["nbd"]["evicted"] >= 46,
        )
        assert patient.go("data")[-1].kind == REP_ACK
        patient.check_usable()


@requires("nbdkit")
def test_strangers_of_nbdkit(make_cluster: MakeCluster) -> None:
    """4.1, fault 36: by TCP; nbdkit itself would wait for them, and for ever."""
    cluster = make_cluster(frontend="nbdkit", remotes=(), tcp=True)
    node = cluster.primary
    node.keys["limits"] = ["handshake_seconds = 3", "connections_max = 6"]
    node.write_config()
    cluster.create()
    node.start()
    where = ("127.0.0.1", node.nbd_port)
    handle = connect(node.uri(tcp=True))
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(RawClient(where, timeout=30)) for _ in range(5)]
        served = stack.enter_context(RawClient(where, timeout=30))
        assert stalled[0].hung_up(), "the oldest makes room"
        served.go("data")
        asking = stack.enter_context(RawClient(where, timeout=30))
        assert stalled[1].hung_up()
        asking.go("data", option=OPT_INFO)
        for one in (*stalled[2:], asking):
            assert one.hung_up(), "its time is over"
        served.check_usable()
    handle.pwrite(pattern(MIB, 1), 0)
    assert handle.pread(MIB, 0) == pattern(MIB, 1)
    assert any("its place was needed" in why for why in node.refusals())
    assert node.status()["connections"]["refused"]["nbd"] == 6


def test_refusals_are_told_and_do_not_flood_the_history(make_cluster: MakeCluster) -> None:
    """One event at once, the rest is counted."""
    cluster = alone(make_cluster)
    for _ in range(300):
        with contextlib.suppress(OSError, EOFError), RawClient(cluster.primary.nbd_socket) as one:
            one.send(b"x" * 64)
            one.hung_up()
    told = [e for e in cluster.primary.events() if e["kind"] == "stranger-refused"]
    assert 1 <= len(told) <= 20
    assert "where an option begins" in told[0]["why"]
    assert cluster.primary.status()["connections"]["refused"]["nbd"] >= 300


# -- memory --------------------------------------------------------------------------------------


def test_announced_writes_share_a_budget(make_cluster: MakeCluster) -> None:
    """Twenty clients announce 32 MiB each and send half: what is held stays under the budget, and
    another client's writes, small and large, are done."""
    cluster = alone(make_cluster, limits=["memory_bytes_max = '128MiB'", "handshake_seconds = 2"])
    pid = cluster.primary.daemon.pid
    before = _rss(pid)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(RawClient(cluster.primary.nbd_socket, timeout=0.5))
            client.go("data")
            with contextlib.suppress(OSError):
                client.request(WRITE, 0, 32 * MIB, payload=bytes(16 * MIB))
        memory = cluster.primary.status()["connections"]["memory"]
        assert 0 < memory["used"] <= memory["total"] == 128 * MIB
        assert _rss(pid) - before < 128 * MIB + 20 * 2 * MIB
        handle = connect(cluster.primary.uri())
        handle.pwrite(pattern(64 * KIB, 1), 0)
        handle.pwrite(pattern(16 * MIB, 2), MIB)  # waits until somebody who stalls has gone
        assert cluster.primary.status()["connections"]["memory"]["ended"] >= 1
    wait_until(
        "all is given back",
        lambda: cluster.primary.status()["connections"]["memory"]["used"] == 0,
    )
    assert handle.pread(16 * MIB, MIB) == pattern(16 * MIB, 2)


def test_writes_that_wait_share_a_budget(make_cluster: MakeCluster) -> None:
    """The log is full, and waits for its remote: what clients go on sending stays with them once
    the budget is spent. None of them loses its connection for it (I8), and all is done at last."""
    cluster = make_cluster(on_full="block", log_size=16 * MIB)
    cluster.primary.keys["limits"] = ["memory_bytes_max = '128MiB'", "handshake_seconds = 1"]
    cluster.primary.write_config()
    cluster.start()
    cluster.proxy.refuse()
    cluster.primary.until("is away", lambda one: one["link"] == "disconnected")
    pid, count = cluster.primary.daemon.pid, 20
    before = _rss(pid)

    def memory() -> dict[str, int]:
        found: dict[str, int] = cluster.primary.status()["connections"]["memory"]
        return found

    def write(client: RawClient, length: int) -> None:
        header = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, length)
        for _ in range(count):
            client.send(header + bytes(length))

    with contextlib.ExitStack() as stack:
        clients, threads = [], []
        for number in range(8):
            client = stack.enter_context(RawClient(cluster.primary.nbd_socket, timeout=60))
            client.go("data")
            length = 3 * MIB if number % 2 else 200 * KIB
            threads.append(threading.Thread(target=write, args=(client, length)))
            clients.append(client)
            threads[-1].start()
        wait_until("memory is spent", lambda: memory()["used"] > 125 * MIB)
        time.sleep(3)
        assert memory()["used"] <= 128 * MIB + len(clients) * MIB
        assert memory()["ended"] == 0
        assert _rss(pid) - before < 128 * MIB + len(clients) * 2 * MIB + 16 * MIB
        cluster.proxy.heal()
        for client in clients:
            assert client.receive(16 * count)[:8] == struct.pack(">II", 0x67446698, 0)
        for thread in threads:
            thread.join()
        wait_until("all is given back", lambda: memory()["used"] == 0)
    cluster.check_in_sync()


def test_a_large_request_leaves_no_large_buffer(make_cluster: MakeCluster) -> None:
    """Idle clients that once wrote 32 MiB cost what others do."""
    cluster = alone(make_cluster)
    pid = cluster.primary.daemon.pid
    handles = [connect(cluster.primary.uri()) for _ in range(8)]
    data = pattern(30 * MIB, 1)
    handles[0].pwrite(data, 0)
    before = _rss(pid)
    for handle in handles[1:]:
        handle.pwrite(data, 0)
    assert _rss(pid) - before < 64 * MIB


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


# -- access without names ------------------------------------------------------------------------


def test_addresses_and_read_only(make_cluster: MakeCluster) -> None:
    """``client_addresses`` holds for TCP, ``read_only`` for all."""
    volume = ["read_only = true", 'client_addresses = ["127.0.0.9/32"]']
    cluster = alone(make_cluster, volume=volume)
    handle = connect(cluster.primary.uri())
    assert handle.is_read_only()
    with pytest.raises(nbd_error(), match="policy"):
        connect(cluster.primary.uri(tcp=True))
    raw = RawClient(cluster.primary.nbd_socket)
    with raw as client:
        client.go("data")
        assert client.ask(WRITE, 0, 512, payload=bytes(512)) == 1  # EPERM
        client.check_usable()


@pytest.mark.parametrize("name", ["../data", "/etc/passwd", "data/../data", "", "DATA"])
def test_names_are_never_paths(make_cluster: MakeCluster, name: str) -> None:
    """A name is looked up in the configuration, and nowhere else."""
    cluster = alone(make_cluster)
    with RawClient(cluster.primary.nbd_socket) as client:
        kind = client.go(name)[-1].kind
        assert (kind == REP_ACK) == (name == "")


# -- the admin socket ----------------------------------------------------------------------------

NOBODY = 65534

ASK = """
import json, socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
request = {"jsonrpc": "2.0", "id": 1, "method": sys.argv[2], "params": json.loads(sys.argv[3])}
s.sendall(json.dumps(request).encode() + b"\\n")
print(s.makefile().readline())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")
def test_a_group_may_look_and_not_change(make_cluster: MakeCluster) -> None:
    """SO_PEERCRED: reading methods for the group, changing ones for the owner and root; both are
    events with the uid."""
    group = grp.getgrgid(NOBODY).gr_name
    cluster = make_cluster()
    cluster.primary.keys["admin"] = [f'group = "{group}"']
    cluster.primary.write_config()
    cluster.start()
    cluster.sockets.chmod(0o755)
    path = cluster.primary.admin_socket
    assert path.stat().st_gid == NOBODY and path.stat().st_mode & 0o777 == 0o660

    def ask(method: str, **params: object) -> object:
        done = subprocess.run(
            ["/usr/bin/python3", "-c", ASK, str(path), method, json.dumps(params)],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return json.loads(done.stdout)

    assert "result" in str(ask("status")) and "'synchronised'" in str(ask("remote.list"))
    for method, params in (
        ("pause", {"remote": "beta"}),
        ("resync", {"remote": "beta", "full": True}),
        ("remote.remove", {"name": "beta"}),
        ("apply.freeze", {}),
    ):
        assert "may look, not change" in str(ask(method, **params)), method
    assert cluster.primary.remote()["state"] == "synchronised"
    cluster.primary.ok("pause", "beta")
    told = [e for e in cluster.primary.events() if e["kind"] == "admin"]
    assert [(e["uid"], e["method"]) for e in told][-1] == (0, "pause")
    assert {e["uid"] for e in told} == {0}, "what was refused does not flood the history"
    status = cluster.primary.status()
    assert status["connections"]["refused"]["admin"] == 4
    assert any(f"uid {NOBODY} may look" in why for why in cluster.primary.refusals())


# -- metrics -------------------------------------------------------------------------------------


def fetch(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        assert answer.headers["Content-Type"] == prometheus.CONTENT_TYPE
        text: str = answer.read().decode()
        return text


def metered(make_cluster: MakeCluster) -> tuple[Cluster, int]:
    port = free_port()
    cluster = make_cluster()
    cluster.primary.keys["admin"] = [f'metrics = "tcp:127.0.0.1:{port}"']
    cluster.primary.write_config()
    cluster.start()
    return cluster, port


def test_metrics(make_cluster: MakeCluster) -> None:
    """Every sample follows the format, and says what the status says."""
    cluster, port = metered(make_cluster)
    connect(cluster.primary.uri()).pwrite(bytes(4096), 0)
    taken = cluster.primary.rpc("snapshot.create")
    text = fetch(port)
    assert 'nbdmirror_snapshots{state="ok"} 1' in text
    newest = re.search(r"nbdmirror_snapshot_newest_timestamp_seconds ([0-9.e+]+)", text)
    assert newest and abs(float(newest[1]) - taken["time_ns"] / 1e9) < 0.001
    line = re.compile(
        r'# (HELP|TYPE) nbdmirror_\S+ .+|nbdmirror_[a-z_]+(\{(\w+="[^"\n]*",?)+\})? [0-9.e+-]+'
    )
    assert all(line.fullmatch(one) for one in text.splitlines()), text
    assert 'nbdmirror_remote_state{remote="beta",state="synchronised"} 1' in text
    assert 'nbdmirror_remote_connected{remote="beta"} 1' in text
    assert f'nbdmirror_volume_size_bytes{{volume="data"}} {64 * MIB}' in text
    assert "nbdmirror_remote_verify" not in text
    cluster.primary.ok("verify", "beta", "--wait")
    age = re.search(r'remote_verify_age_seconds{remote="beta"} ([0-9.]+)', fetch(port))
    assert age and float(age[1]) < 60
    cluster.primary.ok("pause", "beta")
    assert 'nbdmirror_remote_state{remote="beta",state="paused"} 1' in fetch(port)


def test_metrics_endpoint_is_no_door(make_cluster: MakeCluster) -> None:
    """Whatever else is asked is answered shortly; who stalls makes room."""
    cluster, port = metered(make_cluster)
    for path in ("/", "/metrics/../status", "/%2e%2e"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(port, path)
    with contextlib.ExitStack() as stack:
        for data in (b"", b"GET", b"\0" * 100, b"GET / HTTP/1.1\r\n" * 5) * 10:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            with contextlib.suppress(ConnectionError):
                sock.sendall(data)
        assert "nbdmirror_info" in fetch(port)
    for request, code in ((b"POST /metrics HTTP/1.1\r\n\r\n", b" 405 "), (b"x" * 9000, b" 431 ")):
        with socket.create_connection(("127.0.0.1", port), 20) as sock:
            sock.sendall(request)
            assert code in sock.recv(100)
    assert cluster.primary.alive


def test_alert_rules_name_metrics_that_exist() -> None:
    """The example's expressions use nothing that no node says."""
    rules = (TREE / "deploy/examples/prometheus-alerts.yml").read_text()
    names = {metric.name for metric in prometheus.metrics()}
    used = set(re.findall(r"nbdmirror_[a-z_]+", rules))
    assert used and used <= names, used - names


# -- secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", ["native", "nbdkit"])
def test_secrets_are_nowhere_but_in_their_files(
    make_cluster: MakeCluster, frontend: str, tmp_path: Path
) -> None:
    """4.1, secrets: not in arguments or environments, logs, events, status, metrics or dumps; not
    when they are refused either, and not after a reload."""
    secret, other, key = (os.urandom(32).hex() for _ in range(3))
    files = {"link": secret, "other": other, "keys.psk": f"laptop:{key}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
        (tmp_path / name).chmod(0o600)
    cluster, port = make_cluster(frontend=frontend, tcp=True), free_port()
    for node, name in ((cluster.primary, "other"), (cluster.secondary, "link")):
        node.keys["replication"] = [f'secret_file = "{tmp_path}/{name}"']
        node.write_config()
    cluster.primary.keys["admin"] = [f'metrics = "tcp:127.0.0.1:{port}"']
    if frontend == "nbdkit":
        cluster.primary.keys["nbd"] = [f'tls = {{ psk = "{tmp_path}/keys.psk" }}']
    cluster.primary.write_config()
    cluster.start(synced=False)
    cluster.primary.until("is refused", lambda r: "wrong secret" in str(r["why"]))
    (tmp_path / "other").write_text(secret + "\n")
    cluster.primary.reload()
    cluster.primary.ok("resync", "beta")
    cluster.wait_in_sync()
    said = [fetch(port)]
    for node in cluster.nodes:
        said += [str(node.status()), str(node.events()), _processes(node.daemon.pid)]
    cluster.primary.stop()
    cluster.secondary.stop()
    for node in cluster.nodes:
        said.append(node.daemon.output(100_000))
        for what in ("superblock", "log", "dcm", "active"):
            said.append(str(nbdmirror("dump", what, str(node.config))))
    text = "\n".join(said)
    assert "stranger-refused" in text and "NMR1" not in text and "serve" in text
    for hidden in (secret, other, key):
        assert hidden not in text


def _processes(pid: int) -> str:
    """Arguments and environments of a daemon and of what it started."""
    parts = []
    for one in (pid, *children(pid)):
        for name in ("cmdline", "environ"):
            data = Path(f"/proc/{one}/{name}").read_bytes()
            parts.append(data.replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(parts)
