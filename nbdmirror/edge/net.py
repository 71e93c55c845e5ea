"""Stream connections over Linux: ``ports.Network`` on any asyncio event loop (uvloop included).

Owns connections, and the end of a unix socket's name; the sockets that listen come from
``sockets``. Never reads or writes a byte of a connection: that is between the loop and the
protocol. Write buffer limits are the loop's (64 KiB); a protocol that wants others sets them in
``connection_made``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any

from nbdmirror.edge.hangups import Hangups
from nbdmirror.edge.sockets import TCP_OPTIONS, Sockets, TcpAddress, UnixAddress, parse_address
from nbdmirror.edge.tls import SHUTDOWN_SECONDS
from nbdmirror.ports import Listener

BACKLOG = 128

ProtocolFactory = Callable[[], asyncio.BufferedProtocol]


class LinuxNetwork:
    """``ports.Network`` over the running event loop's sockets."""

    def __init__(self, sockets: Sockets | None = None) -> None:
        """``sockets``: where those that listen come from; None: all are made here."""
        self._sockets = sockets or Sockets()
        self.watch = Hangups().watch

    async def connect(
        self, address: str, protocol: ProtocolFactory, tls: ssl.SSLContext | None = None
    ) -> asyncio.Transport:
        """Opens a connection; OSError names the address. Has no deadline of its own.

        With ``tls`` it is one of TLS from its first byte: ssl.SSLError if that fails,
        ConnectionResetError if the peer hangs up meanwhile."""
        where = parse_address(address)
        loop = asyncio.get_running_loop()
        transport: asyncio.Transport
        secured: dict[str, Any] = {}
        if tls is not None:
            secured = {"ssl": tls, "ssl_shutdown_timeout": SHUTDOWN_SECONDS}
        try:
            if isinstance(where, UnixAddress):
                transport, _ = await loop.create_unix_connection(
                    protocol, where.path, server_hostname=where.path if tls else None, **secured
                )
            else:
                transport, _ = await loop.create_connection(
                    protocol, where.host, where.port, **secured
                )
        except OSError as error:
            hung_up = tls is not None and isinstance(error, ConnectionResetError)
            if isinstance(error, ssl.SSLError) or hung_up:
                raise
            raise _named(error, f"cannot connect to {address}") from error
        if isinstance(where, TcpAddress):
            _set_options(transport.get_extra_info("socket"))
        return transport

    async def listen(self, address: str, protocol: ProtocolFactory) -> Listener:
        """Accepts connections; OSError names the address (EADDRINUSE if somebody is there)."""
        loop = asyncio.get_running_loop()
        try:
            sock, real, path = await self._sockets.open(address)
            serve = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
            server = await serve(protocol, sock=sock, backlog=BACKLOG)
            return _LinuxListener(real, server, path)
        except OSError as error:
            raise _named(error, f"cannot listen at {address}") from error

    async def listening(self, address: str) -> tuple[socket.socket, Listener]:
        """A listening socket, not blocking, for somebody else to accept from; closing the listener
        closes it here and removes its name. OSError as ``listen``."""
        try:
            sock, real, path = await self._sockets.open(address)
            sock.listen(BACKLOG)
        except OSError as error:
            raise _named(error, f"cannot listen at {address}") from error
        return sock, _LinuxListener(real, sock, path)


class _LinuxListener:
    """A listening socket; removes the name of its unix socket if that is still its own."""

    def __init__(
        self, address: str, server: asyncio.AbstractServer | socket.socket, path: str | None
    ) -> None:
        self.address = address
        self._server = server
        self._path = path
        self._inode = os.stat(path).st_ino if path else None

    def close(self) -> None:
        self._server.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                if os.stat(self._path).st_ino == self._inode:
                    os.unlink(self._path)
            self._path = None


def _set_options(sock: socket.socket) -> None:
    for level, option, value in TCP_OPTIONS:
        sock.setsockopt(level, option, value)


def _named(error: OSError, what: str) -> OSError:
    """The same error with what was tried; an errno always, and of the right subclass."""
    number = error.errno
    if isinstance(error, socket.gaierror) or number is None:
        number = errno.EHOSTUNREACH
    return OSError(number, f"{what}: {error.strerror or error}")
