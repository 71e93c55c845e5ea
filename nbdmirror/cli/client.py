"""A blocking client of the admin socket, and how a command finds the socket.

Owns the connection of one command. Knows no method; what the daemon refuses is raised again here
as the same exception. Called by ``cli.online``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from nbdmirror.codec.admin import (
    Json,
    LineFramer,
    Notification,
    Reply,
    encode_request,
    parse_reply,
    raise_error,
)
from nbdmirror.configfile import load
from nbdmirror.errors import FormatError, NbdmirrorError, NoDaemon, UsageError

RUNTIME_DIR = "/run/nbdmirror"

ANSWER_SECONDS = 30.0
RETRY_SECONDS = 0.05
# A status of many volumes is long; the daemon's own limit is on what it takes, not on this.
REPLY_BYTES_MAX = 64 * 1024 * 1024
RECEIVE_BYTES = 64 * 1024

_START = "start it with: nbdmirror serve CONFIG"
_WHO_MAY = "be root, the daemon's user, or in the group of the socket"


def find_socket(config_path: str | None, socket_path: str | None) -> str:
    """The admin socket: as given, as the configuration says, or the only one that there is."""
    if config_path is not None and socket_path is not None:
        raise UsageError("-c and -s both say which daemon", hint="give one of them")
    if socket_path is not None:
        return socket_path
    if config_path is not None:
        return load(config_path).admin.socket
    directory = os.environ.get("NBDMIRROR_RUNTIME_DIR") or RUNTIME_DIR
    closed: list[str] = []
    paths = _sockets_under(directory, closed)
    if not paths and closed:  # who may not look must not be told that no daemon runs there
        raise NbdmirrorError(f"you may not look into {closed[0]}", hint=_WHO_MAY)
    if not paths:
        raise NoDaemon(
            f"no daemon: there is no socket under {directory}",
            hint="start one with: nbdmirror serve CONFIG; or say which with -c or -s",
        )
    if len(paths) > 1:  # one that was killed leaves its own behind
        dead, paths = paths, list(filter(_answers, paths))
        if not paths:
            raise NoDaemon(f"no daemon at any of {', '.join(dead)}", hint=_START)
    if len(paths) > 1:
        raise UsageError(
            f"there are {len(paths)} daemons: {', '.join(paths)}", hint="say which with -s or -c"
        )
    return paths[0]


def _sockets_under(directory: str, closed: list[str]) -> list[str]:
    """The sockets there; ``closed`` gets the directories that this user may not look into."""

    def not_looked_into(error: OSError) -> None:
        if isinstance(error, PermissionError):
            closed.append(error.filename)

    paths = [
        os.path.join(parent, name)
        for parent, _, names in os.walk(directory, onerror=not_looked_into)
        for name in names
        if name.endswith(".sock")
    ]
    return sorted(path for path in paths if stat.S_ISSOCK(os.lstat(path).st_mode))


def _answers(path: str) -> bool:
    """Whether a daemon may be there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
        return connection.connect_ex(path) != errno.ECONNREFUSED


class AdminClient:
    """One connection to a daemon. NoDaemon if nobody answers."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._framer = LineFramer(REPLY_BYTES_MAX)
        self._lines: list[bytes] = []
        self._next_id = 1
        self._socket = self._connect()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def call(
        self,
        method: str,
        params: Json | None = None,
        *,
        answer_seconds: float | None = ANSWER_SECONDS,
    ) -> Any:
        """The result of a method; raises what the daemon raised. ``answer_seconds``: of silence
        after which it is given up; ``None``: it may take as long as a disk does."""
        request_id = self._send(method, params or {})
        while True:
            message = self._receive(answer_seconds)
            if isinstance(message, Reply) and message.id in (request_id, None):
                return _result(message)

    def events(self, since: int, follow: bool) -> Iterator[Json]:
        """The events after a cursor, and then, if ``follow``, each as it happens."""
        self._send("events", {"since": since, "follow": follow})
        seconds: float | None = ANSWER_SECONDS
        while True:
            message = self._receive(seconds)
            if isinstance(message, Notification):
                yield message.params
                continue
            _result(message)
            if not follow:
                return
            seconds = None

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(ANSWER_SECONDS)
        end = time.monotonic() + ANSWER_SECONDS
        try:
            # Its queue is full; a socket with a timeout does not wait for room in it by itself.
            while (error := connection.connect_ex(self.path)) == errno.EAGAIN:
                if time.monotonic() > end:
                    connection.close()
                    raise NoDaemon(
                        f"the daemon at {self.path} has taken no connection for "
                        f"{ANSWER_SECONDS:g} s",
                        hint="it is very busy, or hangs: see its journal",
                    )
                time.sleep(RETRY_SECONDS)
            if error:
                raise OSError(error, os.strerror(error))
        except PermissionError:
            connection.close()
            raise NbdmirrorError(f"you may not use {self.path}", hint=_WHO_MAY) from None
        except OSError as error:
            connection.close()
            raise NoDaemon(
                f"no daemon at {self.path}: {error.strerror or error}", hint=_START
            ) from None
        return connection

    def _send(self, method: str, params: Json) -> int:
        request_id, self._next_id = self._next_id, self._next_id + 1
        # If it fails, what the daemon said before it closed may still be there to read.
        with contextlib.suppress(OSError):
            self._socket.sendall(encode_request(method, params, request_id))
        return request_id

    def _receive(self, seconds: float | None) -> Reply | Notification:
        self._socket.settimeout(seconds)
        while not self._lines:
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except TimeoutError:
                raise NoDaemon(
                    f"the daemon at {self.path} has not answered for {seconds:g} s",
                    hint="it may still do what it was asked: see nbdmirror status",
                ) from None
            except OSError:
                data = b""
            if not data:
                raise NoDaemon(f"the daemon at {self.path} closed the connection")
            self._lines = self._framer.feed(data)
        line = self._lines.pop(0)
        try:
            return parse_reply(line)
        except FormatError as error:
            raise NbdmirrorError(f"{self.path}: {error.message}") from None


def _result(reply: Reply) -> Any:
    if reply.error is not None:
        raise_error(reply.error)
    return reply.result
