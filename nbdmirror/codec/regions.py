"""REGION, HASHES, WANT and VERIFY frames: their payloads, made and taken apart (see ``repl``).

What a peer sent is checked for its own consistency here (PeerError); whether the ranges exist is
for the receiver of the frame to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nbdmirror.codec import repl
from nbdmirror.codec.hashing import BLOCK, HASH_SIZE, count
from nbdmirror.codec.repl import Frame
from nbdmirror.errors import PeerError
from nbdmirror.ports import Buffer

EXTENTS_MAX = 4096
"""Of one frame."""

Extent = tuple[int, int, Buffer | None]
"""Offset, length, data; no data: zeros."""


@dataclass(frozen=True, slots=True)
class Region:
    """Extents of one volume; ``more`` of the same token follow."""

    token: int
    volume: int
    more: bool
    extents: list[Extent]


@dataclass(frozen=True, slots=True)
class Hashes:
    """A range whose regions are to be compared; no ``hashes``: all of them count as different.
    ``seq``: not before that record is applied (VERIFY only)."""

    token: int
    volume: int
    region_size: int
    offset: int
    length: int
    key: bytes
    hashes: memoryview
    seq: int = 0
    verify: bool = False

    @property
    def count(self) -> int:
        """How many regions it covers."""
        return count(self.length, self.region_size)


def pack_region(token: int, volume: int, extents: Sequence[Extent], *, more: bool) -> list[Buffer]:
    """The payload of a REGION."""
    assert len(extents) <= EXTENTS_MAX
    head = bytearray(repl.REGION.pack(token, volume, repl.MORE if more else 0, len(extents), 0))
    parts: list[Buffer] = [head]
    for offset, length, data in extents:
        head += repl.EXTENT.pack(offset, length, repl.ZEROS if data is None else 0, 0)
        if data is not None:
            parts.append(data)
    return parts


def parse_region(frame: Frame) -> Region:
    """Takes a REGION apart; PeerError if its parts do not add up."""
    token, volume, flags, number, _ = frame.unpack(repl.REGION)
    payload = frame.payload
    at = repl.REGION.size + number * repl.EXTENT.size
    if number > EXTENTS_MAX or at > len(payload):
        raise PeerError(f"REGION claims {number} extents")
    extents: list[Extent] = []
    table = payload[repl.REGION.size : at]
    for offset, length, extent_flags, _ in repl.EXTENT.iter_unpack(table):
        if extent_flags & repl.ZEROS:
            extents.append((offset, length, None))
            continue
        if length > len(payload) - at:
            raise PeerError(f"REGION of {length} bytes carries {len(payload) - at}")
        extents.append((offset, length, payload[at : at + length]))
        at += length
    if at != len(payload):
        raise PeerError(f"REGION has {len(payload) - at} bytes too many")
    return Region(token, volume, bool(flags & repl.MORE), extents)


def parse_hashes(frame: Frame) -> Hashes:
    """Takes a HASHES or VERIFY apart; PeerError if it does not add up."""
    seq, verify = 0, frame.type is repl.Type.VERIFY
    if verify:
        token, volume, region_size, offset, length, key, seq = frame.unpack(repl.VERIFY)
        hashes = frame.payload[repl.VERIFY.size :]
    else:
        token, volume, region_size, offset, length, key = frame.unpack(repl.HASHES)
        hashes = frame.payload[repl.HASHES.size :]
    if not region_size or not length:
        raise PeerError(f"{frame.type.name} of {length} bytes in regions of {region_size}")
    wanted = count(length, region_size) * HASH_SIZE
    if len(hashes) != wanted and (len(hashes) or verify):
        raise PeerError(f"{frame.type.name} carries {len(hashes)} bytes of hashes, not {wanted}")
    return Hashes(token, volume, region_size, offset, length, key, hashes, seq, verify)


def block_hashes_size(length: int, region_size: int) -> int:
    """Bytes of block hashes that a WANT carries for a region of this length; 0 where a region is
    no larger than a block."""
    return count(length, BLOCK) * HASH_SIZE if region_size > BLOCK else 0
