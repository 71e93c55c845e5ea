"""Generic netlink messages, and those of the kernel's NBD family: bytes in, values out.

Owns the layouts below (linux/netlink.h, genetlink.h, nbd-netlink.h). Opens no socket. Called by
``edge.nbdkernel``. All numbers are in the machine's own byte order.

=========  ==============================================================================
header     length 4 (with itself), type 2, flags 2, sequence 4, port 4
generic    command 1, version 1, reserved 2; then attributes
attribute  length 2 (with these 4), type 2, value, zeros up to a multiple of 4
error      type 2: number 4 (0 is the acknowledgement, else a negative errno), the request
=========  ==============================================================================
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nbdmirror.errors import FormatError

HEADER: Final = struct.Struct("=IHHII")
GENERIC: Final = struct.Struct("=BBH")
ATTRIBUTE: Final = struct.Struct("=HH")
NUMBER: Final = struct.Struct("=i")
assert (HEADER.size, GENERIC.size, ATTRIBUTE.size) == (16, 4, 4)

TYPE_ERROR: Final = 2
FLAG_REQUEST: Final = 1
FLAG_ACK: Final = 4
FLAG_NESTED: Final = 0x8000
ATTRIBUTE_TYPE_MASK: Final = 0x3FFF
VERSION: Final = 1

CONTROLLER: Final = 16
GET_FAMILY: Final = 3
FAMILY_NAME: Final = "nbd"
MULTICAST_GROUP: Final = "nbd_mc_group"


class Control(enum.IntEnum):
    """Attributes of the controller, which knows the families by name."""

    FAMILY_ID = 1
    FAMILY_NAME = 2
    MULTICAST_GROUPS = 7


class Group(enum.IntEnum):
    """Attributes of one multicast group."""

    NAME = 1
    ID = 2


class Command(enum.IntEnum):
    """Commands of the NBD family."""

    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4
    STATUS = 5


class Attribute(enum.IntEnum):
    """Attributes of the NBD family; times are in seconds."""

    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    DEVICE_LIST = 9
    BACKEND_IDENTIFIER = 10


ITEM: Final = 1
SOCKET_FD: Final = 1
DEVICE_INDEX: Final = 1
DEVICE_CONNECTED: Final = 2


@dataclass(frozen=True, slots=True)
class Message:
    """One message from the kernel: an acknowledgement or error (``errno``), or a command."""

    sequence: int
    errno: int | None = None
    command: int = 0
    attributes: tuple[tuple[int, bytes], ...] = ()

    def get(self, kind: int) -> bytes | None:
        """The value of the first attribute of that type."""
        return next((value for number, value in self.attributes if number == kind), None)


@dataclass(frozen=True, slots=True)
class Family:
    """Where the NBD family is to be found in the running kernel."""

    id: int
    multicast_group: int


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def u32(kind: int, value: int) -> bytes:
    """An attribute with a 32-bit number."""
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    """An attribute with a 64-bit number."""
    return attribute(kind, struct.pack("=Q", value))


def text(kind: int, value: str) -> bytes:
    """An attribute with a string and its final zero."""
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, parts: Sequence[bytes]) -> bytes:
    """An attribute made of attributes."""
    return attribute(kind | FLAG_NESTED, b"".join(parts))


def number(value: bytes | None) -> int:
    """An attribute's value as an unsigned number of its own size; FormatError without one."""
    if not value or len(value) > 8:
        raise FormatError(f"netlink: {value!r} is no number")
    return int.from_bytes(value, _BYTE_ORDER)


def attributes(data: bytes) -> tuple[tuple[int, bytes], ...]:
    """(type, value) of each attribute, in order; FormatError if a length does not fit."""
    found = []
    offset = 0
    while len(data) - offset >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if not ATTRIBUTE.size <= length <= len(data) - offset:
            raise FormatError(f"netlink: an attribute of {length} bytes at {offset}")
        found.append((kind & ATTRIBUTE_TYPE_MASK, data[offset + ATTRIBUTE.size : offset + length]))
        offset += length + -length % 4
    return tuple(found)


def request(family: int, command: int, sequence: int, payload: bytes) -> bytes:
    """A command to the kernel, which acknowledges it."""
    length = HEADER.size + GENERIC.size + len(payload)
    header = HEADER.pack(length, family, FLAG_REQUEST | FLAG_ACK, sequence, 0)
    return header + GENERIC.pack(command, VERSION, 0) + payload


def messages(data: bytes) -> list[Message]:
    """The messages of one receive; FormatError if a length does not fit."""
    found = []
    offset = 0
    while offset < len(data):
        if len(data) - offset < HEADER.size:
            raise FormatError(f"netlink: {len(data) - offset} bytes are no message")
        length, kind, _flags, sequence, _port = HEADER.unpack_from(data, offset)
        body = data[offset + HEADER.size : offset + length]
        least = HEADER.size + (NUMBER.size if kind == TYPE_ERROR else GENERIC.size)
        if not least <= length <= len(data) - offset:
            raise FormatError(f"netlink: a message of {length} bytes at {offset}")
        if kind == TYPE_ERROR:
            found.append(Message(sequence, errno=-NUMBER.unpack_from(body)[0]))
        else:
            command = GENERIC.unpack_from(body)[0]
            content = attributes(body[GENERIC.size :])
            found.append(Message(sequence, command=command, attributes=content))
        offset += length + -length % 4
    return found


def family_request() -> bytes:
    """The payload of GET_FAMILY for the NBD family."""
    return text(Control.FAMILY_NAME, FAMILY_NAME)


def family(reply: Message) -> Family:
    """What GET_FAMILY answered."""
    for _, entry in attributes(reply.get(Control.MULTICAST_GROUPS) or b""):
        group = dict(attributes(entry))
        if group.get(Group.NAME) == MULTICAST_GROUP.encode() + b"\0":
            return Family(number(reply.get(Control.FAMILY_ID)), number(group.get(Group.ID)))
    raise FormatError("netlink: the kernel's NBD family has no multicast group")


def sockets(descriptors: Sequence[int]) -> bytes:
    """The attribute that hands connected sockets to the kernel."""
    items = [nested(ITEM, [u32(SOCKET_FD, descriptor)]) for descriptor in descriptors]
    return nested(Attribute.SOCKETS, items)


def connected(reply: Message, index: int) -> bool:
    """Whether STATUS calls the device connected."""
    for _, entry in attributes(reply.get(Attribute.DEVICE_LIST) or b""):
        device = dict(attributes(entry))
        if number(device.get(DEVICE_INDEX)) == index:
            return number(device.get(DEVICE_CONNECTED)) != 0
    return False


_BYTE_ORDER: Final = "little" if struct.pack("=H", 1) == b"\1\0" else "big"
