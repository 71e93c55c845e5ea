"""The client's side of the NBD wire for tests: builds what clients send, reads what servers answer.

Owns layouts as the protocol document gives them, apart from the product's own structs, so that one
mistake cannot hide in both. No I/O: works against a session in memory and over a socket alike, and
builds what a decent client would not.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

FIXED, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, LIST, _, STARTTLS, INFO, GO, STRUCTURED = range(1, 9)
LIST_META, SET_META, EXTENDED = range(9, 12)
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
ERR = 1 << 31
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, TOO_BIG = (
    ERR + number for number in (1, 2, 3, 4, 5, 6, 7, 9)
)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, ERROR = 0, 1, 2, 5, 0x8001


def client_flags(flags: int = FIXED | NO_ZEROES) -> bytes:
    """The client's first word."""
    return struct.pack(">I", flags)


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """An option; ``length`` is what it claims to carry."""
    claimed = len(data) if length is None else length
    return struct.pack(">8sII", b"IHAVEOPT", number, claimed) + data


def counted(text: str | bytes) -> bytes:
    """A string with its length before it."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def info_data(name: str | bytes = "", infos: Sequence[int] = ()) -> bytes:
    """The data of INFO and GO."""
    return counted(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def go(name: str = "", infos: Sequence[int] = (), number: int = GO) -> bytes:
    """The option GO (or INFO)."""
    return option(number, info_data(name, infos))


def meta(number: int, name: str, *queries: str) -> bytes:
    """LIST_META or SET_META."""
    data = counted(name) + struct.pack(">I", len(queries))
    return option(number, data + b"".join(counted(query) for query in queries))


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 1,
    payload: bytes = b"",
    magic: int = 0x25609513,
) -> bytes:
    """A request; a WRITE's length is that of its payload unless given."""
    length = length or len(payload)
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length) + payload


@dataclass(frozen=True)
class OptionReply:
    """One reply to an option."""

    option: int
    kind: int
    data: bytes


@dataclass(frozen=True)
class Simple:
    """A simple reply; ``data`` only with a read that succeeded."""

    cookie: int
    error: int
    data: bytes = b""


@dataclass(frozen=True)
class Chunk:
    """A chunk of a structured reply."""

    cookie: int
    kind: int
    done: bool
    payload: bytes

    @property
    def error(self) -> tuple[int, str]:
        """Number and text of an ERROR chunk."""
        assert self.kind == ERROR
        number, length = struct.unpack_from(">IH", self.payload)
        assert len(self.payload) == 6 + length
        return number, self.payload[6:].decode()

    @property
    def extents(self) -> tuple[int, list[tuple[int, int]]]:
        """Context id and (length, flags) of a STATUS chunk."""
        assert self.kind == STATUS
        pairs = list(struct.iter_unpack(">II", self.payload[4:]))
        return struct.unpack_from(">I", self.payload)[0], [(a, b) for a, b in pairs]


Reply = Simple | Chunk


@dataclass
class ReplyParser:
    """Reads replies out of a stream. ``reads`` maps the cookies of reads to their lengths."""

    data: bytearray = field(default_factory=bytearray)
    reads: dict[int, int] = field(default_factory=dict)

    def take(self, length: int) -> bytes:
        """The next bytes; AssertionError if they are not there."""
        assert len(self.data) >= length, f"{length} bytes wanted of {bytes(self.data)!r}"
        taken = bytes(self.data[:length])
        del self.data[:length]
        return taken

    def option_replies(self) -> list[OptionReply]:
        """All replies to options that are there."""
        replies = []
        while self.data[:8] == (0x3E889045565A9).to_bytes(8, "big"):
            _, number, kind, length = struct.unpack(">QIII", self.take(20))
            replies.append(OptionReply(number, kind, self.take(length)))
        return replies

    def replies(self) -> list[Reply]:
        """All replies to requests; AssertionError if a byte is left that is none."""
        found: list[Reply] = []
        while self.data:
            found.append(self.reply())
        return found

    def reply(self) -> Reply:
        """The next reply to a request."""
        magic = struct.unpack(">I", self.take(4))[0]
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", self.take(12))
            return Simple(cookie, error, b"" if error else self.take(self.reads.get(cookie, 0)))
        assert magic == 0x668E33EF, f"{magic:#x} is not the magic of a reply"
        flags, kind, cookie, length = struct.unpack(">HHQI", self.take(16))
        assert flags in (0, 1)
        return Chunk(cookie, kind, bool(flags), self.take(length))


def assemble(chunks: Sequence[Reply], offset: int, length: int) -> bytes:
    """The data of a structured read; checks cover, overlap and the end mark."""
    content = bytearray(length)
    covered = bytearray(length)
    for chunk in chunks:
        assert isinstance(chunk, Chunk)
        assert chunk.done == (chunk is chunks[-1])
        if chunk.kind == NONE:
            continue
        at = struct.unpack_from(">Q", chunk.payload)[0] - offset
        assert chunk.kind in (OFFSET_DATA, OFFSET_HOLE)
        if chunk.kind == OFFSET_DATA:
            data = chunk.payload[8:]
        else:
            assert len(chunk.payload) == 12
            data = bytes(struct.unpack_from(">I", chunk.payload, 8)[0])
        assert data and at >= 0 and at + len(data) <= length
        assert not any(covered[at : at + len(data)])
        content[at : at + len(data)] = data
        covered[at : at + len(data)] = b"\1" * len(data)
    assert all(covered)
    return bytes(content)
