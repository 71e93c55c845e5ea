"""Frames (I6, I9, X6): any split, every fault refused, nothing believed before it is checked."""

from __future__ import annotations

import struct
import tracemalloc

import lz4.block
import pytest
from xxhash import xxh3_64_intdigest

from nbdmirror.codec import repl
from nbdmirror.codec.repl import Frame, FrameReader, Type
from nbdmirror.config import FRAME_BYTES_MIN, Limits
from nbdmirror.errors import PeerError
from nbdmirror.ports import Buffer


def wire(parts: list[Buffer]) -> bytes:
    return b"".join(parts)


FRAME_MAX = Limits().frame_bytes_max
SIZES = (6 << 20, (6 << 20) + 1, repl.JSON_MAX + 1)


def feed(reader: FrameReader, data: bytes) -> list[Frame]:
    """As a transport does it: into the reader's buffer, as much as fits."""
    frames = []
    while data:
        buffer = reader.get_buffer()
        count = min(len(buffer), len(data))
        assert count
        buffer[:count] = data[:count]
        data = data[count:]
        frames += reader.received(count)
    return frames


def one(data: bytes) -> Frame:
    (frame,) = feed(FrameReader(Limits()), data)
    return frame


def raw(
    payload: bytes,
    *,
    magic: bytes = b"NMF1",
    kind: int = Type.ACK,
    flags: int = 0,
    length: int | None = None,
    checksum: int | None = None,
) -> bytes:
    """A frame whose header sum is right, whatever it says."""
    length = len(payload) if length is None else length
    checksum = xxh3_64_intdigest(payload) if checksum is None else checksum
    head = struct.pack("<4sBBHIIQQ", magic, kind, flags, 0, length, 0, 1, checksum)
    return head + struct.pack("<Q", xxh3_64_intdigest(head)) + payload


@pytest.mark.parametrize("kind", list(Type))
@pytest.mark.parametrize("size", [0, 1, 512, 70_000])
def test_round_trip(kind: Type, size: int) -> None:
    payload = bytes(i % 251 for i in range(size))
    frame = one(wire(repl.encode(kind, 2**63 - 1, [payload[: size // 3], payload[size // 3 :]])))
    assert (frame.type, frame.session, bytes(frame.payload)) == (kind, 2**63 - 1, payload)
    assert frame.size == repl.HEADER_SIZE + size


def test_compressed_where_that_saves_an_eighth() -> None:
    same, noise = bytes(100_000), b"".join(struct.pack("<Q", i * i * i) for i in range(99))
    packed = wire(repl.encode(Type.REGION, 1, [same], compress=True))
    assert len(packed) < 1000
    frame = one(packed)
    assert bytes(frame.payload) == same
    assert frame.size == len(packed), "it waits as small as it came"
    plain = wire(repl.encode(Type.REGION, 1, [noise[:600]], compress=True))
    assert bytes(one(plain).payload) == noise[:600]


def test_the_largest_frame_and_one_more_byte() -> None:
    assert len(one(raw(bytes(FRAME_MAX))).payload) == FRAME_MAX
    with pytest.raises(PeerError, match="limit"):
        feed(FrameReader(Limits()), raw(b"", length=FRAME_MAX + 1))


def test_no_frame_is_sent_that_a_peer_may_refuse() -> None:
    """Whatever ``frame_bytes_max`` and ``unpacked_bytes_max`` of the peer are (I6)."""
    data = bytes(FRAME_BYTES_MIN)
    limits = Limits(frame_bytes_max=FRAME_BYTES_MIN, unpacked_bytes_max=FRAME_BYTES_MIN)
    for compress in (False, True):
        sent = wire(repl.encode(Type.REGION, 1, [data], compress=compress))
        (frame,) = feed(FrameReader(limits), sent)
        assert len(frame.payload) == FRAME_BYTES_MIN
        with pytest.raises(AssertionError):
            repl.encode(Type.REGION, 1, [data, b"x"], compress=compress)


def test_limits_are_those_of_the_configuration() -> None:
    """Frame and decompressed sizes, each by itself; during the handshake both are JSON's."""
    reader = FrameReader(Limits(frame_bytes_max=5 << 20, unpacked_bytes_max=6 << 20))
    bombs = [raw(lz4.block.compress(bytes(size), store_size=True), flags=1) for size in SIZES]
    (large, just, over) = feed(reader, raw(bytes(5 << 20)) + bombs[0] + bombs[1])
    assert (len(large.payload), len(just.payload)) == (5 << 20, 6 << 20)
    with pytest.raises(PeerError, match="the limit is 6291456"):
        bytes(over.payload)
    with pytest.raises(PeerError, match="the limit is 5242880"):
        feed(reader, raw(b"", length=(5 << 20) + 1))
    reader = FrameReader(Limits())
    reader.begin(started=False)
    (bomb,) = feed(reader, bombs[2])
    with pytest.raises(PeerError, match="the limit is 1048576"):
        bytes(bomb.payload)
    with pytest.raises(PeerError, match="the limit is 1048576"):
        feed(reader, raw(b"", length=repl.JSON_MAX + 1))


BAD = {
    "magic": raw(b"x", magic=b"NMF2"),
    "type": raw(b"x", kind=99),
    "payload sum": raw(b"x", checksum=1),
    "length": raw(b"", length=2**32 - 1),
    "header sum": raw(b"")[:-1] + bytes([raw(b"")[-1] ^ 1]),
    "nbd client": b"NBDMAGICIHAVEOPT".ljust(64, b"\0"),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_bad_frames_end_the_session(data: bytes) -> None:
    with pytest.raises(PeerError):
        feed(FrameReader(Limits()), data)


def test_any_flipped_bit_is_seen() -> None:
    data = bytearray(wire(repl.encode(Type.ACK, 1, [repl.ACK.pack(3, 2, 1)])))
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        with pytest.raises(PeerError):
            feed(FrameReader(Limits()), bytes(data) + bytes(64))
        data[at] ^= 1 << at % 8


def test_frames_before_a_bad_one_are_not_acted_upon_twice() -> None:
    good = wire(repl.encode(Type.PING, 1, []))
    reader = FrameReader(Limits())
    assert len(feed(reader, good)) == 1
    with pytest.raises(PeerError):
        feed(reader, BAD["type"])


PACKED = {
    "cut": b"\1\0",
    "size beyond the limit": struct.pack("<I", FRAME_MAX + 1) + bytes(8),
    "not lz4": struct.pack("<I", 1000) + b"\xff" * 9,
    "larger than declared": struct.pack("<I", 10)
    + lz4.block.compress(bytes(1000), store_size=False),
}


@pytest.mark.parametrize("payload", PACKED.values(), ids=PACKED.keys())
def test_damaged_compression_is_refused(payload: bytes) -> None:
    frame = one(raw(payload, flags=1))
    with pytest.raises(PeerError):
        bytes(frame.payload)


def test_a_declared_size_beyond_the_limit_allocates_nothing() -> None:
    packed = lz4.block.compress(bytes(FRAME_MAX + 1), store_size=True)
    with pytest.raises(PeerError, match="limit"):
        bytes(one(raw(packed, flags=1)).payload)


def test_compressed_frames_that_wait_cost_what_they_cost_on_the_wire() -> None:
    """I6: a slab of lz4 bombs must not become a gigabyte before anybody looks at the queue."""
    bomb = lz4.block.compress(bytes(FRAME_MAX), store_size=True)
    data = raw(bomb, flags=1) * 40
    reader = FrameReader(Limits())
    tracemalloc.start()
    try:
        frames = feed(reader, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(frames) == 40
    assert peak < 3 * FRAME_MAX, f"{peak >> 20} MiB for {len(data) >> 10} KiB"
    assert len(frames[0].payload) == FRAME_MAX


JSON = {
    "no json": b"{",
    "no object": b"[1]",
    "not text": b"\xff\xfe{}",
    "too deep": b"[" * 100_000,
    "too long": b'{"a":"' + b"x" * repl.JSON_MAX + b'"}',
    "too many digits": b'{"a":' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("payload", JSON.values(), ids=JSON.keys())
def test_bad_json_is_the_peers_fault(payload: bytes) -> None:
    """I9: nothing but PeerError, so that one answer fits all: close the session."""
    with pytest.raises(PeerError):
        one(wire(repl.encode(Type.HELLO, 1, [payload]))).json()


def test_json_round_trip() -> None:
    value = {"a": [1, None, "ä"], "b": {"c": True}}
    assert one(wire(repl.encode_json(Type.START, 5, value))).json() == value


@pytest.mark.parametrize(
    ("layout", "kind"),
    [(repl.ACK, Type.ACK), (repl.REGION, Type.REGION), (repl.SEQ, Type.CONSISTENT)],
)
def test_a_fixed_part_cut_short_is_refused(layout: struct.Struct, kind: Type) -> None:
    with pytest.raises(PeerError, match="cut short"):
        one(wire(repl.encode(kind, 1, [bytes(layout.size - 1)]))).unpack(layout)
    assert len(one(wire(repl.encode(kind, 1, [bytes(layout.size + 5)]))).unpack(layout)) >= 1


def test_payloads_stay_valid_while_later_frames_arrive() -> None:
    """The log keeps views into the slab: they must never be written over."""
    reader = FrameReader(Limits())
    kept = []
    for number in range(300):
        payload = bytes([number % 256]) * 40_000
        kept += feed(reader, wire(repl.encode(Type.RECORDS, 1, [payload])))
    for number, frame in enumerate(kept):
        assert bytes(frame.payload) == bytes([number % 256]) * 40_000
