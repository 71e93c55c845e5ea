"""The kernel's NBD driver, spoken to over generic netlink.

Owns the two netlink sockets: one for commands, one for the driver's events. Knows the driver's
commands, not what they are used for. Called by ``edge.attach``. Needs root and the nbd module.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from nbdmirror.codec import netlink
from nbdmirror.codec.nbdclient import Export
from nbdmirror.codec.netlink import Attribute, Command, Message
from nbdmirror.errors import NbdmirrorError

NETLINK_GENERIC: Final = 16
SOL_NETLINK: Final = 270
NETLINK_ADD_MEMBERSHIP: Final = 1
RECEIVE_BYTES: Final = 64 << 10
ANSWER_S: Final = 30.0
# What nbd-client uses: a disk formatted under the one can be read under the other.
BLOCK_SIZE_MIN: Final = 512


class NbdKernel:
    """A context manager. Commands raise OSError with the driver's errno."""

    def __init__(self) -> None:
        """NbdmirrorError without root or without the module."""
        if os.geteuid() != 0:
            raise NbdmirrorError(
                "only root may attach and detach NBD devices", hint="run it with sudo"
            )
        self._sequence = 0
        self._commands = _netlink_socket()
        self._events = _netlink_socket()
        self._commands.settimeout(ANSWER_S)
        self._events.setblocking(False)
        try:
            reply = self._call(netlink.CONTROLLER, netlink.GET_FAMILY, netlink.family_request())
        except FileNotFoundError:
            self.close()
            raise NbdmirrorError(
                "the kernel's NBD driver is not loaded", hint="load it with: modprobe nbd"
            ) from None
        family = netlink.family(reply)
        self._family = family.id
        self._events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, family.multicast_group)

    def __enter__(self) -> NbdKernel:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the sockets; devices stay as they are."""
        self._commands.close()
        self._events.close()

    def fileno(self) -> int:
        """Readable when ``dead_links`` has something to say."""
        return self._events.fileno()

    def connect(
        self,
        index: int | None,
        export: Export,
        connections: Sequence[socket.socket],
        *,
        dead_timeout: int,
        timeout: int | None,
        identifier: str,
    ) -> int:
        """Makes a device of these connections and returns its index.

        ``index`` None: the first free device. ``dead_timeout``: how many seconds I/O waits when
        all connections are dead. ``timeout``: seconds until a request without an answer makes its
        connection a dead one (None: the kernel's default). ``identifier`` is what sysfs shows as
        ``backend`` from Linux 5.14 on. OSError EBUSY: the device is in use."""
        block_size = max(export.block_size, BLOCK_SIZE_MIN)
        payload = [
            netlink.u64(Attribute.SIZE_BYTES, export.size // block_size * block_size),
            netlink.u64(Attribute.BLOCK_SIZE_BYTES, block_size),
            netlink.u64(Attribute.SERVER_FLAGS, export.flags),
            netlink.u64(Attribute.DEAD_CONN_TIMEOUT, dead_timeout),
            netlink.text(Attribute.BACKEND_IDENTIFIER, identifier),
            netlink.sockets([connection.fileno() for connection in connections]),
        ]
        if index is not None:
            payload.append(netlink.u32(Attribute.INDEX, index))
        if timeout is not None:
            payload.append(netlink.u64(Attribute.TIMEOUT, timeout))
        reply = self._call(self._family, Command.CONNECT, b"".join(payload))
        return netlink.number(reply.get(Attribute.INDEX))

    def replace(self, index: int, connection: socket.socket, identifier: str) -> None:
        """Puts a fresh connection in the place of a dead one; requests that waited go on.

        If no connection is dead, nothing happens. OSError EINVAL: the device was disconnected."""
        payload = [
            netlink.u32(Attribute.INDEX, index),
            netlink.text(Attribute.BACKEND_IDENTIFIER, identifier),
            netlink.sockets([connection.fileno()]),
        ]
        self._call(self._family, Command.RECONFIGURE, b"".join(payload))

    def disconnect(self, index: int) -> None:
        """Ends the device. OSError EINVAL: it is not connected."""
        self._call(self._family, Command.DISCONNECT, netlink.u32(Attribute.INDEX, index))

    def connected(self, index: int) -> bool:
        """Whether the device is connected, with links alive or dead."""
        reply = self._call(self._family, Command.STATUS, netlink.u32(Attribute.INDEX, index))
        return netlink.connected(reply, index)

    def dead_links(self, index: int) -> int | None:
        """How many connections of the device died since the last call; None: events were lost."""
        count = 0
        while True:
            try:
                data = self._events.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return count
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                return None
            for message in netlink.messages(data):
                if message.command == Command.LINK_DEAD:
                    count += netlink.number(message.get(Attribute.INDEX)) == index

    def _call(self, family: int, command: int, payload: bytes) -> Message:
        """Sends a command; returns its answer once the kernel has acknowledged it."""
        self._sequence += 1
        self._commands.send(netlink.request(family, command, self._sequence, payload))
        answer = Message(self._sequence)
        while True:
            for message in netlink.messages(self._commands.recv(RECEIVE_BYTES)):
                if message.sequence != self._sequence:
                    continue
                if message.errno is None:
                    answer = message
                elif message.errno:
                    raise OSError(message.errno, os.strerror(message.errno))
                else:
                    return answer


def _netlink_socket() -> socket.socket:
    try:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        opened.bind((0, 0))
    except OSError as error:
        raise NbdmirrorError(f"generic netlink cannot be used here: {error}") from None
    return opened


def identifier_of(index: int) -> str | None:
    """The identifier that the device was connected with, or None if it is not connected."""
    try:
        with open(f"/sys/block/nbd{index}/backend", encoding="utf-8") as file:
            return file.read().rstrip("\n")
    except (OSError, UnicodeDecodeError):
        return None
