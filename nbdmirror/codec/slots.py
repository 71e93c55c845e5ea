"""The superblock's container: two slots, written in turn, each checked by itself (O11).

A slot holds one JSON object, the node's durable state. The newer valid slot counts; the other is
the one written next, and only after the newer is durable. Every sector of a slot says which save
it belongs to and is checked by itself: a save that a power cut tore consists of whole sectors of
two saves, and is told from a slot that was damaged later, which may have been the newer. Which slot
a save belongs to follows from its counter, so one that went astray into the other slot shows (X6).
A sector, little-endian::

    offset  size  field
    0       8     magic      "NMSUPER2"
    8       8     counter    grows by one with every save; the higher valid one counts
    16      4     length     of the JSON text
    20      4     number     of this sector in its slot
    24      480   text       UTF-8 JSON, a piece of it; zeros behind its end
    504     8     sum        XXH3-64 of the 504 bytes before
"""

from __future__ import annotations

import json
import struct
from typing import Any

from xxhash import xxh3_64_intdigest

from nbdmirror.errors import FormatError

SLOT_SIZE = 256 * 1024
SLOT_COUNT = 2
SECTOR_SIZE = 512
_HEAD = struct.Struct("<8sQII")
_SUM = struct.Struct("<Q")
_MAGIC = b"NMSUPER2"
_TEXT_SIZE = SECTOR_SIZE - _HEAD.size - _SUM.size
_SUM_AT = SECTOR_SIZE - _SUM.size
_NEVER = bytes(SECTOR_SIZE)
assert _TEXT_SIZE == 480


def home(counter: int) -> int:
    """The slot of the save with that counter: the first one, 1, goes to slot 0."""
    return (counter + 1) % SLOT_COUNT


def room(state: dict[str, Any]) -> int:
    """Bytes that the text may grow by; negative if it has outgrown the slot."""
    return SLOT_SIZE // SECTOR_SIZE * _TEXT_SIZE - len(_text(state))


def encode(counter: int, state: dict[str, Any]) -> bytes:
    """One slot's bytes, in whole sectors; FormatError if the state outgrew the slot."""
    text = _text(state)
    if _sectors(len(text)) * SECTOR_SIZE > SLOT_SIZE:
        raise FormatError(f"superblock of {len(text)} bytes is larger than its slot")
    slot = bytearray()
    for number in range(_sectors(len(text))):
        piece = text[number * _TEXT_SIZE : (number + 1) * _TEXT_SIZE].ljust(_TEXT_SIZE, b"\0")
        sector = _HEAD.pack(_MAGIC, counter, len(text), number) + piece
        slot += sector + _SUM.pack(xxh3_64_intdigest(sector))
    return bytes(slot)


def decode(slot: bytes) -> tuple[int, dict[str, Any]]:
    """The counter and state of a slot; FormatError says why it cannot be used."""
    first = _sector(slot, 0)
    if first is None:
        raise FormatError("superblock slot was never written")
    counter, length, _ = first
    pieces = []
    for number in range(_sectors(length)):
        sector = _sector(slot, number)
        if sector is None or sector[:2] != (counter, length):
            raise FormatError("superblock slot holds a save that was not finished")
        pieces.append(sector[2])
    state = json.loads(b"".join(pieces)[:length])
    assert isinstance(state, dict)
    return counter, state


def _text(state: dict[str, Any]) -> bytes:
    return json.dumps(state, separators=(",", ":"), sort_keys=True).encode()


def _sectors(length: int) -> int:
    """Of a text of that length."""
    return max(1, -(-length // _TEXT_SIZE))


def _sector(slot: bytes, number: int) -> tuple[int, int, bytes] | None:
    """(counter, length, piece of text) of a sector, ``None`` if it was never written; FormatError
    if it is damaged."""
    data = slot[number * SECTOR_SIZE : (number + 1) * SECTOR_SIZE]
    if len(data) < SECTOR_SIZE:
        raise FormatError("superblock slot cut short")
    if data == _NEVER:
        return None
    magic, counter, length, found = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise FormatError("superblock slot of another format, or damaged (magic)")
    if xxh3_64_intdigest(data[:_SUM_AT]) != _SUM.unpack_from(data, _SUM_AT)[0]:
        raise FormatError("superblock slot checksum does not match")
    if found != number:
        raise FormatError(f"superblock sector {found} where {number} should be")
    return counter, length, data[_HEAD.size : _SUM_AT]


def trimmed(slot: bytes) -> bytes:
    """A valid slot without what lies behind its text, in whole sectors: as it was written."""
    first = _sector(slot, 0)
    assert first is not None
    return slot[: _sectors(first[1]) * SECTOR_SIZE]


def damage(slots: list[bytes]) -> str | None:
    """What is wrong with a slot that was written; ``None`` if nothing is, but for a save that was
    not finished. The other slot may then be out of date: this one may have been the newer."""
    for index, slot in enumerate(slots):
        try:
            first = _sector(slot, 0)
            for number in range(_sectors(first[1]) if first else 0):
                _sector(slot, number)
            if first is not None and home(first[0]) != index:
                raise FormatError(f"holds save {first[0]} of the other slot: a write went astray")
        except FormatError as error:
            return f"slot {index}: {error}"
    return None


def choose(slots: list[bytes]) -> tuple[int, int, dict[str, Any]]:
    """(index, counter, state) of the slot that counts; FormatError if none is valid."""
    best: tuple[int, int, dict[str, Any]] | None = None
    reasons = []
    for index, slot in enumerate(slots):
        try:
            counter, state = decode(slot)
        except FormatError as error:
            reasons.append(str(error))
            continue
        if best is None or counter > best[1]:
            best = (index, counter, state)
    if best is None:
        raise FormatError("no valid superblock slot: " + "; ".join(reasons))
    return best
