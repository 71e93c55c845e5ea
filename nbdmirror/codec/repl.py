"""The replication protocol: frames over one stream, primary (connects) to secondary (listens).

Every frame is checked before it is used and bounded before it is stored. Little-endian::

    offset  size  field
    0       4     magic        "NMF1"
    4       1     type         see ``Type``
    5       1     flags        bit 0: the payload is lz4, its first 4 bytes the size unpacked
    6       2     reserved     0
    8       4     length       of the payload, at most FRAME_BYTES_MIN
    12      4     reserved     0
    16      8     session      id that the primary drew for this session; a stale one is refused
    24      8     payload sum  XXH3-64 of the payload as sent; 0 for records, which carry theirs
    32      8     header sum   XXH3-64 of the 32 bytes before
    40      n     payload

A session: HELLO (primary) - WELCOME or REFUSE (secondary) - START (primary) - READY or REFUSE
(secondary, after what it decided is durable); then RECORDS, REGION, HASHES, VERIFY, RESYNC_END one
way and ACK, WANT, COPIES, DONE, VERIFIED, CONSISTENT the other, PING both ways; and READ, answered
by DATA. A START (and its READY) may come again during a resync: the records of the stream begin
anew there. The JSON payloads are described where they are made, in ``engine.session`` and
``engine.receiver``; the binary ones here.

    RECORDS      whole records, seqs ascending without a gap
    ACK          received, durable, applied seq (8 bytes each)
    REGION       token 8, volume 4, flags 4 (1: more of this token follows), count 4, reserved 4;
                 then ``count`` extents: offset 8, length 8, flags 4 (1: zeros), reserved 4; then
                 the data of those extents that are not zeros, one behind the other
    HASHES       token 8, volume 4, region size 4, offset 8, length 8, key 16; then a hash for each
                 region under that key (see ``codec.hashing``), or none at all: then every region
                 counts as different
    WANT         token 8; a byte for each region of that HASHES: 1 differs, 0 is the same; then,
                 if regions are larger than a block, the hashes of the blocks of each that differs,
                 under the same key
    VERIFY       as HASHES, with seq 8 before the hashes: they are to be compared once every record
                 up to there is applied
    VERIFIED     token 8; a byte for each region of that VERIFY: 1 differs, 0 is the same
    DONE         tokens (8 bytes each) of REGION and HASHES whose content is durable
    COPIES       number 8: saved after the content of the DONE behind it was durable, it tells any
                 older state of the secondary by a smaller one; sent where START names one
    RESYNC_END   seq 8: durable past it, the secondary is consistent again
    CONSISTENT   seq 8: and it says so, durably
    PING         nothing
    READ         token 8, volume 4, reserved 4, offset 8, length 8: what the facets hold is wanted
    DATA         token 8, seq 8, errno 8, data: every record up to seq is in it; no data if errno
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Any

import lz4.block
from xxhash import xxh3_64, xxh3_64_intdigest

from nbdmirror.codec.slabs import SlabPool
from nbdmirror.config import FRAME_BYTES_MIN, Limits
from nbdmirror.errors import PeerError
from nbdmirror.ports import Buffer

PROTOCOL_VERSIONS = (3, 3)
"""Lowest and highest version that this program speaks."""
JSON_MAX = 1 << 20
MORE = 1
ZEROS = 1
_LZ4 = 1

_HEAD = struct.Struct("<4sBBHIIQQ")
_SUM = struct.Struct("<Q")
HEADER_SIZE = _HEAD.size + _SUM.size
assert HEADER_SIZE == 40
_MAGIC = b"NMF1"

_POOL = SlabPool(9 << 18)  # two of the largest frames that senders make, and a bit

ACK = struct.Struct("<QQQ")
REGION = struct.Struct("<QIIII")
EXTENT = struct.Struct("<QQII")
HASHES = struct.Struct("<QIIQQ16s")
VERIFY = struct.Struct("<QIIQQ16sQ")
TOKEN = struct.Struct("<Q")
SEQ = struct.Struct("<Q")
COPIES = struct.Struct("<Q")
READ = struct.Struct("<QIIQQ")
DATA = struct.Struct("<QQQ")


class Type(IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    START = 4
    READY = 5
    RECORDS = 6
    ACK = 7
    REGION = 8
    HASHES = 9
    WANT = 10
    DONE = 11
    RESYNC_END = 12
    CONSISTENT = 13
    PING = 14
    READ = 15
    DATA = 16
    VERIFY = 17
    VERIFIED = 18
    COPIES = 19


class Frame:
    """A received frame. What is packed stays packed until its payload is asked for: frames that
    wait cost what they cost on the wire, never what they claim to hold (I6)."""

    __slots__ = ("_packed", "_payload", "session", "size", "type")

    def __init__(self, kind: Type, session: int, wire: memoryview, packed: int) -> None:
        """``packed``: how many bytes it may have once it is unpacked; 0: it is not packed."""
        self.type = kind
        self.session = session
        self.size = HEADER_SIZE + len(wire)
        """Bytes on the wire: what a frame that waits is counted as."""
        self._payload = wire
        self._packed = packed

    @property
    def payload(self) -> memoryview:
        """A view that stays valid; PeerError if it cannot be unpacked."""
        if self._packed:
            self._payload, self._packed = _unpack(self._payload, self._packed), 0
        return self._payload

    def json(self) -> dict[str, Any]:
        """The JSON object that it carries; PeerError if it does not."""
        if len(self.payload) > JSON_MAX:
            raise PeerError(f"{self.type.name} of {len(self.payload)} bytes is too long")
        try:
            value = json.loads(bytes(self.payload))
        except (ValueError, RecursionError) as error:
            raise PeerError(f"{self.type.name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise PeerError(f"{self.type.name} is not a JSON object")
        return value

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The fixed part of the payload; PeerError if it is shorter."""
        if len(self.payload) < layout.size:
            raise PeerError(f"{self.type.name} cut short")
        return layout.unpack_from(self.payload)


def encode(
    kind: Type, session: int, parts: list[Buffer], *, compress: bool = False
) -> list[Buffer]:
    """A frame as parts. With ``compress`` it is packed where that saves an eighth or more."""
    length = sum(map(len, parts))
    assert length <= FRAME_BYTES_MIN, "a peer may refuse longer ones"
    flags = 0
    if compress and length > 512:
        packed = lz4.block.compress(b"".join(parts), store_size=True)
        if len(packed) < length - length // 8:
            parts, length, flags = [packed], len(packed), _LZ4
    payload_sum = 0
    if kind is not Type.RECORDS and length:
        hasher = xxh3_64()
        for part in parts:
            hasher.update(part)
        payload_sum = hasher.intdigest()
    head = _HEAD.pack(_MAGIC, kind, flags, 0, length, 0, session, payload_sum)
    return [head + _SUM.pack(xxh3_64_intdigest(head)), *parts]


def encode_json(kind: Type, session: int, value: dict[str, Any]) -> list[Buffer]:
    """A frame that carries a JSON object."""
    return encode(kind, session, [json.dumps(value, separators=(",", ":")).encode()])


class FrameReader:
    """Takes bytes in any split and gives whole, checked frames; holds one frame and a slab."""

    def __init__(self, limits: Limits) -> None:
        self._slab = memoryview(bytearray(64 << 10))
        self._start = 0
        self._end = 0
        self._need = HEADER_SIZE
        self._limits = limits
        self._frame_max = limits.frame_bytes_max
        self._unpacked_max = limits.unpacked_bytes_max

    def begin(self, *, started: bool) -> None:
        """Until the handshake has ended, frames are as long as its JSON may be."""
        limits = self._limits
        self._frame_max = limits.frame_bytes_max if started else JSON_MAX
        self._unpacked_max = limits.unpacked_bytes_max if started else JSON_MAX

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if len(self._slab) - self._start < self._need or self._end == len(self._slab):
            self._renew()
        return self._slab[self._end :]

    def _renew(self) -> None:
        # Views into the old slab live on in logs and queues; only an unfinished frame moves.
        rest = self._slab[self._start : self._end]
        if self._need > _POOL.size or self._end <= 4096:  # a large frame, or a link at rest
            fresh = memoryview(bytearray(max(self._need, 64 << 10)))
        else:
            fresh = _POOL.take()
        fresh[: len(rest)] = rest
        self._slab, self._start, self._end = fresh, 0, len(rest)

    def received(self, count: int) -> list[Frame]:
        """The frames completed by the ``count`` bytes put into the buffer; PeerError ends the
        session."""
        self._end += count
        frames: list[Frame] = []
        while True:
            available = self._end - self._start
            if available < HEADER_SIZE:
                self._need = HEADER_SIZE
                return frames
            kind, flags, length, session, payload_sum = self._header()
            if available < HEADER_SIZE + length:
                self._need = HEADER_SIZE + length
                return frames
            at = self._start + HEADER_SIZE
            payload = self._slab[at : at + length]
            if kind is not Type.RECORDS and length and xxh3_64_intdigest(payload) != payload_sum:
                raise PeerError(f"payload checksum of a {kind.name} frame does not match")
            frames.append(Frame(kind, session, payload, self._unpacked_max if flags & _LZ4 else 0))
            self._start = at + length

    def _header(self) -> tuple[Type, int, int, int, int]:
        view, at = self._slab, self._start
        magic, kind, flags, _, length, _, session, payload_sum = _HEAD.unpack_from(view, at)
        if magic != _MAGIC:
            raise PeerError("not a replication frame (magic); is this the right port?")
        if xxh3_64_intdigest(view[at : at + _HEAD.size]) != _SUM.unpack_from(view, at + 32)[0]:
            raise PeerError("header checksum of a frame does not match")
        # Refused by its header, before memory is taken for it.
        if length > self._frame_max:
            raise PeerError(f"frame of {length} bytes, the limit is {self._frame_max}")
        try:
            return Type(kind), flags, length, session, payload_sum
        except ValueError:
            raise PeerError(f"unknown frame type {kind}") from None


def _unpack(packed: memoryview, size_max: int) -> memoryview:
    if len(packed) < 4:
        raise PeerError("compressed frame cut short")
    (size,) = struct.unpack_from("<I", packed)
    # The size is checked before anything is allocated for it.
    if size > size_max:
        raise PeerError(f"compressed frame declares {size} bytes, the limit is {size_max}")
    try:
        return memoryview(lz4.block.decompress(packed[4:], uncompressed_size=size))
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise PeerError(f"compressed frame is damaged: {error}") from error
