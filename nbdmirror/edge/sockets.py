"""Where listening sockets come from: passed by a service manager (sd_listen_fds(3)), or made here.

Owns how an address becomes a bound socket, the name of a unix socket, and what was passed. Never
accepts a connection. Used by ``net``, ``peers`` and ``nbdkit``; made once, when the daemon starts.

A passed socket serves the address that it is bound to, if the configuration names that; if not,
what its ``FileDescriptorName`` says (``NAMES``). One that is neither keeps the daemon from
starting: its clients would wait for ever.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import stat
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from nbdmirror import config as c
from nbdmirror.config import Config
from nbdmirror.errors import ConfigError

UNIX_MODE = 0o660
UNIX_PATH_BYTES_MAX = 107
TCP_OPTIONS = (  # a peer that is gone without a word is found out after 25 s of silence
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
FIRST_FD = 3
"""Where sd_listen_fds(3) begins."""
HANDED_ON = "NBDMIRROR_LISTEN_FDS"
"""Environment: what a supervisor hands on to the process with the node in it (``handed_on``)."""
NAMES = ("nbd", "admin", "replication", "metrics")
"""``FileDescriptorName=`` of a socket unit, and what such a socket is for."""


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


@dataclass(frozen=True, slots=True)
class Passed:
    """A socket that was passed. Without ``socket`` it is another process's to accept from."""

    name: str
    address: str
    socket: socket.socket | None


class Opened(NamedTuple):
    """A bound socket, not blocking, its address, and the name to remove when it is closed: that of
    a unix socket, unless it is the service manager's."""

    socket: socket.socket
    address: str
    path: str | None


class Sockets:
    """The listening sockets that this process may open."""

    def __init__(self, passed: Sequence[Passed] = ()) -> None:
        self.passed = tuple(passed)
        self._unclaimed = [one for one in passed if one.socket is not None]

    @classmethod
    def of(cls, environment: MutableMapping[str, str]) -> Sockets:
        """Takes over what was passed to this process, and what the environment says of it.

        ConfigError if one of them is no listening stream socket, or has no address."""
        handed_on = environment.pop(HANDED_ON, None)
        if handed_on is not None:
            return cls([_handed(*one) for one in json.loads(handed_on)])
        pid, count, names = (
            environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
        )
        if pid != str(os.getpid()) or not (count.isascii() and count.isdigit()):
            return cls()
        labels = dict(enumerate(names.split(":"), FIRST_FD))
        fds = range(FIRST_FD, FIRST_FD + int(count))
        return cls([_taken_over(fd, labels.get(fd, "")) for fd in fds])

    def extended(self, config: Config) -> Config:
        """The configuration, with the addresses of sockets that say by their name what they are
        for. ConfigError if that must not be so, and for a socket that is for nothing."""
        for one in self.passed:
            if _bound(one.address) in map(_bound, _addresses(config)):
                continue
            if one.name not in NAMES:
                raise ConfigError(
                    f"{config.path}: the service manager passed {one.address} (name {one.name!r}), "
                    "and no listener has that address",
                    hint=f"or let FileDescriptorName= be one of {', '.join(NAMES)}",
                )
            config = _with(config, one.name, one.address)
        return config

    async def open(self, address: str) -> Opened:
        """The socket of an address; OSError (EADDRINUSE: somebody is there)."""
        where = parse_address(address)
        if isinstance(where, UnixAddress):
            taken = self._claim(where.path)
            if taken is not None:
                return Opened(taken, address, None)
            return Opened(_bind_unix(where.path), address, where.path)
        found = await asyncio.get_running_loop().getaddrinfo(
            where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, number, _, name = found[0]
        sock = self._claim(name[:2])
        if sock is None:
            sock = _bind_tcp(family, kind, number, name)
        for level, option, value in TCP_OPTIONS:
            sock.setsockopt(level, option, value)  # accepted connections inherit them (Linux)
        return Opened(sock, str(TcpAddress(where.host, sock.getsockname()[1])), None)

    def _claim(self, bound: object) -> socket.socket | None:
        for one in self._unclaimed:
            if one.socket is not None and _bound(one.address) == bound:
                self._unclaimed.remove(one)
                one.socket.setblocking(False)
                return one.socket
        return None

    def handed_on(self, first_fd: int) -> tuple[list[int], str]:
        """For the process with the node in it: the descriptors that it is to find from
        ``first_fd`` on, and the value of ``HANDED_ON``. What is claimed here stays here."""
        places = {id(one): first_fd + n for n, one in enumerate(self._unclaimed)}
        told = [(one.name, one.address, places.get(id(one))) for one in self.passed]
        fds = [one.socket.fileno() for one in self._unclaimed if one.socket is not None]
        return fds, json.dumps(told)


def _handed(name: str, address: str, fd: int | None) -> Passed:
    if fd is None:
        return Passed(name, address, None)
    return _taken_over(fd, name)


def _taken_over(fd: int, name: str) -> Passed:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"descriptor {fd} that was passed is no socket: {error}") from None
    try:
        return Passed(name, _address_of(sock), sock)
    except ConfigError:
        sock.close()
        raise


def _address_of(sock: socket.socket) -> str:
    """Where it listens; ConfigError if it is nothing that clients could be served at."""
    kinds = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
    streams = sock.type == socket.SOCK_STREAM and sock.family in kinds
    if not streams or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ConfigError(
            f"socket {sock.fileno()} that was passed does not listen for streams",
            hint="a socket unit has ListenStream= and Accept=no",
        )
    bound = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        return str(TcpAddress(bound[0], bound[1]))
    if not isinstance(bound, str) or not bound.startswith("/"):
        raise ConfigError(f"socket {sock.fileno()} that was passed has no path: {bound!r}")
    return f"unix:{bound}"


def _addresses(config: Config) -> list[str]:
    admin, link = config.admin, config.replication
    found = [*config.nbd.listen, f"unix:{admin.socket}", admin.metrics, link.listen]
    return [address for address in found if address is not None]


def _bound(address: str) -> object:
    """What ``getsockname`` says of a socket at this address, as far as it tells it from others."""
    where = parse_address(address)
    if isinstance(where, UnixAddress):
        return where.path
    found = socket.getaddrinfo(
        where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return found[0][4][:2]


def _with(config: Config, name: str, address: str) -> Config:
    """The configuration with one listener more. The rules are those of ``configfile``."""
    nbd, link, admin = config.nbd, config.replication, config.admin
    secured = {
        "nbd": nbd.insecure or nbd.tls is not None or nbd.psk_file is not None,
        "replication": link.insecure or link.tls is not None or link.secret_file is not None,
    }
    if c.reachable(c.parse_address(address)) and not secured.get(name, False):
        raise ConfigError(
            f"{config.path}: {address}, passed as {name}, can be reached from other hosts, "
            "unencrypted and unauthenticated"
        )
    there = {"admin": admin.socket, "metrics": admin.metrics, "replication": link.listen}
    if there.get(name) is not None:
        raise ConfigError(
            f"{config.path}: {address} was passed as {name}, the configuration has {there[name]}",
            hint="let the socket unit and the configuration name the same address",
        )
    if name == "nbd":
        return replace(config, nbd=replace(nbd, listen=(*nbd.listen, address)))
    if name == "metrics":
        return replace(config, admin=replace(admin, metrics=address))
    return replace(config, replication=replace(link, listen=address))


def _bind_tcp(family: int, kind: int, number: int, name: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, number)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
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
    except OSError as error:
        sock.close()
        if isinstance(error, FileNotFoundError):
            problem = f"there is no directory {os.path.dirname(path)}: make it first"
            raise OSError(errno.ENOENT, problem) from None
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
