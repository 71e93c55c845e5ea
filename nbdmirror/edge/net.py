"""Stream connections over Linux: ``ports.Network`` on any asyncio event loop (uvloop included).

Owns how addresses are read, socket options, and the life of a unix socket's name. Never reads or
writes a byte of a connection: that is between the loop and the protocol. Write buffer limits are
the loop's (64 KiB); a protocol that wants others sets them in ``connection_made``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass

from nbdmirror.errors import ConfigError
from nbdmirror.ports import Listener

BACKLOG = 128
UNIX_MODE = 0o660
UNIX_PATH_BYTES_MAX = 107
TCP_OPTIONS = (  # a peer that is gone without a word is found out after 25 s of silence
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)

ProtocolFactory = Callable[[], asyncio.BufferedProtocol]


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """``tcp:HOST:PORT``; an IPv6 host stands in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """``unix:PATH``."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


def parse_address(text: str) -> TcpAddress | UnixAddress:
    """Reads an address as people write it; ConfigError says what would be right."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest.startswith("/"):
        if len(os.fsencode(rest)) > UNIX_PATH_BYTES_MAX:
            raise ConfigError(f"{text}: the path is longer than {UNIX_PATH_BYTES_MAX} bytes")
        return UnixAddress(rest)
    if kind == "tcp":
        host, colon, port = rest.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            colon = ""
        if host and colon and port.isascii() and port.isdigit() and int(port) < 1 << 16:
            return TcpAddress(host, int(port))
    raise ConfigError(f"{text!r} is no address: write tcp:HOST:PORT, tcp:[V6]:PORT or unix:/PATH")


class LinuxNetwork:
    """``ports.Network`` over the running event loop's sockets."""

    async def connect(
        self, address: str, protocol: ProtocolFactory, tls: ssl.SSLContext | None = None
    ) -> asyncio.Transport:
        """Opens a connection; OSError names the address. Has no deadline of its own.

        With ``tls`` it is one of TLS from its first byte; ssl.SSLError if that fails."""
        where = parse_address(address)
        loop = asyncio.get_running_loop()
        transport: asyncio.Transport
        try:
            if isinstance(where, UnixAddress):
                transport, _ = await loop.create_unix_connection(
                    protocol, where.path, ssl=tls, server_hostname=where.path if tls else None
                )
            else:
                transport, _ = await loop.create_connection(
                    protocol, where.host, where.port, ssl=tls
                )
        except ssl.SSLError:
            raise
        except OSError as error:
            raise _named(error, f"cannot connect to {address}") from error
        if isinstance(where, TcpAddress):
            _set_options(transport.get_extra_info("socket"))
        return transport

    async def listen(self, address: str, protocol: ProtocolFactory) -> Listener:
        """Accepts connections; OSError names the address (EADDRINUSE if somebody is there)."""
        where = parse_address(address)
        loop = asyncio.get_running_loop()
        try:
            if isinstance(where, UnixAddress):
                sock = _bind_unix(where.path)
                server = await loop.create_unix_server(protocol, sock=sock, backlog=BACKLOG)
                return _LinuxListener(address, server, where.path)
            sock = await _bind_tcp(where)
            real = TcpAddress(where.host, sock.getsockname()[1])
            server = await loop.create_server(protocol, sock=sock, backlog=BACKLOG)
            return _LinuxListener(str(real), server, None)
        except OSError as error:
            raise _named(error, f"cannot listen at {address}") from error


async def listen_for_another(address: str) -> tuple[socket.socket, Listener]:
    """A listening socket, blocking, whose connections another process accepts; closing the
    listener closes it here and removes its name. OSError as ``LinuxNetwork.listen``."""
    where = parse_address(address)
    try:
        if isinstance(where, UnixAddress):
            sock = _bind_unix(where.path)
        else:
            sock = await _bind_tcp(where)
        sock.listen(BACKLOG)
    except OSError as error:
        raise _named(error, f"cannot listen at {address}") from error
    sock.setblocking(True)
    path = where.path if isinstance(where, UnixAddress) else None
    return sock, _LinuxListener(address, sock, path)


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


async def _bind_tcp(where: TcpAddress) -> socket.socket:
    """A bound TCP socket; accepted connections inherit its options (Linux)."""
    found = await asyncio.get_running_loop().getaddrinfo(
        where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, number, _, name = found[0]
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, number)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        _set_options(sock)
        sock.bind(name)
    except OSError:
        sock.close()
        raise
    return sock


def _bind_unix(path: str) -> socket.socket:
    """A bound unix socket with mode 0660; takes over a name that nobody answers at."""
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(sock.fileno(), UNIX_MODE)  # holds from bind on: no moment with a wider mode
        sock.bind(path)
        os.chmod(path, UNIX_MODE)  # and without the umask
    except OSError:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, f"{path} is there and is no socket: remove it first")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody is there
    raise OSError(errno.EADDRINUSE, "another process answers there")


def _named(error: OSError, what: str) -> OSError:
    """The same error with what was tried; an errno always, and of the right subclass."""
    number = error.errno
    if isinstance(error, socket.gaierror) or number is None:
        number = errno.EHOSTUNREACH
    return OSError(number, f"{what}: {error.strerror or error}")
