"""Both forms of ``codec.batch`` give the same, whatever they are given (X6)."""

from __future__ import annotations

import random
import struct
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmirror.codec import batch, batchpure, nbd, record
from nbdmirror.codec.batchpure import PLACE

_batch = pytest.importorskip("nbdmirror.codec._batch", reason="there was no compiler")
FORMS: list[ModuleType] = [batchpure, _batch]

SIZE = 1 << 20
SIZES = struct.pack("<QQ", SIZE, 8192)
EPOCH = 3


def request(offset: int, data: bytes, *, flags: int = 0, kind: int = nbd.WRITE) -> bytes:
    head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, offset ^ 77, offset, len(data))
    return head + (data if kind == nbd.WRITE else b"")


writes = st.builds(
    request,
    st.one_of(st.integers(0, SIZE + 10), st.integers(2**64 - 20, 2**64 - 1)),
    st.binary(max_size=200),
    flags=st.sampled_from([0, 0, 0, 0, 1]),
    kind=st.sampled_from([nbd.WRITE] * 6 + [nbd.READ]),
)
conversations = st.lists(st.one_of(writes, writes, writes, st.binary(max_size=40)), max_size=12)


@given(conversations.map(b"".join), st.integers(1, 250), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=400, deadline=None)
def test_requests_are_taken_alike(data: bytes, length_max: int, start: int, cut: int) -> None:
    """Whole plain writes are taken, up to the first other thing."""
    start = min(start, len(data)) if data else 0
    end = max(start, len(data) - cut)
    plain, fast = (form.take_writes(data, start, end, length_max, SIZE) for form in FORMS)
    assert plain == fast
    stop, places, replies, longest = plain
    assert start <= stop <= end and len(places) // PLACE.size == len(replies) // 16
    found = list(PLACE.iter_unpack(places))
    assert longest == max((length for _, _, length, _ in found), default=0) <= length_max
    assert all(offset + length <= SIZE and at + length <= stop for offset, at, length, _ in found)


@given(st.lists(st.tuples(st.integers(0, SIZE), st.binary(min_size=1, max_size=300)), max_size=8))
@settings(max_examples=200, deadline=None)
def test_records_are_encoded_as_one_by_one(changes: list[tuple[int, bytes]]) -> None:
    """A batch of records is, byte for byte, what ``record.encode`` makes of each."""
    data = b"".join(request(offset, payload) for offset, payload in changes)
    _, places, _, _ = batchpure.take_writes(data, 0, len(data), 1000, 1 << 40)
    plain, fast = (form.encode_writes(data, places, EPOCH, 1, 500, 77) for form in FORMS)
    assert plain == fast
    block, found = plain
    singly = [
        record.Record(record.WRITE, 0, EPOCH, 1, 500 + n, offset, len(payload), 77, payload)
        for n, (offset, payload) in enumerate(changes)
    ]
    assert block == b"".join(part for one in singly for part in record.encode(one))
    assert [(o, bytes(d)) for o, d in batch.pieces(block, found, 1)] == changes
    assert list(batch.pieces(block, found, 0)) == []
    assert batch.volumes_of(found) == ([1] if changes else [])


@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(1, 5000)), max_size=8))
def test_stretches_are_those_that_are_touched(ranges: list[tuple[int, int]]) -> None:
    places = b"".join(PLACE.pack(offset, 0, length, 0) for offset, length in ranges)
    plain, fast = (form.stretches(places, 1024) for form in FORMS)
    assert plain == fast
    assert sorted(set(plain)) == sorted(
        {at // 1024 for offset, length in ranges for at in range(offset, offset + length)}
    )


def block_of(draw: random.Random) -> bytes:
    """Records as a primary would send them, now and then with something that is not plain."""
    parts = []
    seq = draw.choice([8, 9, 10, 10, 10, 11])
    for _ in range(draw.randrange(6)):
        kind = draw.choice([record.WRITE] * 12 + [record.TRIM])
        volume = draw.choice([0, 0, 0, 1, 1, 2]) if draw.random() < 0.5 else 0
        payload = draw.randbytes(draw.choice([1, 63, 64, 65, 300, 0 if seq % 7 == 0 else 9]))
        offset = draw.choice([0, 512, 4096, 8000, SIZE - 10])
        epoch = draw.choice([EPOCH] * 18 + [EPOCH - 1, EPOCH + 1])
        whole = record.Record(
            kind, 0, epoch, volume, seq, offset, len(payload), 5,
            payload if kind == record.WRITE else None,
        )  # fmt: skip
        parts += record.encode(whole)
        seq += draw.choice([1] * 14 + [0, 2])
    return b"".join(parts)


def test_records_are_checked_alike_and_in_full() -> None:
    """The same verdict on good, odd and damaged records; none that is damaged passes, nor an epoch
    that goes back (X6, O8, O10)."""
    draw = random.Random(5)
    passed = 0
    for _ in range(3000):
        data = bytearray(block_of(draw))
        whole = bytes(data)
        for _ in range(draw.choice([0, 0, 0, 1, 2])):
            if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.1:
            del data[len(data) - draw.randrange(len(data) + 1) :]
        least = draw.choice([0, EPOCH - 1, EPOCH - 1, EPOCH])
        plain, fast = (form.check_writes(bytes(data), 10, least, EPOCH, SIZES) for form in FORMS)
        assert plain == fast
        if plain is None:
            continue
        passed += 1
        start, places, largest, epoch = plain
        found = list(record.parse_all(memoryview(bytes(data))))
        new = [one for one in found if one.seq >= 10]
        assert [(one.offset, one.length, one.volume) for one in new] == [
            (offset, length, volume) for offset, _, length, volume in PLACE.iter_unpack(places)
        ]
        epochs = [least, *(one.epoch for one in new)]
        assert epochs == sorted(epochs) and epochs[-1] == epoch <= EPOCH
        sizes = [record.stored_size(one.kind, one.length) for one in new]
        assert largest == max(sizes, default=0) and start == len(data) - sum(sizes)
        assert bytes(data) == whole[: len(data)] or not _payload_differs(found, whole)
    assert passed > 300


def _payload_differs(found: list[record.Record], whole: bytes) -> bool:
    """Whether any header or payload is another one than was encoded (padding has no checksum)."""
    before = list(record.parse_all(memoryview(whole)))
    return any(bytes(a.payload or b"") != bytes(b.payload or b"") or a[:-1] != b[:-1]
               for a, b in zip(found, before, strict=False))  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_place_beyond_the_buffer_is_refused(form: ModuleType) -> None:
    """A caller's mistake, never a read beyond."""
    with pytest.raises(ValueError):
        form.encode_writes(b"x" * 10, PLACE.pack(0, 8, 3, 0), 1, 0, 1, 0)
