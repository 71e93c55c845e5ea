"""``codec.batch`` in plain Python: what the compiled form is held against, and stands in for it.

A reader finds here what happens; ``_batch.c`` does the same, and gives the same results.
"""

from __future__ import annotations

import struct

from nbdmirror.codec import nbd, record
from nbdmirror.errors import FormatError
from nbdmirror.ports import Buffer

PLACE = struct.Struct("<QQII")


def take_writes(
    view: Buffer, start: int, end: int, length_max: int, export_size: int
) -> tuple[int, bytes, bytes, int]:
    """See ``codec.batch``."""
    places, replies = [], []
    longest = 0
    while end - start >= nbd.REQUEST.size:
        magic, flags, kind, cookie, offset, length = nbd.REQUEST.unpack_from(view, start)
        stop = start + nbd.REQUEST.size + length
        plain = magic == nbd.REQUEST_MAGIC and kind == nbd.WRITE and flags == 0
        if not plain or not 0 < length <= length_max or offset + length > export_size or stop > end:
            break
        places.append(PLACE.pack(offset, start + nbd.REQUEST.size, length, 0))
        replies.append(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie))
        longest = max(longest, length)
        start = stop
    return start, b"".join(places), b"".join(replies), longest


def encode_writes(
    view: Buffer, places: bytes, epoch: int, volume: int, seq: int, time_ns: int
) -> tuple[bytes, bytes]:
    """See ``codec.batch``."""
    parts: list[Buffer] = []
    found = []
    at = 0
    data = memoryview(view)
    for number, (offset, where, length, _) in enumerate(PLACE.iter_unpack(places)):
        if where + length > len(data):
            raise ValueError("a place is not within the buffer")
        kind, payload = record.WRITE, data[where : where + length]
        taken = record.Record(
            kind, 0, epoch, volume, seq + number, offset, length, time_ns, payload
        )
        parts += record.encode(taken)
        found.append(PLACE.pack(offset, at + record.HEADER_SIZE, length, volume))
        at += record.stored_size(kind, length)
    return b"".join(parts), b"".join(found)


def stretches(places: bytes, size: int) -> list[int]:
    """See ``codec.batch``."""
    found: list[int] = []
    for offset, _, length, _ in PLACE.iter_unpack(places):
        for stretch in range(offset // size, (offset + length - 1) // size + 1):
            if not found or found[-1] != stretch:
                found.append(stretch)
    return found


def check_writes(
    view: Buffer, next_seq: int, epoch_min: int, epoch_max: int, sizes: bytes
) -> tuple[int, bytes, int, int] | None:
    """See ``codec.batch``."""
    data = memoryview(view)
    volumes = [size for (size,) in struct.iter_unpack("<Q", sizes)]
    places: list[bytes] = []
    start = at = largest = 0
    epoch = epoch_min
    while at < len(data):
        try:
            found = record.parse(data, at)
        except FormatError:
            return None
        size = record.stored_size(found.kind, found.length)
        good = found.kind == record.WRITE and found.length and found.epoch <= epoch_max
        if not good or found.volume >= len(volumes) or size > len(data) - at:
            return None
        if found.offset + found.length > volumes[found.volume]:
            return None
        if found.seq < next_seq and not places:
            start = at + size  # here already: skipped (O8)
        elif found.seq != next_seq + len(places) or found.epoch < epoch:
            return None
        else:
            epoch = found.epoch
            where = at - start + record.HEADER_SIZE
            places.append(PLACE.pack(found.offset, where, found.length, found.volume))
            largest = max(largest, size)
        at += size
    return start, b"".join(places), largest, epoch
