"""Sockets that somebody else holds: ``sd_listen_fds(3)``, the units of ``deploy/`` (issue E, X7).

The daemon serves what it is passed, by address or by name; a client that comes while it is down
waits; nothing that it did not make does it remove.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.cluster import MIB, READY_S, Cluster, Node
from tests.integration.process import Process, wait_until
from tests.integration.tools import connect, pattern, requires

MakeCluster = Callable[..., Cluster]

# Puts descriptors where a service manager does, says so, and becomes the daemon.
LAUNCH = """
import fcntl, os, sys
fds, names = sys.argv[1].split(","), sys.argv[2]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 100) for fd in fds]
for place, fd in enumerate(high, 3):
    os.dup2(fd, place)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
os.execv(sys.executable, [sys.executable, "-m", "nbdmirror", "serve", sys.argv[3]])
"""


class Holder:
    """Listening sockets with names, as a socket unit keeps them, and daemons that get them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._sockets: list[tuple[str, socket.socket]] = []

    def unix(self, path: Path, name: str = "") -> None:
        """One at a path."""
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        self.add(sock, name)

    def tcp(self, port: int = 0, name: str = "") -> int:
        """One on loopback; its port."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        self.add(sock, name)
        bound: int = sock.getsockname()[1]
        return bound

    def add(self, sock: socket.socket, name: str) -> None:
        """One that is bound already."""
        sock.listen(8)
        self._sockets.append((name or "unnamed", sock))

    def start(self, *, ready: bool = True) -> Process:
        """The daemon, with all of them."""
        fds = [sock.fileno() for _, sock in self._sockets]
        names = ":".join(name for name, _ in self._sockets)
        argv = [sys.executable, "-c", LAUNCH, ",".join(map(str, fds)), names, str(self.node.config)]
        self.node.process = Process(
            self.node.name,
            argv,
            self.node.directory / "output",
            notify=READY_S if ready else None,
            pass_fds=fds,
        )
        return self.node.process

    def close(self) -> None:
        """As a socket unit that is stopped."""
        for _, sock in self._sockets:
            sock.close()


@pytest.fixture
def hold() -> Iterator[Callable[[Node], Holder]]:
    """Makes holders; they end with the test."""
    with ExitStack() as stack:

        def make(node: Node) -> Holder:
            holder = Holder(node)
            stack.callback(holder.close)
            return holder

        yield make


def test_passed_sockets_serve_their_addresses(
    make_cluster: MakeCluster, frontend: str, hold: Callable[[Node], Holder]
) -> None:
    """NBD, admin and replication, on both sides and front ends; a client that comes between two
    daemons waits for the second (X7), and the sockets outlive both."""
    cluster = make_cluster(frontend=frontend, tcp=True, proxied=False)
    cluster.create()
    beta, alpha = hold(cluster.secondary), hold(cluster.primary)
    beta.tcp(cluster.secondary.replication_port)
    beta.unix(cluster.secondary.admin_socket)
    alpha.unix(cluster.primary.nbd_socket)
    alpha.tcp(cluster.primary.nbd_port)
    alpha.unix(cluster.primary.admin_socket)
    inodes = [os.stat(path).st_ino for path in _paths(cluster)]
    beta.start()
    alpha.start()
    cluster.wait_in_sync()
    for tcp in (False, True):
        handle = connect(cluster.primary.uri(tcp=tcp))
        handle.pwrite(pattern(MIB, tcp), tcp * MIB)
        handle.flush()
        handle.shutdown()
    cluster.check_in_sync()
    cluster.primary.stop()
    cluster.secondary.kill()
    assert [os.stat(path).st_ino for path in _paths(cluster)] == inodes
    late: list[bytes] = []
    waiting = threading.Thread(
        target=lambda: late.append(bytes(connect(cluster.primary.uri()).pread(MIB, MIB)))
    )
    waiting.start()
    beta.start()
    alpha.start()
    waiting.join(READY_S)
    assert late == [pattern(MIB, 1)]
    cluster.check_in_sync()


def test_a_primary_turns_away_who_comes_by_a_passed_socket(
    make_cluster: MakeCluster, hold: Callable[[Node], Holder]
) -> None:
    """T13: a socket unit for replication beside a primary, as one unit serves both roles: who
    connects is refused with the reason, and not left to wait in the backlog."""
    cluster, other = make_cluster(remotes=(), proxied=False), make_cluster(proxied=False)
    cluster.create()
    alpha = hold(cluster.primary)
    alpha.tcp(cluster.primary.replication_port)
    alpha.start()
    other.secondary.replication_port = cluster.primary.replication_port
    other.primary.write_config()
    assert other.primary.create().code == 0
    other.primary.start()
    entry = other.primary.until("is refused", lambda one: one["state"] == "refused")
    assert entry["why"] == "T13: alpha is a primary, and takes no replication"


def _paths(cluster: Cluster) -> list[Path]:
    return [
        cluster.primary.nbd_socket,
        cluster.primary.admin_socket,
        cluster.secondary.admin_socket,
    ]


def test_names_say_what_other_sockets_are_for(
    make_cluster: MakeCluster, frontend: str, hold: Callable[[Node], Holder]
) -> None:
    """FileDescriptorName: addresses that the configuration does not have; the status has them."""
    cluster = make_cluster(frontend=frontend, proxied=False)
    text = cluster.secondary.config.read_text()
    cluster.secondary.config.write_text(
        "\n".join(line for line in text.splitlines() if not line.startswith('listen = "tcp'))
    )
    cluster.create()
    beta, alpha = hold(cluster.secondary), hold(cluster.primary)
    beta.tcp(cluster.secondary.replication_port, "replication")
    port, metrics = alpha.tcp(name="nbd"), alpha.tcp(name="metrics")
    beta.start()
    alpha.start()
    uri = f"nbd://127.0.0.1:{port}/data"
    assert uri in cluster.primary.status()["volumes"][0]["uris"]
    connect(uri).pwrite(pattern(MIB, 1), 0)
    assert bytes(connect(cluster.primary.uri()).pread(MIB, 0)) == pattern(MIB, 1)
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=20) as answer:
        assert b"nbdmirror_info" in answer.read()
    cluster.check_in_sync()
    cluster.primary.reload()
    wait_until("reloaded", lambda: "reloaded" in cluster.primary.daemon.output())
    assert 'reloaded {"needs_restart": []}' in cluster.primary.daemon.output()


@pytest.mark.parametrize(
    ("name", "where", "why"),
    [
        ("", "127.0.0.1", "no listener has that address"),
        ("nbdx", "127.0.0.1", "FileDescriptorName= be one of nbd, admin, replication, metrics"),
        ("nbd", "0.0.0.0", "unencrypted and unauthenticated"),
        ("metrics", "0.0.0.0", "unencrypted and unauthenticated"),
        ("replication", "127.0.0.1", "the configuration has tcp:"),
        ("admin", "127.0.0.1", "the configuration has /"),
        ("datagrams", "", "does not listen for streams"),
    ],
)
def test_what_nothing_is_to_serve_keeps_it_from_starting(
    make_cluster: MakeCluster, hold: Callable[[Node], Holder], name: str, where: str, why: str
) -> None:
    """I9: exit code 2 and what would be right; a client would wait there for ever, or come in by
    an open door (4.1)."""
    cluster = make_cluster(remotes=())
    cluster.create()
    holder = hold(cluster.primary)
    if where:
        sock = socket.socket()
        sock.bind((where, 0))
        holder.add(sock, name)
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        holder._sockets.append((name, sock))
    process = holder.start(ready=False)
    assert process.popen.wait(READY_S) == 2
    assert why in process.output()


@requires("systemd-socket-activate")
def test_the_first_client_starts_the_daemon(
    make_cluster: MakeCluster, frontend: str, tmp_path: Path
) -> None:
    """As systemd does it: its own program listens, and runs the daemon when somebody connects."""
    cluster = make_cluster(frontend=frontend, remotes=())
    cluster.create()
    node = cluster.primary
    argv = ["systemd-socket-activate", f"--listen={node.nbd_socket}"]
    argv += [f"--listen={node.admin_socket}", f"--setenv=PATH={os.environ['PATH']}"]
    argv += [sys.executable, "-m", "nbdmirror", "serve", str(node.config)]
    node.process = Process("activated", argv, tmp_path / "log")
    wait_until("it listens", node.nbd_socket.exists)
    assert Path(f"/proc/{node.process.pid}/comm").read_text().startswith("systemd-socket")
    handle = connect(node.uri())
    handle.pwrite(pattern(MIB, 1), 0)
    assert bytes(handle.pread(MIB, 0)) == pattern(MIB, 1)
    assert node.status()["role"] == "primary"
    handle.shutdown()
    node.stop()
    assert node.nbd_socket.exists() and node.admin_socket.exists()
