"""The log record: the one unit that is written to logs and sent to remotes, byte for byte.

A record is checksummed once, where the data enters, and carried unchanged: into the primary's
log, over the wire, into the secondary's log (X6). All integers are little-endian::

    offset  size  field
    0       4     magic        "NMR1"
    4       1     version      1
    5       1     kind         1 write, 2 trim, 3 zero, 4 fill, 5 mark
    6       1     flags        bit 0: zero keeps its space allocated (NO_HOLE)
    7       1     reserved     0
    8       4     epoch        grows with every recovery of the primary (O10)
    12      4     volume       index of the volume within its group
    16      8     seq          1, 2, 3, ... over all volumes of the group (V4)
    24      8     offset       bytes into the volume
    32      8     length       bytes that the record covers; of a fill: bytes behind its header
    40      8     time         nanoseconds since 1970, when the primary took it
    48      8     payload sum  XXH3-64 of the payload; 0 if there is none
    56      8     header sum   XXH3-64 of the 56 bytes before
    64      n     payload      of a write or mark: ``length`` bytes, padded with zeros to 64

A mark changes no byte of a volume: it is a point in the write order at which something happens (a
snapshot, a restore), which its payload says as JSON: see ``codec.mark``. Its offset and volume
are 0.

A fill takes up the end of the ring where the next record would not fit; it carries the seq of
that next record and is never sent.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from nbdmirror.errors import FormatError
from nbdmirror.ports import Buffer

WRITE, TRIM, ZERO, FILL, MARK = 1, 2, 3, 4, 5
KIND_NAMES = {WRITE: "write", TRIM: "trim", ZERO: "zero", FILL: "fill", MARK: "mark"}
WITH_PAYLOAD = (WRITE, MARK)
NO_HOLE = 1

HEADER_SIZE = 64
ALIGNMENT = 64
PAYLOAD_MAX = 1 << 20
"""Longer requests are split: a record is also the unit of sending and of fairness."""

_MAGIC = int.from_bytes(b"NMR1", "little")
_VERSION = 1
_BODY = struct.Struct("<IBBBBIIQQQQQ")
_SUM = struct.Struct("<Q")
assert _BODY.size + _SUM.size == HEADER_SIZE

_ZEROS = bytes(ALIGNMENT)
_TIMES_NS = (10**18, 5 * 10**18)
"""Of records: 2001 to 2128."""


class Record(NamedTuple):
    """One parsed record; ``payload`` is a view into the bytes that it was parsed from."""

    kind: int
    flags: int
    epoch: int
    volume: int
    seq: int
    offset: int
    length: int
    time_ns: int
    payload: Buffer | None


def encode_header(
    kind: int,
    flags: int,
    epoch: int,
    volume: int,
    seq: int,
    offset: int,
    length: int,
    time_ns: int,
    payload: Buffer | None,
) -> bytes:
    """The 64 bytes before the payload; computes both checksums (the only place that does)."""
    payload_sum = xxh3_64_intdigest(payload) if payload is not None else 0
    body = _BODY.pack(
        _MAGIC, _VERSION, kind, flags, 0, epoch, volume, seq, offset, length, time_ns, payload_sum
    )
    return body + _SUM.pack(xxh3_64_intdigest(body))


def padding(payload_length: int) -> bytes:
    """The zeros between a payload of this many bytes and the next record."""
    return _ZEROS[: -payload_length % ALIGNMENT]


def encode(record: Record) -> list[Buffer]:
    """A whole record as parts to be written one behind the other."""
    kind, flags, epoch, volume, seq, offset, length, time_ns, payload = record
    header = encode_header(kind, flags, epoch, volume, seq, offset, length, time_ns, payload)
    if payload is None:
        return [header]
    pad = padding(len(payload))
    return [header, payload, pad] if pad else [header, payload]


def fill(epoch: int, seq: int, space: int) -> bytes:
    """The header of a fill that takes up ``space`` bytes (at least its own 64) of the ring."""
    assert space >= HEADER_SIZE and space % ALIGNMENT == 0
    return encode_header(FILL, 0, epoch, 0, seq, 0, space - HEADER_SIZE, 0, None)


def stored_size(kind: int, length: int) -> int:
    """Bytes that a record of this kind and length takes in a log or frame."""
    if kind in WITH_PAYLOAD:
        return HEADER_SIZE + length + -length % ALIGNMENT
    return HEADER_SIZE + length if kind == FILL else HEADER_SIZE


def parse_header(data: memoryview, at: int) -> tuple[Record, int]:
    """The record whose 64 bytes of header start at ``at``, without its payload, and its stored
    size. FormatError names what is wrong."""
    kind, flags, epoch, volume, seq, offset, length, time_ns, _ = _header(data, at)
    record = Record(kind, flags, epoch, volume, seq, offset, length, time_ns, None)
    return record, stored_size(kind, length)


def _header(data: memoryview, at: int) -> tuple[int, int, int, int, int, int, int, int, int]:
    """The checked fields of a header: those of ``Record``, then the payload's checksum."""
    if len(data) - at < HEADER_SIZE:
        raise FormatError("record cut short in its header")
    (magic, version, kind, flags, _, epoch, volume, seq, offset, length, time_ns, payload_sum) = (
        _BODY.unpack_from(data, at)
    )
    if magic != _MAGIC:
        raise FormatError("not a record (magic)")
    if version != _VERSION:
        raise FormatError(f"record version {version}, this program knows {_VERSION}")
    (header_sum,) = _SUM.unpack_from(data, at + _BODY.size)
    if xxh3_64_intdigest(data[at : at + _BODY.size]) != header_sum:
        raise FormatError(f"header checksum of record {seq} does not match")
    if kind not in KIND_NAMES:
        raise FormatError(f"record {seq} has unknown kind {kind}")
    if kind == MARK and (volume or offset):
        raise FormatError(f"mark {seq} is at {offset} of volume {volume}, where there is none")
    return kind, flags, epoch, volume, seq, offset, length, time_ns, payload_sum


def parse(data: memoryview, at: int, *, verify_payload: bool = True) -> Record:
    """The record that starts at ``at``.

    Raises FormatError naming what is wrong; a record cut short by the end of ``data`` is wrong
    too."""
    kind, flags, epoch, volume, seq, offset, length, time_ns, payload_sum = _header(data, at)
    if kind not in WITH_PAYLOAD:
        return Record(kind, flags, epoch, volume, seq, offset, length, time_ns, None)
    start = at + HEADER_SIZE
    if length > PAYLOAD_MAX or len(data) - start < length:
        raise FormatError(f"payload of record {seq} cut short or too long ({length} bytes)")
    payload = data[start : start + length]
    if verify_payload and xxh3_64_intdigest(payload) != payload_sum:
        raise FormatError(f"payload checksum of record {seq} does not match")
    return Record(kind, flags, epoch, volume, seq, offset, length, time_ns, payload)


def was_header(data: bytes, seq: int) -> bool:
    """Whether 64 bytes are what damage left of the header of record ``seq``: no header any more,
    and still with the magic, or with that seq where it was and a kind or a time of this age. (The
    seq alone may be any number in what an older record carried. Damage to all of them is not told
    from what was never one.)"""
    if len(data) < HEADER_SIZE:
        return False
    with contextlib.suppress(FormatError):
        parse_header(memoryview(data), 0)
        return False
    magic, _, kind, _, _, _, _, found, _, _, time_ns, _ = _BODY.unpack_from(data)
    likely = kind in KIND_NAMES or _TIMES_NS[0] < time_ns < _TIMES_NS[1]
    return bool(magic == _MAGIC or (found == seq and likely))


def find_headers(data: bytes) -> Iterator[tuple[int, Record]]:
    """(offset, record without its payload) of the headers that are whole, wherever they begin."""
    view = memoryview(data)
    magic = _MAGIC.to_bytes(4, "little")
    at = data.find(magic)
    while at >= 0:
        if at % ALIGNMENT == 0:
            with contextlib.suppress(FormatError):
                yield at, parse_header(view, at)[0]
        at = data.find(magic, at + 1)


def parse_all(data: memoryview) -> Iterator[Record]:
    """The records of a frame or of a stretch of log, one behind the other; fills included."""
    at = 0
    while at < len(data):
        record = parse(data, at)
        yield record
        at += stored_size(record.kind, record.length)
