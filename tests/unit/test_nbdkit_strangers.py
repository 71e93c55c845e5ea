"""Who may wait at nbdkit's door, and for how long (4.1, fault 36), with real sockets."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from nbdmirror.config import Limits
from nbdmirror.edge.nbdkit_strangers import Peer, Strangers, peer_of


class Door:
    """A listener, the connections that it accepted, and what was refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.stack = contextlib.ExitStack()
        self.listener = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.accepted: dict[Peer, socket.socket] = {}
        self.clients: dict[Peer, socket.socket] = {}
        self.refused: list[tuple[str, str]] = []
        found = Limits(**limits)  # type: ignore[arg-type]
        self.strangers = Strangers(
            found, lambda: iter(self.accepted.values()), lambda *told: self.refused.append(told)
        )

    def connect(self, source: str = "127.0.0.1") -> Peer:
        """One more, from that address."""
        client = self.stack.enter_context(socket.socket())
        client.bind((source, 0))
        client.connect(self.listener.getsockname())
        sock, peer = self.listener.accept()
        self.stack.enter_context(sock)
        self.accepted[peer], self.clients[peer] = sock, client
        self.strangers.came(peer)
        return (str(peer[0]), int(peer[1]))

    def leave(self, peer: Peer) -> None:
        """It goes by itself."""
        self.accepted.pop(peer).close()

    def ended(self, peer: Peer) -> bool:
        """Whether it was hung up on."""
        self.clients[peer].setblocking(False)
        try:
            return self.clients[peer].recv(1) == b""
        except BlockingIOError:
            return False


def test_who_is_late_is_ended_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is for those who have chosen no export; who only asked has it anew."""
    door = Door(monkeypatch, handshake_seconds=10)
    with door.stack:
        silent, served, asking = door.connect(), door.connect(), door.connect()
        door.strangers.known(served)
        door.strangers.known(asking)
        door.now = 6.0
        door.strangers.came(asking)
        gone = door.connect()
        door.leave(gone)
        door.strangers.end_late()
        assert not door.refused
        door.now = 10.0
        door.strangers.end_late()
        assert door.ended(silent) and not door.ended(served) and not door.ended(asking)
        assert door.refused == [("127.0.0.1", "too slow: no export was chosen within 10 s")]
        door.now = 16.0
        door.strangers.end_late()
        assert door.ended(asking) and not door.ended(served) and len(door.refused) == 2


def test_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """In total, and from one address; who is known, or has gone, does not count."""
    door = Door(monkeypatch, strangers_max=4, strangers_per_address_max=2)
    with door.stack:
        known = door.connect()
        door.strangers.known(known)
        door.leave(door.connect())
        first, second = door.connect(), door.connect()
        assert not door.ended(first)
        door.connect()
        assert door.ended(first) and not door.ended(second), "one too many from one address"
        third, fourth = door.connect("127.0.0.2"), door.connect("127.0.0.2")
        assert not door.ended(second)
        door.connect("127.0.0.3")
        assert door.ended(second) and not door.ended(third), "one too many in all"
        assert not door.ended(fourth) and not door.ended(known)


def test_room_for_one_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all places taken a stranger goes, and not the one that comes."""
    door = Door(monkeypatch)
    with door.stack:
        old, new = door.connect(), door.connect()
        assert door.strangers.make_room(new) and door.ended(old)
        door.leave(old)
        assert not door.strangers.make_room(new) and not door.ended(new)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_peer_has_the_name_that_its_socket_has(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    raw = family.to_bytes(2, "little") + (10809).to_bytes(2, "big")
    packed = socket.inet_pton(family, host)
    raw += packed + bytes(8) if family == socket.AF_INET else bytes(4) + packed + bytes(4)
    assert peer_of(raw) == (host, 10809)
    assert peer_of(raw[:12]) is None


def test_nobody_has_a_name_at_a_unix_socket() -> None:
    assert peer_of(socket.AF_UNIX.to_bytes(2, "little")) is None
    assert peer_of(socket.AF_UNIX.to_bytes(2, "little") + bytes(108)) is None
