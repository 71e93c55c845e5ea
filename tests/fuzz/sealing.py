"""Checksums put right, so that a fuzzer gets behind them: what a lying peer would send.

Each takes bytes of a fuzzer and gives what the parser sees. Lengths, kinds and numbers stay as
they are drawn.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_64_intdigest

from nbdmirror.codec import record
from nbdmirror.codec.repl import HEADER_SIZE, Type

_SUM = struct.Struct("<Q")


def frames(data: bytes, session: int) -> bytes:
    """A stream of replication frames: for each 4 bytes of the data say kind, flags and length."""
    out = bytearray()
    at = 0
    while at + 4 <= len(data):
        kind, flags = data[at] % (max(Type) + 1), data[at + 1] & 1
        (length,) = struct.unpack_from("<H", data, at + 2)
        body = data[at + 4 : at + 4 + length % 2048]
        at += 4 + len(body)
        if kind == Type.RECORDS:
            body = records(body)
        total = 0 if kind == Type.RECORDS else xxh3_64_intdigest(body)
        head = struct.pack("<4sBBHIIQQ", b"NMF1", kind, flags, 0, len(body), 0, session, total)
        out += head + _SUM.pack(xxh3_64_intdigest(head)) + body
    assert not out or len(out) >= HEADER_SIZE
    return bytes(out)


def records(data: bytes) -> bytes:
    """The same bytes with every header that stands at a multiple of 64 given its sums."""
    out = bytearray(data)
    at = 0
    while at + record.HEADER_SIZE <= len(out):
        out[at : at + 5] = b"NMR1\x01"
        if out[at + 5] not in record.KIND_NAMES:
            out[at + 5] = 1 + out[at + 5] % len(record.KIND_NAMES)
        (length,) = struct.unpack_from("<Q", out, at + 32)
        size = record.HEADER_SIZE
        if out[at + 5] in record.WITH_PAYLOAD:
            length %= 4096
            struct.pack_into("<Q", out, at + 32, length)
            payload = bytes(out[at + 64 : at + 64 + length])
            struct.pack_into("<Q", out, at + 48, xxh3_64_intdigest(payload))
            size = record.stored_size(out[at + 5], length)
        struct.pack_into("<Q", out, at + 56, xxh3_64_intdigest(bytes(out[at : at + 56])))
        at += size
    return bytes(out)


def page(magic: bytes, number: int, body: bytes) -> bytes:
    """A page of a map."""
    head = struct.Struct("<4sIQQ")
    total = xxh3_64_intdigest(head.pack(magic, 0, number, 0) + body)
    return head.pack(magic, 0, number, total) + body
