"""Pages of the durable maps: 4 KiB, each with its own checksum and its own place in the file.

A map file is a row of pages; a page that was never written is a hole and reads as zeros, which
means "as the map's default". Little-endian::

    offset  size  field
    0       4     magic    "NMAP"
    4       4     reserved 0
    8       8     number   the page's place in its file: a misdirected write shows (X6)
    16      8     sum      XXH3-64 of everything else in the page
    24      4072  bits     bit k (LSB first) is region ``number * BITS + k``

The active map's sectors are alike in 512 bytes ("NACT"): 61 slots of 8 bytes, each 0 or
``1 + (volume << 40 | extent)``. So are those of a snapshot's layer ("NLAY"): slot k of sector n is
for region ``n * 61 + k``, see ``engine.layer``.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_64_intdigest

from nbdmirror.errors import FormatError
from nbdmirror.ports import Buffer

PAGE_SIZE = 4096
SECTOR_SIZE = 512
_HEAD = struct.Struct("<4sIQQ")
BITMAP_BYTES = PAGE_SIZE - _HEAD.size
BITS = BITMAP_BYTES * 8
SLOTS = (SECTOR_SIZE - _HEAD.size) // 8
_SLOTS = struct.Struct(f"<{SLOTS}Q")


def _seal(magic: bytes, number: int, body: bytes) -> bytes:
    head = _HEAD.pack(magic, 0, number, 0)
    return _HEAD.pack(magic, 0, number, xxh3_64_intdigest(head + body)) + body


def _open(magic: bytes, number: int, data: Buffer) -> bytes | None:
    """The body; ``None`` for a page never written; FormatError for anything else."""
    view = memoryview(data)
    found, reserved, place, checksum = _HEAD.unpack_from(view)
    if found == b"\0\0\0\0" and not any(view):
        return None
    if found != magic or reserved:
        raise FormatError(f"map page {number} has a wrong magic")
    if place != number:
        raise FormatError(f"map page {number} holds page {place}: a write went astray")
    body = bytes(view[_HEAD.size :])
    if xxh3_64_intdigest(_HEAD.pack(magic, 0, number, 0) + body) != checksum:
        raise FormatError(f"checksum of map page {number} does not match")
    return body


def encode_page(number: int, bits: bytes) -> bytes:
    """A DCM page from its 4072 bytes of bits."""
    assert len(bits) == BITMAP_BYTES
    return _seal(b"NMAP", number, bits)


def decode_page(number: int, data: Buffer) -> bytes | None:
    """The bits of a DCM page; ``None`` where it was never written; FormatError if damaged."""
    return _open(b"NMAP", number, data)


ACTIVE, LAYER = b"NACT", b"NLAY"
"""Whose sectors."""


def encode_sector(number: int, slots: list[int], magic: bytes = ACTIVE) -> bytes:
    """A sector of the active map, or of a layer, from its slots (see the module's layout)."""
    assert len(slots) == SLOTS
    return _seal(magic, number, _SLOTS.pack(*slots))


def decode_sector(number: int, data: Buffer, magic: bytes = ACTIVE) -> list[int]:
    """The slots of a sector, all 0 where it was never written; FormatError if damaged."""
    body = _open(magic, number, data)
    return [0] * SLOTS if body is None else list(_SLOTS.unpack(body))
