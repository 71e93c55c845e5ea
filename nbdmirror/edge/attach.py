"""``attach`` and ``detach``: a volume as ``/dev/nbdN`` that waits over a restart of the daemon.

Owns the watcher (X7): it hands connected sockets to the kernel, and when the kernel calls one
dead, it makes a new connection and puts it in the place of the old one. Meanwhile the kernel holds
requests back instead of failing them, for up to the dead-connection timeout. The data path never
comes through here. Called by the CLI.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nbdmirror.codec.nbdclient import ClientHandshake, Export
from nbdmirror.edge.journal import JOURNAL
from nbdmirror.edge.nbdkernel import NbdKernel, identifier_of
from nbdmirror.edge.notify import notify
from nbdmirror.errors import FormatError, NbdmirrorError, Refused, UsageError

PORT = 10809
CONNECTIONS_MAX = 64
HANDSHAKE_S = 10.0
RETRY_MIN_S = 0.1
RETRY_MAX_S = 2.0
# The kernel says when a link dies, but not when somebody else detaches the device.
LOOK_S = 2.0
# A server that is gone without a word is found out after 25 s of silence.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))

Tell = Callable[[dict[str, object], str], None]
"""Says what happened: as data for programs, as text for people."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What an NBD URI names: an export behind a unix socket or a TCP port."""

    uri: str
    export: str
    path: str | None = None
    host: str = "localhost"
    port: int = PORT

    def open(self) -> socket.socket:
        """A connection; OSError, within ``HANDSHAKE_S``."""
        if self.path is not None:
            opened = socket.socket(socket.AF_UNIX)
            opened.settimeout(HANDSHAKE_S)
            try:
                opened.connect(self.path)
            except OSError:
                opened.close()
                raise
            return opened
        opened = socket.create_connection((self.host, self.port), HANDSHAKE_S)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            opened.setsockopt(socket.IPPROTO_TCP, option, value)
        return opened


def parse_uri(uri: str) -> Endpoint:
    """``nbd://HOST[:PORT]/EXPORT`` or ``nbd+unix:///EXPORT?socket=PATH``; UsageError otherwise."""
    forms = "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
    try:
        parts = urllib.parse.urlsplit(uri)
        host, port = parts.hostname, parts.port
        query = urllib.parse.parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise UsageError(f"{uri!r} is no NBD URI: {error}", hint=forms) from None
    export = urllib.parse.unquote(parts.path.removeprefix("/"))
    paths = query.get("socket", [])
    if parts.scheme == "nbd" and host and not query:
        return Endpoint(uri, export, host=host, port=PORT if port is None else port)
    if parts.scheme == "nbd+unix" and not parts.netloc and len(paths) == 1 == len(query):
        return Endpoint(uri, export, path=paths[0])
    if parts.scheme in ("nbds", "nbds+unix"):
        raise UsageError(f"{uri}: the kernel does not speak TLS by itself", hint=forms)
    raise UsageError(f"{uri!r} is no NBD URI", hint=forms)


def parse_device(device: str) -> int:
    """The N of ``/dev/nbdN``; UsageError for anything else."""
    match = re.fullmatch(r"(?:/dev/)?nbd(\d{1,6})", device)
    if match is None:
        raise UsageError(f"{device!r} is no NBD device: write /dev/nbdN")
    return int(match[1])


def shake_hands(endpoint: Endpoint) -> tuple[socket.socket, Export]:
    """A connection ready for its first request. OSError or NbdmirrorError if it cannot be had."""
    connection = endpoint.open()
    try:
        end = time.monotonic() + HANDSHAKE_S
        handshake = ClientHandshake(endpoint.export)
        while handshake.export is None:
            connection.settimeout(max(end - time.monotonic(), 0.001))
            data = connection.recv(4096)
            if not data:
                raise FormatError("the NBD server hung up in the handshake")
            if answer := handshake.receive(data):
                connection.sendall(answer)
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection, handshake.export


class Watcher:
    """Keeps the connections of one device alive until it is detached or ``stop`` is called."""

    def __init__(self, kernel: NbdKernel, endpoint: Endpoint, index: int, connections: int) -> None:
        self._kernel = kernel
        self._endpoint = endpoint
        self._index = index
        self._connections = connections
        self._size = device_size(index)
        self._wake_out, self._wake_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._dead = 0
        self._delay = RETRY_MIN_S
        self._said = ""

    @property
    def device(self) -> str:
        """The device's path."""
        return f"/dev/nbd{self._index}"

    def stop(self, *_signal: object) -> None:
        """Makes ``watch`` return. Fit for a signal handler."""
        with contextlib.suppress(OSError):
            os.write(self._wake_in, b"x")

    def watch(self) -> bool:
        """Returns True when the device was detached, False when told to stop."""
        while True:
            wait = self._delay if self._dead else LOOK_S
            events = self._kernel.fileno()
            ready, _, _ = select.select([events, self._wake_out], [], [], wait)
            if self._wake_out in ready:
                return False
            if events in ready:
                self._count_dead()
            elif not self._kernel.connected(self._index):
                return True
            if self._dead and not self._revive():
                return True

    def adopt(self) -> None:
        """Takes over a device whose watcher ended: what died meanwhile is not known.

        The kernel drops a connection that it has no place for."""
        self._dead = self._connections

    def _count_dead(self) -> None:
        died = self._kernel.dead_links(self._index)
        self._dead += self._connections if died is None else died
        if died:
            self._say(f"{died} of the connections died; reconnecting")

    def _revive(self) -> bool:
        """Replaces what is dead as far as that works now; False if the device is gone."""
        try:
            while self._dead:
                connection, export = shake_hands(self._endpoint)
                with connection:
                    self._check(export)
                    self._kernel.replace(self._index, connection, self._endpoint.uri)
                self._dead -= 1
        except (OSError, NbdmirrorError) as error:
            if isinstance(error, OSError) and error.errno == errno.EINVAL:
                return self._kernel.connected(self._index)
            self._delay = min(self._delay * 2, RETRY_MAX_S)
            self._say(f"cannot reconnect to {self._endpoint.uri} yet: {error}")
            return True
        self._delay = RETRY_MIN_S
        self._say("connected")
        return True

    def _check(self, export: Export) -> None:
        if export.size < self._size:
            raise NbdmirrorError(
                f"the export is smaller than it was: {export.size} bytes, not {self._size}"
            )

    def _say(self, text: str) -> None:
        """A line for the log, unless it is the last one again."""
        if text != self._said:
            self._said = text
            JOURNAL.say(f"{self.device}: {text}")


def attach(
    uri: str,
    tell: Tell,
    device: str | None = None,
    connections: int = 4,
    dead_timeout: float = 60.0,
    timeout: float | None = None,
) -> int:
    """Attaches a volume and watches it until it is detached (exit code 0) or a signal comes.

    ``device`` None: a free one. ``dead_timeout``: how many seconds I/O waits with no connection
    before it fails. ``timeout``: seconds after which the kernel sends a request that has had no
    answer again, on another connection; so long waits, after a restart of the daemon, what was
    under way when it died (None: the kernel's 30 s). A device that is attached to the same URI
    already is taken over, so that the watcher can be restarted. UsageError, NbdmirrorError."""
    endpoint = parse_uri(uri)
    index = None if device is None else parse_device(device)
    if not 1 <= connections <= CONNECTIONS_MAX:
        raise UsageError(f"--connections {connections}: 1 to {CONNECTIONS_MAX} make sense")
    with NbdKernel() as kernel:
        adopted = index is not None and identifier_of(index) == uri
        if index is not None and adopted:
            watcher = Watcher(kernel, endpoint, index, connections)
            watcher.adopt()
        else:
            watcher = _connect(kernel, endpoint, index, connections, dead_timeout, timeout)
        with _signals(watcher):
            words = "is attached again" if adopted else "is attached"
            told = {"device": watcher.device, "uri": uri, "adopted": adopted}
            tell({**told, "state": "attached"}, f"{watcher.device} {words}: {uri}")
            notify(f"READY=1\nSTATUS={watcher.device}: {uri}")
            detached = watcher.watch()
        if detached:
            tell({**told, "state": "detached"}, f"{watcher.device}: detached")
        else:
            text = f"{watcher.device} stays attached, with nobody to reconnect it\n"
            text += f"to end it: nbdmirror detach {watcher.device}"
            tell({**told, "state": "unwatched"}, text)
    return 0


def detach(device: str, tell: Tell, *, force: bool = False) -> int:
    """Gives a device back. Refused while something uses it; NbdmirrorError if it is not attached,
    or what was written to it cannot be brought to the server. ``force``: whatever uses it, and
    whatever is lost, for a server that does not come back."""
    index = parse_device(device)
    path = f"/dev/nbd{index}"
    with NbdKernel() as kernel:
        if not kernel.connected(index):
            raise NbdmirrorError(f"{path} is not attached", hint="lsblk shows what is")
        if not force:
            _write_out(path)
        try:
            kernel.disconnect(index)
        except OSError as error:
            raise NbdmirrorError(f"{path} cannot be detached: {error.strerror}") from None
    tell({"device": path, "state": "detached"}, f"{path}: detached")
    return 0


def device_size(index: int) -> int:
    """The size of a device in bytes, 0 if it has none."""
    with open(f"/sys/block/nbd{index}/size", encoding="ascii") as file:
        return int(file.read()) * 512


def _connect(
    kernel: NbdKernel,
    endpoint: Endpoint,
    index: int | None,
    connections: int,
    dead_timeout: float,
    timeout: float | None,
) -> Watcher:
    """Makes the device, with one connection only if the server does not vouch for more."""
    with contextlib.ExitStack() as stack:
        links = []
        try:
            connection, export = shake_hands(endpoint)
            links.append(stack.enter_context(connection))
            if not export.multi_conn:
                connections = 1
            for _ in range(connections - 1):
                links.append(stack.enter_context(shake_hands(endpoint)[0]))
        except OSError as error:
            raise NbdmirrorError(
                f"nobody answers at {endpoint.uri}: {error}", hint="is the daemon running?"
            ) from None
        try:
            index = kernel.connect(
                index,
                export,
                links,
                dead_timeout=max(round(dead_timeout), 1),
                timeout=None if timeout is None else max(round(timeout), 1),
                identifier=endpoint.uri,
            )
        except OSError as error:
            raise _connect_error(index, error) from None
    return Watcher(kernel, endpoint, index, connections)


def _connect_error(index: int | None, error: OSError) -> NbdmirrorError:
    if error.errno == errno.EBUSY:
        return NbdmirrorError(
            f"/dev/nbd{index} is in use", hint="leave the device out, and a free one is taken"
        )
    name = "a device" if index is None else f"/dev/nbd{index}"
    return NbdmirrorError(f"the kernel does not attach {name}: {error.strerror}")


def _write_out(path: str) -> None:
    """Brings what the page cache holds to the server; Refused if the device is in use."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise NbdmirrorError(f"{path} cannot be opened: {error.strerror}") from None
        raise Refused(
            f"{path} is in use: mounted, swapped to, or part of another device",
            hint=f"umount {path}",
        ) from None
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise NbdmirrorError(
            f"{path}: what was written to it is not safe: {error.strerror}",
            hint=f"to give it up, and detach all the same: nbdmirror detach --force {path}",
        ) from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _signals(watcher: Watcher) -> Iterator[None]:
    """SIGTERM and SIGINT stop the watcher."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, watcher.stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
