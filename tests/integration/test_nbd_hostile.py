"""What no correct client sends: lies, floods, hang-ups (issue A point 2; I6, I8, I9).

Each test ends with the server alive (the ``server`` fixture checks) and serving another client.
"""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest

from tests.integration import rawnbd
from tests.integration.conftest import POOL_SIZE, MirroredServer, Server
from tests.integration.process import wait_until
from tests.integration.rawnbd import RawClient
from tests.integration.tools import connect, nbd_error, pattern

MIB = 1 << 20


def test_greeting_and_export_name(server: Server) -> None:
    """nbd.md 1.1: EXPORT_NAME, the oldest way in; both handshake flags are offered."""
    with RawClient(server.socket) as client:
        assert client.handshake_flags == 3
        client.option(1, server.volumes[0].encode())
        size, flags = struct.unpack(">QH", client.receive(10))
        assert size == POOL_SIZE
        assert flags & 1
        client.check_usable()


def test_export_name_with_zeroes(server: Server) -> None:
    """nbd.md 1.1: a client without NO_ZEROES gets 124 zero bytes."""
    with RawClient(server.socket, flags=1) as client:
        client.option(1, server.volumes[0].encode())
        assert client.receive(134)[10:] == bytes(124)
        client.check_usable()


def test_unknown_export_name_closes(server: Server) -> None:
    """nbd.md 1.1: EXPORT_NAME has no error reply."""
    with RawClient(server.socket) as client:
        client.option(1, b"no-such-volume")
        assert client.hung_up()


@pytest.mark.parametrize("flags", [4, 0x8003, 0xFFFFFFFF])
def test_unknown_client_flags_are_dropped(server: Server, flags: int) -> None:
    """nbd.md 1.1: the server MUST drop a client that sets a flag it was not offered."""
    with RawClient(server.socket, flags=flags) as client:
        assert client.hung_up()


def test_unknown_options_stay_in_step(server: Server) -> None:
    """nbd.md 1.1: ERR_UNSUP, data skipped, and the next option is understood."""
    with RawClient(server.socket) as client:
        for number in (99, 0x7FFFFFFF, 11):
            (reply,) = client.replies(number, b"x" * 1000)
            assert reply.kind == rawnbd.REP_ERR_UNSUP
        assert client.go(server.volumes[0])[-1].kind == rawnbd.REP_ACK
        client.check_usable()


def test_option_lengths_that_lie(server: Server) -> None:
    """nbd.md 1.1, 1.7: a name longer than its option is INVALID; the session stays usable."""
    with RawClient(server.socket) as client:
        for data in (b"", b"\0\0", struct.pack(">I", 0xFFFFFFFF) + b"abc\0\0"):
            (reply,) = client.replies(rawnbd.OPT_GO, data)
            assert reply.kind == rawnbd.REP_ERR_INVALID, data
        (reply,) = client.replies(rawnbd.OPT_LIST, b"unexpected")
        assert reply.kind == rawnbd.REP_ERR_INVALID
        assert client.go(server.volumes[0])[-1].kind == rawnbd.REP_ACK


def test_absurd_option_is_hung_up(mirrored: MirroredServer) -> None:
    """nbd.md 1.7 (CVE-2017-15119): 4 GiB of option data are not read."""
    with RawClient(mirrored.socket) as client:
        client.option(99, b"x" * 4096, length=0xFFFFFFF0)
        assert client.hung_up()


def test_too_many_options_are_hung_up(mirrored: MirroredServer) -> None:
    """I6: haggling ends."""
    with RawClient(mirrored.socket) as client, pytest.raises((EOFError, OSError)):
        for _ in range(2000):
            client.replies(99)
        pytest.fail("2000 options were answered")


def test_long_error_message(server: Server) -> None:
    """nbd.md 1.7 (CVE-2020-10761): a name of 4096 bytes is refused without repeating it all."""
    with RawClient(server.socket) as client:
        (reply,) = client.go("n" * 4096)
        assert reply.kind >= 2**31
        assert len(reply.data) <= 4096
        assert client.go(server.volumes[0])[-1].kind == rawnbd.REP_ACK


def test_bad_request_magic_hangs_up(server: Server) -> None:
    """nbd.md 1.2: out of step is out."""
    with RawClient(server.socket) as client:
        client.go(server.volumes[0])
        client.send(b"\x25\x60\x95\x14" + bytes(24))
        assert client.hung_up()


@pytest.mark.parametrize("command", [9, 77, 0xFFFF])
def test_unknown_command(server: Server, command: int) -> None:
    """nbd.md 1.2: EINVAL, and the session goes on."""
    with RawClient(server.socket) as client:
        client.go(server.volumes[0])
        assert client.ask(command, 0, 0) == rawnbd.EINVAL
        client.check_usable()


def test_refused_write_swallows_its_payload(server: Server) -> None:
    """nbd.md 1.2: a write beyond the end is ENOSPC, its payload is skipped, all stays in step."""
    with RawClient(server.socket) as client:
        client.go(server.volumes[0])
        for length in (1, 4096, 3 * MIB):
            error = client.ask(
                rawnbd.WRITE, POOL_SIZE, length, payload=b"\x25\x60\x95\x13" * 9 * 0 + bytes(length)
            )
            assert error == rawnbd.ENOSPC
            client.check_usable()


def test_write_with_bad_flags_swallows_its_payload(mirrored: MirroredServer) -> None:
    """nbd.md 1.2: the same for a flag that does not belong."""
    name = mirrored.fresh()
    with RawClient(mirrored.socket) as client:
        client.go(name)
        error = client.ask(rawnbd.WRITE, 0, 4096, rawnbd.DF, payload=b"x" * 4096)
        assert error == rawnbd.EINVAL
        client.check_usable()
        assert connect(mirrored.uri(name)).pread(4096, 0) == bytes(4096)


def test_read_that_is_too_large(server: Server) -> None:
    """nbd.md 1.2: a reply nobody wants to pay for is refused; the session goes on."""
    with RawClient(server.socket) as client:
        client.go(server.volumes[0])
        cookie = client.request(rawnbd.READ, 0, 0xFFFFFFFF)
        echoed, error, _ = client.answer()
        assert echoed == cookie
        assert error in (rawnbd.EINVAL, rawnbd.EOVERFLOW, 12)
        client.check_usable()


def test_absurd_write_is_hung_up_on(mirrored: MirroredServer) -> None:
    """nbd.md 1.2, I6: 4 GiB announced: the server neither buffers nor waits for them."""
    with RawClient(mirrored.socket) as client:
        client.go(mirrored.volumes[0])
        client.request(rawnbd.WRITE, 0, 0xFFFFFFFF)
        assert client.hung_up()


def test_foreign_testers_size_is_taken(mirrored: MirroredServer) -> None:
    """nbd.md 1.4: requests of 47.6 MiB come in practice: up to 64 MiB is taken or refused well."""
    with RawClient(mirrored.socket) as client:
        client.go(mirrored.volumes[0])
        length = 47 * MIB
        error = client.ask(rawnbd.WRITE, 0, length, payload=bytes(length))
        assert error == rawnbd.ENOSPC, "the volume is smaller than that"
        client.check_usable()


def test_hang_up_with_requests_in_flight(server: Server) -> None:
    """nbd.md 1.8.1: the client dies with 200 requests in flight, again and again."""
    name = server.fresh()
    for _ in range(20):
        # Nobody reads the replies: sending stops where the server stops taking requests.
        with RawClient(server.socket, timeout=0.5) as client, contextlib.suppress(TimeoutError):
            client.go(name)
            for number in range(100):
                client.request(rawnbd.READ, number * 65536, 65536)
                client.request(rawnbd.WRITE, number * 4096, 4096, payload=pattern(4096, number))
    assert len(connect(server.uri(name)).pread(4096, 0)) == 4096


def test_hang_up_in_the_middle_of_a_write(server: Server) -> None:
    """A2: half a payload is no write."""
    name = server.fresh()
    before = pattern(8192, 1)
    connect(server.uri(name)).pwrite(before, 0)
    with RawClient(server.socket) as client:
        client.go(name)
        client.request(rawnbd.WRITE, 0, 8192, payload=b"x" * 5000)
    assert connect(server.uri(name)).pread(8192, 0) == before


def test_disconnect_finishes_what_is_in_flight(server: Server) -> None:
    """nbd.md 1.2: DISC MUST handle all outstanding requests; no reply to DISC itself."""
    name = server.fresh()
    with RawClient(server.socket) as client:
        client.go(name)
        cookies = [
            client.request(rawnbd.WRITE, n * 4096, 4096, payload=pattern(4096, n))
            for n in range(100)
        ]
        client.request(rawnbd.DISC, 0, 0)
        answered = [client.answer() for _ in cookies]
        assert sorted(cookie for cookie, _, _ in answered) == cookies
        assert all(error == 0 for _, error, _ in answered)
        assert client.hung_up()
    handle = connect(server.uri(name))
    assert all(handle.pread(4096, n * 4096) == pattern(4096, n) for n in range(100))


def test_one_byte_at_a_time(server: Server) -> None:
    """A2: the protocol core takes any split of the stream."""
    name = server.fresh()
    with RawClient(server.socket) as client:
        client.go(name)
        header = struct.pack(">IHHQQI", 0x25609513, 0, rawnbd.WRITE, 7, 4096, 16)
        for byte in header + b"sixteen bytes!!!":
            client.send(bytes([byte]))
        assert client.answer()[:2] == (7, 0)
    assert connect(server.uri(name)).pread(16, 4096) == b"sixteen bytes!!!"


def test_a_client_that_does_not_read_costs_bounded_memory(mirrored: MirroredServer) -> None:
    """nbd.md 1.2, I6: 4 GiB of replies asked for and never read."""
    process = mirrored.cluster.primary.daemon
    name = mirrored.fresh()
    connect(mirrored.uri(name)).pwrite(pattern(16 * MIB, 1), 0)
    before = _rss(process.pid)
    with RawClient(mirrored.socket, timeout=2.0) as client:
        client.go(name)
        with contextlib.suppress(TimeoutError):
            for _ in range(256):
                client.request(rawnbd.READ, 0, 16 * MIB)
        assert connect(mirrored.uri(name)).pread(512, 0) == pattern(16 * MIB, 1)[:512]
        assert _rss(process.pid) - before < 200 * MIB


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_silent_clients_are_dropped(native: MirroredServer) -> None:
    """nbd.md 1.4, 1.7 (CVE-2024-7409): the handshake has a deadline of 10 s."""
    clients = [RawClient(native.socket, timeout=25) for _ in range(10)]
    try:
        assert connect(native.uri(native.volumes[0])).get_size() == POOL_SIZE
        assert all(client.hung_up() for client in clients)
    finally:
        for client in clients:
            client.socket.close()


def test_connection_flood(mirrored: MirroredServer) -> None:
    """I6: connections are limited; when they are gone, clients are served again."""
    clients = []
    with contextlib.suppress(EOFError, OSError):
        for _ in range(200):
            clients.append(RawClient(mirrored.socket, timeout=5))
    status = mirrored.cluster.primary.status()
    limit = status["limits"]["connections_max"]
    if mirrored.cluster.frontend == "native":  # the oldest make room for the newest
        assert status["connections"]["nbd"]["open"] <= status["limits"]["strangers_max"] <= limit
        assert clients[0].hung_up()
    else:
        assert len(clients) <= limit
    for client in clients:
        client.socket.close()

    def served() -> bool:
        try:
            return bool(connect(mirrored.uri(mirrored.volumes[0])).get_size() == POOL_SIZE)
        except nbd_error():
            return False

    wait_until("clients are served again", served)
