"""``attach``: what its words mean, the client's handshake, and the watcher without a kernel (X7).

The kernel's part is held by ``tests.guest``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdmirror.codec.nbdclient import ClientHandshake, Export
from nbdmirror.codec.nbdhandshake import GREETING
from nbdmirror.edge import attach, nbdkernel
from nbdmirror.edge.attach import Endpoint, Watcher, parse_device, parse_uri, shake_hands
from nbdmirror.edge.journal import JOURNAL
from nbdmirror.errors import FormatError, NbdmirrorError, UsageError

GO = bytes.fromhex("00000003 49484156454f5054 00000007 0000000c 00000004 64617461 0001 0003")
INFO_EXPORT = bytes.fromhex(
    "0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 016d"
)
INFO_BLOCK_SIZE = bytes.fromhex(
    "0003e889045565a9 00000007 00000003 0000000e 0003 00001000 00001000 02000000"
)
INFO_NAME = bytes.fromhex("0003e889045565a9 00000007 00000003 00000006 0001 64617461")
ACK = bytes.fromhex("0003e889045565a9 00000007 00000001 00000000")
UNKNOWN = bytes.fromhex("0003e889045565a9 00000007 80000006 00000002 6e6f")
TLS = bytes.fromhex("0003e889045565a9 00000007 80000005 00000000")
REPLIES = INFO_EXPORT + INFO_BLOCK_SIZE + INFO_NAME + ACK
EXPORT = Export(size=1 << 20, flags=0x16D, block_size=4096)


# -- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("nbd://h/data", Endpoint("", "data", host="h")),
        ("nbd://h:1/", Endpoint("", "", host="h", port=1)),
        ("nbd://[::1]:2/a%20b", Endpoint("", "a b", host="::1", port=2)),
        ("nbd+unix:///data?socket=/r/s", Endpoint("", "data", path="/r/s")),
        ("nbd+unix:///?socket=/a%20b", Endpoint("", "", path="/a b")),
    ],
)
def test_uri(uri: str, expected: Endpoint) -> None:
    """The two forms that a daemon prints."""
    found = parse_uri(uri)
    assert (found.export, found.path, found.host, found.port) == (
        expected.export,
        expected.path,
        expected.host,
        expected.port,
    )
    assert found.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "data",
        "http://h/data",
        "nbd:///data",
        "nbd://h:x/data",
        "nbd://h/data?socket=/s",
        "nbd+unix:///data",
        "nbd+unix://h/data?socket=/s",
        "nbd+unix:///data?socket=/s&tls=1",
        "nbds://h/data",
    ],
)
def test_uri_refused(uri: str) -> None:
    """Anything else is a wrong use, with the right forms in the hint (I9)."""
    with pytest.raises(UsageError) as caught:
        parse_uri(uri)
    assert caught.value.hint is not None and "nbd+unix:///" in caught.value.hint


def test_device() -> None:
    """/dev/nbdN, and no other device by accident."""
    assert parse_device("/dev/nbd0") == 0
    assert parse_device("nbd12") == 12
    for device in ("/dev/sda", "/dev/nbd", "/dev/nbd0p1", "0", "/dev/nbd-1"):
        with pytest.raises(UsageError, match="write /dev/nbdN"):
            parse_device(device)


def test_connections_bounded() -> None:
    """A number of connections that makes no sense is refused before anything is opened (I6)."""
    for connections in (0, 65):
        with pytest.raises(UsageError, match="1 to 64"):
            attach.attach("nbd://h/data", lambda _data, _text: None, None, connections)


def test_without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No root and no driver are told apart, each with what to do."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NbdmirrorError, match="only root"):
        nbdkernel.NbdKernel()
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def no_family(*_args: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(nbdkernel.NbdKernel, "_call", no_family)
    with pytest.raises(NbdmirrorError) as caught:
        nbdkernel.NbdKernel()
    assert caught.value.hint == "load it with: modprobe nbd"


# -- handshake -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_handshake(step: int) -> None:
    """The greeting is answered with flags and GO; facts and ACK end it, however they are cut."""
    handshake = ClientHandshake("data")
    sent = b""
    stream = GREETING + REPLIES
    for start in range(0, len(stream), step):
        sent += handshake.receive(stream[start : start + step])
    assert sent == GO
    assert handshake.export == EXPORT
    assert EXPORT.multi_conn and not Export(1, 1).multi_conn


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b"NBDMAGIC" + bytes(10), FormatError),
        (b"SSH-2.0-OpenSSH_9.2\r\n", FormatError),
        (GREETING + ACK, FormatError),
        (GREETING + INFO_EXPORT[:-12] + ACK, FormatError),
        (GREETING + INFO_EXPORT.replace(b"\0\0\0\x0c", b"\0\1\0\1") + ACK, FormatError),
        (GREETING + INFO_BLOCK_SIZE.replace(b"\x0e\0\x03", b"\x0e\0\0") + ACK, FormatError),
        (GREETING + REPLIES + b"x", FormatError),
    ],
)
def test_handshake_damage(stream: bytes, error: type[Exception]) -> None:
    """What is not NBD is refused, and nothing that a server invents goes to the kernel (I9)."""
    with pytest.raises(error):
        ClientHandshake("data").receive(stream)


def test_handshake_refused() -> None:
    """A server's refusal names the export, the server's words, or what the kernel lacks."""
    with pytest.raises(NbdmirrorError, match=r"no such export \(export 'data': no\)"):
        ClientHandshake("data").receive(GREETING + UNKNOWN)
    with pytest.raises(NbdmirrorError, match="TLS"):
        ClientHandshake("data").receive(GREETING + TLS)


# -- the watcher ---------------------------------------------------------------------------------


class Server:
    """A unix socket that shakes hands with everybody, and counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies = REPLIES
        self.served = threading.Semaphore(0)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(GREETING)
                connection.recv(4096)
                connection.sendall(self.replies)
                self.served.release()

    def close(self) -> None:
        """Stops listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.path.unlink()


class FakeKernel:
    """The driver as the watcher sees it: a pipe for events, a list of replaced connections."""

    def __init__(self) -> None:
        self.events_out, self.events_in = os.pipe()
        self.died: list[int | None] = []
        self.replaced = 0
        self.gone = False
        self.alive = threading.Semaphore(0)

    def fileno(self) -> int:
        return self.events_out

    def die(self, connections: int | None) -> None:
        """So many connections are dead; None: the events were lost."""
        self.died.append(connections)
        os.write(self.events_in, b"x")

    def dead_links(self, index: int) -> int | None:
        assert index == 0
        os.read(self.events_out, 1)
        return self.died.pop(0)

    def connected(self, index: int) -> bool:
        return not self.gone

    def replace(self, index: int, connection: socket.socket, identifier: str) -> None:
        if self.gone:
            raise OSError(errno.EINVAL, "not connected")
        self.replaced += 1
        self.alive.release()


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A kernel without a kernel."""
    fake = FakeKernel()
    yield fake
    os.close(fake.events_in)
    os.close(fake.events_out)


@contextlib.contextmanager
def watching(
    kernel: FakeKernel, path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Watcher, Callable[[], bool]]]:
    """A watcher in a thread, fast; the function waits for its end and returns its result."""
    monkeypatch.setattr(attach, "LOOK_S", 0.01)
    monkeypatch.setattr(attach, "RETRY_MIN_S", 0.005)
    monkeypatch.setattr(attach, "device_size", lambda _index: 1 << 20)
    endpoint = parse_uri(f"nbd+unix:///data?socket={path}")
    watcher = Watcher(kernel, endpoint, 0, 4)  # type: ignore[arg-type]
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(watcher.watch()))
    thread.start()

    def result() -> bool:
        thread.join(10)
        assert not thread.is_alive()
        return results[0]

    try:
        yield watcher, result
    finally:
        watcher.stop()
        result()


def test_shake_hands(tmp_path: Path) -> None:
    """A real socket, blocking again when the kernel gets it."""
    server = Server(tmp_path / "s")
    connection, export = shake_hands(parse_uri(f"nbd+unix:///data?socket={server.path}"))
    assert export == EXPORT
    assert connection.gettimeout() is None
    connection.close()
    server.close()


def test_watcher_replaces(
    kernel: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X7: one new connection for each dead one, and all of them when events were lost."""
    server = Server(tmp_path / "s")
    with watching(kernel, server.path, monkeypatch):
        for died, count in ((1, 1), (4, 4), (None, 4)):
            kernel.die(died)
            for _ in range(count):
                assert kernel.alive.acquire(timeout=10)
    assert kernel.replaced == 9
    server.close()


def test_watcher_waits_for_server(
    kernel: FakeKernel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """X7: nobody listens, then somebody does: it goes on trying, and says so once."""
    path = tmp_path / "s"
    with watching(kernel, path, monkeypatch) as (watcher, _):
        refused = threading.Event()
        real = shake_hands
        tries = []

        def counted(endpoint: Endpoint) -> tuple[socket.socket, Export]:
            tries.append(endpoint)
            if len(tries) >= 3:
                refused.set()
            return real(endpoint)

        monkeypatch.setattr(attach, "shake_hands", counted)
        kernel.die(1)
        assert refused.wait(10)
        server = Server(path)
        assert kernel.alive.acquire(timeout=10)
        assert watcher.device == "/dev/nbd0"
    server.close()
    assert JOURNAL.flush()
    said = capfd.readouterr().err.splitlines()
    assert len([line for line in said if "cannot reconnect" in line]) == 1


def test_watcher_refuses_smaller(
    kernel: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I5: an export that shrank is not the volume that was attached: nothing is connected to it."""
    server = Server(tmp_path / "s")
    server.replies = REPLIES.replace(b"\0\x10\0\0\1\x6d", b"\0\x08\0\0\1\x6d")
    with watching(kernel, server.path, monkeypatch):
        kernel.die(1)
        for _ in range(2):
            assert server.served.acquire(timeout=10)
        assert kernel.replaced == 0
        server.replies = REPLIES
        assert kernel.alive.acquire(timeout=10)
    server.close()


def test_watcher_ends(kernel: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends when the device is detached, and also when told to, and says which it was."""
    with watching(kernel, tmp_path / "s", monkeypatch) as (watcher, result):
        watcher.stop()
        assert result() is False
    kernel.gone = True
    with watching(kernel, tmp_path / "s", monkeypatch) as (_, result):
        assert result() is True


def test_watcher_ends_when_detached_without_a_server(
    kernel: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens any more, and the device is detached: nobody has to stop the watcher."""
    with watching(kernel, tmp_path / "s", monkeypatch) as (_, result):
        kernel.die(4)
        kernel.gone = True
        assert result() is True
