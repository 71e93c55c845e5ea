"""The superblock's container: two slots, written in turn, each checked by itself (O11).

A slot holds one JSON object, the node's durable state. The newer valid slot counts; the other is
the one written next, and only after the newer is durable. Little-endian::

    offset  size  field
    0       8     magic      "NMSUPER1"
    8       8     counter    grows by one with every save; the higher valid one counts
    16      4     length     of the JSON text
    20      4     reserved   0
    24      8     sum        XXH3-64 of the 24 bytes before and the text
    32      n     text       UTF-8 JSON
"""

from __future__ import annotations

import json
import struct
from typing import Any

from xxhash import xxh3_64_intdigest

from nbdmirror.errors import FormatError

SLOT_SIZE = 256 * 1024
SLOT_COUNT = 2
_HEAD = struct.Struct("<8sQII")
_SUM = struct.Struct("<Q")
_MAGIC = b"NMSUPER1"
_TEXT_AT = _HEAD.size + _SUM.size
assert _TEXT_AT == 32


def encode(counter: int, state: dict[str, Any]) -> bytes:
    """One slot's bytes, padded to whole sectors; FormatError if the state outgrew the slot."""
    text = json.dumps(state, separators=(",", ":"), sort_keys=True).encode()
    if _TEXT_AT + len(text) > SLOT_SIZE:
        raise FormatError(f"superblock of {len(text)} bytes is larger than its slot")
    head = _HEAD.pack(_MAGIC, counter, len(text), 0)
    slot = head + _SUM.pack(xxh3_64_intdigest(head + text)) + text
    return slot + bytes(-len(slot) % 512)


def decode(slot: bytes) -> tuple[int, dict[str, Any]]:
    """The counter and state of a slot; FormatError says why it cannot be used."""
    if len(slot) < _TEXT_AT:
        raise FormatError("superblock slot cut short")
    magic, counter, length, _ = _HEAD.unpack_from(slot)
    if magic != _MAGIC:
        raise FormatError("superblock slot was never written (magic)")
    if _TEXT_AT + length > len(slot):
        raise FormatError("superblock slot has an impossible length")
    text = slot[_TEXT_AT : _TEXT_AT + length]
    if xxh3_64_intdigest(slot[: _HEAD.size] + text) != _SUM.unpack_from(slot, _HEAD.size)[0]:
        raise FormatError("superblock slot checksum does not match")
    state = json.loads(text)
    assert isinstance(state, dict)
    return counter, state


def damage(slots: list[bytes]) -> str | None:
    """What is wrong with a slot that was written once; ``None`` if nothing is. The other may then
    be out of date: the damaged one may have been the newer."""
    for index, slot in enumerate(slots):
        try:
            decode(slot)
        except FormatError as error:
            if any(slot[:_TEXT_AT]):
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
