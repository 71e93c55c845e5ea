"""How an nbdkit front end ends, whatever its clients and terminals do (M7, I6)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from nbdmirror.edge.env import EXIT_MISTAKE
from tests.integration.cluster import MIB, Cluster, Node, Volume
from tests.integration.process import wait_until
from tests.integration.tools import connect, nbd_error, requires

pytestmark = requires("nbdkit")
MakeCluster = Callable[..., Cluster]
STOPPED_S = 45
"""What waits for a remote may do so for 30 seconds of a stop."""


def stopped(node: Node) -> int:
    """Tells the daemon to end; its exit code."""
    node.daemon.signal(signal.SIGTERM)
    code: int = node.daemon.popen.wait(STOPPED_S)
    node.kill()  # gives back what the harness holds for it
    return code


def has_ipv6() -> bool:
    """Whether there is an address for a loop to itself."""
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.parametrize(
    "host, where", [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("[::]", "::1")]
)
def test_a_silent_client_counts_and_keeps_no_stop(
    make_cluster: MakeCluster, host: str, where: str
) -> None:
    """I6: also where nbdkit listens on every address, and no client's socket has that name."""
    if ":" in where and not has_ipv6():
        pytest.skip("no IPv6 here")
    cluster = make_cluster(frontend="nbdkit", remotes=())
    node = cluster.primary
    node.keys.update(nbd=["insecure = true"], limits=["connections_max = 2"])
    node.nbd_listen = lambda: [f"tcp:{host}:{node.nbd_port}"]  # type: ignore[method-assign]
    node.write_config()
    cluster.start(synced=False)
    with ExitStack() as stack:
        silent = []
        for _ in range(4):
            sock = stack.enter_context(socket.create_connection((where, node.nbd_port), 10))
            assert sock.recv(18) != b""
            silent.append(sock)
        for sock in silent[:2]:  # the oldest make room
            with suppress(ConnectionError):
                assert sock.recv(18) == b""
        for sock in silent[2:]:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(18)
        assert stopped(node) == 0


def test_a_write_that_waits_for_a_remote_keeps_no_stop(make_cluster: MakeCluster) -> None:
    """``on_full = "block"``, and the remote is away: systemd would kill it, after two minutes."""
    cluster = make_cluster(
        frontend="nbdkit", log_size=8 * MIB, on_full="block", volumes=[Volume(size=32 * MIB)]
    ).start()
    cluster.secondary.stop()
    client = connect(cluster.primary.uri())

    def write() -> None:
        with suppress(nbd_error()):
            for number in range(32):
                client.pwrite(bytes(MIB), number * MIB)

    writing = Thread(target=write)
    writing.start()
    wait_until("the log is full", lambda: "log-full" in str(cluster.primary.events()))
    assert stopped(cluster.primary) == 0
    writing.join()


@contextmanager
def serving(argv: list[str], **how: Any) -> Iterator[subprocess.Popen[Any]]:
    """A daemon; one that does not do what is expected is not waited for."""
    with subprocess.Popen(argv, stderr=subprocess.PIPE, **how) as process:
        try:
            yield process
        finally:
            process.kill()


def child_of(pid: int) -> str:
    """The command line of what it runs; empty if it runs nothing."""
    with suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return Path(f"/proc/{child}/cmdline").read_text()
    return ""


@pytest.mark.parametrize("delay", [0.02, 0.2, 0.5])
def test_a_ctrl_c_while_nbdkit_starts(make_cluster: MakeCluster, delay: float) -> None:
    """A terminal tells all of its processes; the one that ends nbdkit is its supervisor."""
    cluster = make_cluster(frontend="nbdkit", remotes=())
    cluster.create()
    argv = [sys.executable, "-m", "nbdmirror", "serve", str(cluster.primary.config)]
    with serving(argv, start_new_session=True) as process:
        wait_until("nbdkit was begun", lambda: "--foreground" in child_of(process.pid))
        time.sleep(delay)  # any moment of its start will do
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=STOPPED_S)
    assert process.returncode == 0, said


MISTAKE = """
from nbdmirror.engine.node import Node

async def mistaken(*args, **kwargs):
    raise AssertionError("a mistake")

Node.%s = mistaken
"""


@pytest.mark.parametrize("when", ["start", "stop"])
def test_a_mistake_inside_nbdkit(make_cluster: MakeCluster, tmp_path: Path, when: str) -> None:
    """As with the native front end: after this code a service manager starts it again."""
    cluster = make_cluster(frontend="nbdkit", remotes=())
    cluster.create()
    packages = tmp_path / "mistaken-packages"  # the name of what nbdkit's Python is given too
    packages.mkdir()
    (packages / "sitecustomize.py").write_text(MISTAKE % when)
    argv = [sys.executable, "-m", "nbdmirror", "serve", str(cluster.primary.config)]
    environment = os.environ | {"PYTHONPATH": str(packages)}
    with serving(argv, env=environment, text=True) as process:
        if when == "stop":
            wait_until("it serves", lambda: cluster.primary.cli("status").code == 0)
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=STOPPED_S)
    assert process.returncode == EXIT_MISTAKE, said
    assert "AssertionError: a mistake" in said
