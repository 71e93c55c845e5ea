"""A deadline, and a limit, for clients of nbdkit that have not chosen an export (4.1, fault 36).

nbdkit waits for them for ever. But it asks its plugin before the handshake and behind it, in the
thread of the connection, and tells there who the peer is: who is late, or the oldest where there
are too many, has its socket shut, which ends that thread. By TCP only: at a unix socket nobody has
an address, and whom its mode lets in, the host's owner has let in.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from nbdmirror.config import Limits
from nbdmirror.engine.admission import counted_as

Peer = tuple[str, int]
"""Address and port, as ``getpeername`` has them."""


class Strangers:
    """Those of one nbdkit; called by its threads and by the loop's."""

    def __init__(
        self,
        limits: Limits,
        clients: Callable[[], Iterator[socket.socket]],
        refused: Callable[[str, str], None],
    ) -> None:
        """``clients``: the sockets of all connections; ``refused`` is told the address, and why."""
        self._limits = limits
        self._clients = clients
        self._refused = refused
        self._since: dict[Peer, float] = {}
        """When each came, the oldest first. Some may have gone by themselves since."""
        self._lock = threading.Lock()

    def came(self, peer: Peer) -> None:
        """A connection has begun, or has left the export that it had chosen: the oldest makes room
        for it, where there are too many, or too many from one address."""
        limits = self._limits
        with self._lock:
            self._since.pop(peer, None)
            same = self._from(peer[0])
            many = len(self._since) >= limits.strangers_max
            if many or len(same) >= limits.strangers_per_address_max:
                self._prune()
                same = self._from(peer[0])
            if len(same) >= limits.strangers_per_address_max:
                self._end([same[0]], "its place was needed")
            elif len(self._since) >= limits.strangers_max:
                self._end([next(iter(self._since))], "its place was needed")
            self._since[peer] = time.monotonic()

    def known(self, peer: Peer) -> None:
        """It has chosen an export."""
        with self._lock:
            self._since.pop(peer, None)

    def make_room(self, but: Peer | None) -> bool:
        """Ends the oldest but the one; False if there is none."""
        with self._lock:
            self._prune()
            others = [peer for peer in self._since if peer != but]
            self._end(others[:1], "its place was needed")
            return bool(others)

    def end_late(self) -> None:
        """Ends those whose time is over."""
        seconds = self._limits.handshake_seconds
        with self._lock:
            began = time.monotonic() - seconds
            late = [peer for peer, since in self._since.items() if since <= began]
            self._end(late, f"too slow: no export was chosen within {seconds:g} s")

    def _from(self, address: str) -> list[Peer]:
        counted = counted_as(address)
        return [peer for peer in self._since if counted_as(peer[0]) == counted]

    def _end(self, peers: list[Peer], why: str) -> None:
        if not peers:
            return
        for peer, sock in self._sockets():
            if peer in peers:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                self._refused(peer[0], why)
        for peer in peers:
            del self._since[peer]

    def _prune(self) -> None:
        """Forgets those who have gone."""
        there = {peer for peer, _ in self._sockets()}
        self._since = {peer: at for peer, at in self._since.items() if peer in there}

    def _sockets(self) -> Iterator[tuple[Peer, socket.socket]]:
        for sock in self._clients():
            with contextlib.suppress(OSError):  # it has gone
                name = sock.getpeername()
                if isinstance(name, tuple):
                    yield (name[0].partition("%")[0], name[1]), sock


def peer_of(sockaddr: bytes) -> Peer | None:
    """The peer that a ``struct sockaddr`` names; None if it has no address."""
    if len(sockaddr) < 16:
        return None
    family = int.from_bytes(sockaddr[:2], "little")
    port = int.from_bytes(sockaddr[2:4], "big")
    if family == socket.AF_INET:
        return socket.inet_ntop(family, sockaddr[4:8]), port
    if family == socket.AF_INET6 and len(sockaddr) >= 24:
        return socket.inet_ntop(family, sockaddr[8:24]), port
    return None
