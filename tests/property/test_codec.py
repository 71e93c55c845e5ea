"""Records and frames under any content, any corruption, any split of the bytes (I9, X6)."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmirror.codec import mappage, repl, slots
from nbdmirror.codec import record as codec
from nbdmirror.codec.record import Record
from nbdmirror.codec.repl import Frame, FrameReader, Type
from nbdmirror.config import Limits
from nbdmirror.errors import FormatError, PeerError

u8, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 32, 64))


@st.composite
def records(draw: st.DrawFn) -> Record:
    kind = draw(st.sampled_from([codec.WRITE, codec.TRIM, codec.ZERO]))
    payload = draw(st.binary(max_size=300)) if kind == codec.WRITE else None
    length = len(payload) if payload is not None else draw(u64)
    return Record(
        kind, draw(u8), draw(u32), draw(u32), draw(u64), draw(u64), length, draw(u64), payload
    )


def encoded(record: Record) -> bytes:
    return b"".join(codec.encode(record))


@given(st.lists(records(), max_size=6))
def test_records_round_trip(written: list[Record]) -> None:
    data = memoryview(b"".join(map(encoded, written)))
    assert list(codec.parse_all(data)) == written


@given(records(), st.data())
def test_a_corrupted_record_is_refused(record: Record, data: st.DataObject) -> None:
    whole = encoded(record)
    guarded = codec.HEADER_SIZE + len(record.payload or b"")
    at = data.draw(st.integers(0, guarded - 1))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(FormatError):
        codec.parse(memoryview(damaged), 0)
        raise AssertionError(f"byte {at} of {guarded} is not guarded")


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_by_everything(data: bytes) -> None:
    view = memoryview(data)
    for parse in (
        lambda: list(codec.parse_all(view)) or [codec.parse(view, 0)],
        lambda: codec.parse_header(view, 0),
        lambda: slots.decode(data),
        lambda: mappage.decode_page(0, data.ljust(mappage.PAGE_SIZE, b"\1")),
        lambda: mappage.decode_sector(0, data.ljust(mappage.SECTOR_SIZE, b"\1")),
    ):
        with contextlib.suppress(FormatError):
            parse()
            raise AssertionError("taken")


def split(data: bytes, sizes: list[int]) -> list[Frame]:
    reader, found, at = FrameReader(Limits()), [], 0
    turn = 0
    while at < len(data):
        buffer = reader.get_buffer()
        count = min(sizes[turn % len(sizes)] if sizes else 1 << 20, len(buffer), len(data) - at)
        buffer[:count] = data[at : at + count]
        at, turn = at + count, turn + 1
        found += reader.received(count)
    return found


frames = st.tuples(st.sampled_from(list(Type)), u64, st.binary(max_size=2000), st.booleans())


@settings(max_examples=60)
@given(st.lists(frames, max_size=8), st.lists(st.integers(1, 700), max_size=5))
def test_frames_in_any_split(sent: list[tuple[Type, int, bytes, bool]], sizes: list[int]) -> None:
    data = b"".join(
        b"".join(repl.encode(kind, session, [payload], compress=compress))
        for kind, session, payload, compress in sent
    )
    found = [(f.type, f.session, bytes(f.payload)) for f in split(data, sizes)]
    assert found == [(kind, session, payload) for kind, session, payload, _ in sent]


@given(st.binary(max_size=300), st.lists(st.integers(1, 50), max_size=5))
def test_random_bytes_never_make_a_frame(data: bytes, sizes: list[int]) -> None:
    with contextlib.suppress(PeerError):
        assert split(data, sizes) == []


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5), u64)
def test_superblock_round_trip(state: dict[str, Any], counter: int) -> None:
    slot = slots.encode(counter, state)
    assert slots.decode(slot) == (counter, state)
    assert slots.choose([bytes(512), slot])[0] == 1
