"""The tests' own network does what it says: else a test of an outage could pass without one."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.integration.proxy import Proxy


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy before a server that echoes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def echo(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    proxy = Proxy(f"127.0.0.1:{listener.getsockname()[1]}")
    yield proxy
    proxy.close()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def _dial(proxy: Proxy, timeout: float = 10.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout)


def _echo(sock: socket.socket, data: bytes) -> bytes:
    sock.sendall(data)
    received = b""
    while len(received) < len(data):
        part = sock.recv(65536)
        if not part:
            break
        received += part
    return received


def test_passes_and_counts(proxy: Proxy) -> None:
    with _dial(proxy) as sock:
        assert _echo(sock, b"x" * 300_000) == b"x" * 300_000
    assert (proxy.sent_bytes, proxy.received_bytes) == (300_000, 300_000)
    assert proxy.connections == 1


@pytest.mark.parametrize("direction", [None, "up", "down"])
def test_cut_is_silent_and_heals(proxy: Proxy, direction: str | None) -> None:
    with _dial(proxy) as sock:
        assert _echo(sock, b"before") == b"before"
        if direction is None:
            proxy.cut()
        else:
            proxy.stall(direction)
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            _echo(sock, b"during")
        assert proxy.sent_bytes == (12 if direction == "down" else 6)
        assert proxy.received_bytes == 6
        sock.settimeout(10)
        proxy.heal()
        assert sock.recv(100) == b"during"


def test_reset_ends_connections(proxy: Proxy) -> None:
    with _dial(proxy) as sock:
        assert _echo(sock, b"before") == b"before"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    with _dial(proxy) as sock:
        assert _echo(sock, b"after") == b"after"


def test_refuse_until_heal(proxy: Proxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionResetError), _dial(proxy) as sock:
        sock.recv(1)
    proxy.heal()
    with _dial(proxy) as sock:
        assert _echo(sock, b"after") == b"after"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_flips_one_bit(proxy: Proxy, direction: str) -> None:
    with _dial(proxy) as sock:
        assert _echo(sock, bytes(10)) == bytes(10)
        proxy.flip(100_000, direction)
        got = _echo(sock, bytes(300_000))
        assert [place for place, byte in enumerate(got) if byte] == [100_000]
        assert _echo(sock, bytes(200_000)) == bytes(200_000)


def test_delays_and_limits(proxy: Proxy) -> None:
    with _dial(proxy) as sock:
        proxy.shape(delay_s=0.1)
        began = time.monotonic()
        _echo(sock, b"x")
        assert time.monotonic() - began >= 0.2
        proxy.shape(rate=1 << 20)
        began = time.monotonic()
        _echo(sock, b"x" * (1 << 18))
        assert time.monotonic() - began >= 0.25


def test_an_end_of_stream_is_passed_on(proxy: Proxy) -> None:
    with _dial(proxy) as sock:
        sock.sendall(b"last")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b"last"
        assert sock.recv(1) == b""


def test_a_target_that_is_gone_resets(proxy: Proxy) -> None:
    async def retarget() -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            proxy._target = "{}:{}".format(*unused.getsockname()[:2])

    asyncio.run(retarget())
    with pytest.raises(ConnectionResetError), _dial(proxy) as sock:
        sock.recv(1)
