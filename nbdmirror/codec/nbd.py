"""The NBD wire: numbers, structs, and what an export and a request are.

Owns the layouts below; never keeps a connection's state (``nbdhandshake``, ``nbdserver``) and
never touches a socket. Source of every rule is the NBD project's protocol document. All integers
are big-endian.

Handshake, fixed newstyle. The server opens, the client answers, then options and their replies::

    greeting      "NBDMAGIC" 8, "IHAVEOPT" 8, handshake flags 2 (fixed newstyle 1, no zeroes 2)
    client flags  4 (the same two bits; any other ends the connection)
    option        "IHAVEOPT" 8, number 4, length 4, data
    option reply  magic 8, option 4, kind 4, length 4, data

    EXPORT_NAME   the name; answered, outside the form above, with size 8, transmission flags 2
                  and, unless the client asked for none, 124 zero bytes; or by hanging up
    INFO, GO      name length 4, name, count 2, then 2 bytes for each information asked for;
                  answered with INFO replies (kind 2, then size 8 and flags 2 | the name | the
                  description | minimum, preferred, maximum block size 4 each) and ACK
    LIST          nothing; a SERVER reply (name length 4, name, description) for each export, ACK
    LIST_META_CONTEXT, SET_META_CONTEXT
                  name length 4, name, count 4, then for each query its length 4 and the query;
                  a META_CONTEXT reply (id 4, name) for each, ACK
    error reply   a text of at most 4096 bytes

Transmission::

    request       magic 4, flags 2, type 2, cookie 8, offset 8, length 4; WRITE: length bytes
    simple reply  magic 4, error 4, cookie 8; READ without error: length bytes
    chunk         magic 4, flags 2 (done 1), kind 2, cookie 8, length 4, payload:
      NONE          nothing
      OFFSET_DATA   offset 8, data
      OFFSET_HOLE   offset 8, size 4
      BLOCK_STATUS  context id 4, then for each extent its length 4 and flags 4
      ERROR         error 4, text length 2, text
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from nbdmirror.config import KIB, MIB, OPTION_BYTES_MAX

INIT_MAGIC = int.from_bytes(b"NBDMAGIC", "big")
OPTION_MAGIC = int.from_bytes(b"IHAVEOPT", "big")
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_NAME_REPLY = struct.Struct(">QH")
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
CHUNK_DATA = struct.Struct(">IHHQIQ")
CHUNK_HOLE = struct.Struct(">IHHQIQI")
ERROR_HEAD = struct.Struct(">IH")
EXTENT = struct.Struct(">II")
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
assert (OPTION.size, OPTION_REPLY.size, REQUEST.size) == (16, 20, 28)
assert (SIMPLE_REPLY.size, CHUNK.size, CHUNK_DATA.size, CHUNK_HOLE.size) == (16, 20, 28, 32)
EXPORT_NAME_PADDING = bytes(124)

STRING_BYTES_MAX = 4096
"""No name, description or message on the wire is longer."""
REPLY_BYTES_MAX = 64 * KIB
"""The longest data of an option reply that our own client takes."""
OPTION_SKIP_MAX = OPTION_BYTES_MAX
"""Longer option data than the limit is skipped to stay in step; beyond this, the client is dropped.
"""
SWALLOW_MAX = 128 * MIB
"""The payload of a refused WRITE is read and dropped up to this length; beyond, the client is."""
EXTENTS_MAX = 8192
"""Extents in one BLOCK_STATUS chunk; the client asks again for what is missing."""
BLOCK_MIN_MAX = 64 * KIB


class HandshakeFlag(IntFlag):
    """What both sides say first; the client's word has the same two bits."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """Options that have a meaning here; every other number is answered with ERR_UNSUP."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(IntEnum):
    """The kind of an option reply."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_TOO_BIG = 2**31 + 9


class Info(IntEnum):
    """What INFO and GO tell about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What the server offers for an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


# Plain integers: the request parser compares them a hundred thousand times a second.
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << bit for bit in range(5))
CHUNK_DONE = 1
STATE_HOLE, STATE_ZERO = 1, 2

COMMAND_NAMES = {
    READ: "read",
    WRITE: "write",
    DISC: "disconnect",
    FLUSH: "flush",
    TRIM: "trim",
    CACHE: "cache",
    WRITE_ZEROES: "write zeroes",
    BLOCK_STATUS: "block status",
}


class Chunk(IntEnum):
    """The kind of a structured reply's chunk."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 2**15 + 1


_WIRE_ERRNO = {
    number: number
    for number in (
        errno.EPERM,
        errno.EIO,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.ENOTSUP,
        errno.ESHUTDOWN,
    )
} | {0: 0, errno.EDQUOT: errno.ENOSPC, errno.EFBIG: errno.ENOSPC}


def wire_errno(number: int) -> int:
    """The error number for the wire: what the protocol does not know becomes EIO.

    Linux' numbers of the allowed ones are the protocol's own. Quota and file size limits are
    "no space" to a client. 0 stays 0."""
    return _WIRE_ERRNO.get(number, errno.EIO)


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """An export as clients see it; sizes in bytes.

    ``contexts`` are the names of the meta contexts that can be selected. ``block_min`` is a power
    of two of at most 64 KiB, ``block_preferred`` one of at least 512, ``block_max`` advice: longer
    requests are taken as far as the limits allow."""

    name: str
    size: int
    description: str = ""
    read_only: bool = False
    contexts: tuple[str, ...] = ("base:allocation",)
    block_min: int = 1
    block_preferred: int = 4 * KIB
    block_max: int = 32 * MIB
    rotational: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.size < 1 << 63
        assert self.block_min.bit_count() == 1 and self.block_min <= BLOCK_MIN_MAX
        assert self.block_preferred.bit_count() == 1
        assert max(self.block_min, 512) <= self.block_preferred <= self.block_max < 1 << 32
        for text in (self.name, self.description, *self.contexts):
            assert len(text.encode()) <= STRING_BYTES_MAX and "\0" not in text

    def transmission_flags(self, structured: bool) -> TransmissionFlag:
        """What the export offers; ``structured``: whether structured replies are negotiated."""
        flag = TransmissionFlag
        flags = flag.HAS_FLAGS | flag.SEND_FLUSH | flag.SEND_FUA
        flags |= flag.CAN_MULTI_CONN | flag.SEND_CACHE
        if self.read_only:
            flags |= flag.READ_ONLY
        else:
            flags |= flag.SEND_TRIM | flag.SEND_WRITE_ZEROES | flag.SEND_FAST_ZERO
        if self.rotational:
            flags |= flag.ROTATIONAL
        if structured:
            flags |= flag.SEND_DF
        return flags

    def context_id(self, name: str) -> int:
        """The number of a context in replies: 1 for the first."""
        return self.contexts.index(name) + 1


class Request:
    """One valid request; ``offset`` and ``length`` in bytes and within the export.

    ``payload`` is a view into the receive buffer, and keeps that alive, for WRITE; else None."""

    __slots__ = ("cookie", "flags", "length", "offset", "payload", "type")

    def __init__(
        self,
        type: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        payload: memoryview | None = None,
    ) -> None:
        self.type = type
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.payload = payload

    def __repr__(self) -> str:
        name = COMMAND_NAMES.get(self.type, str(self.type))
        return f"<{name} {self.offset}+{self.length} flags={self.flags} cookie={self.cookie:#x}>"
