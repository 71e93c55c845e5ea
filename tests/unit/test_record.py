"""The log record (X6, O10, O17): what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.codec.record import NO_HOLE, Record
from nbdmirror.errors import FormatError

DATA = bytes(range(200))
WRITE = Record(codec.WRITE, 0, 3, 1, 7, 4096, len(DATA), 1_700_000_000_000_000_000, DATA)
TRIM = Record(codec.TRIM, 0, 3, 0, 8, 0, 1 << 40, 5, None)
ZERO = Record(codec.ZERO, NO_HOLE, 2**32 - 1, 2**32 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 0, None)


def encoded(record: Record) -> bytearray:
    return bytearray(b"".join(codec.encode(record)))


@pytest.mark.parametrize("record", [WRITE, TRIM, ZERO], ids=["write", "trim", "zero"])
def test_round_trip(record: Record) -> None:
    data = encoded(record)
    assert len(data) == codec.stored_size(record.kind, record.length)
    assert len(data) % codec.ALIGNMENT == 0
    assert codec.parse(memoryview(data), 0) == record
    header, size = codec.parse_header(memoryview(data), 0)
    assert (header, size) == (record._replace(payload=None), len(data))


def test_any_flipped_bit_of_header_or_payload_is_refused() -> None:
    data = encoded(WRITE)
    for at in range(codec.HEADER_SIZE + len(DATA)):
        data[at] ^= 1 << at % 8
        with pytest.raises(FormatError):
            codec.parse(memoryview(data), 0)
        data[at] ^= 1 << at % 8
    assert codec.parse(memoryview(data), 0) == WRITE


def test_any_cut_is_refused() -> None:
    data = encoded(WRITE)
    for length in range(codec.HEADER_SIZE + len(DATA)):
        with pytest.raises(FormatError):
            codec.parse(memoryview(data)[:length], 0)


def test_payload_of_one_record_does_not_fit_the_header_of_another() -> None:
    """O10, w8: a torn record, new header over old payload, is not a record."""
    old = encoded(WRITE._replace(payload=bytes(200)))
    new = encoded(WRITE)
    torn = new[: codec.HEADER_SIZE] + old[codec.HEADER_SIZE :]
    with pytest.raises(FormatError, match="payload checksum"):
        codec.parse(memoryview(torn), 0)
    assert codec.parse(memoryview(torn), 0, verify_payload=False).seq == 7


def test_a_stranger_with_a_right_checksum_is_refused() -> None:
    """I9: kind, place, version and length are checked even where the sums are right."""
    long = codec.encode_header(codec.WRITE, 0, 1, 0, 1, 0, codec.PAYLOAD_MAX + 1, 0, b"")
    with pytest.raises(FormatError, match="too long"):
        codec.parse(memoryview(long + bytes(codec.PAYLOAD_MAX + 1)), 0)
    kind = codec.encode_header(9, 0, 1, 0, 1, 0, 0, 0, None)
    with pytest.raises(FormatError, match="unknown kind 9"):
        codec.parse(memoryview(kind), 0)
    for volume, offset in ((1, 0), (0, 512)):
        stray = Record(codec.MARK, 0, 1, volume, 1, offset, 2, 0, b"{}")
        with pytest.raises(FormatError, match="mark 1 is at"):
            codec.parse(memoryview(encoded(stray)), 0)
    later = bytearray(encoded(TRIM))
    later[4] = 2
    with pytest.raises(FormatError, match="version 2"):
        codec.parse(memoryview(later), 0)


def test_a_fill_takes_up_its_space_and_carries_the_next_seq() -> None:
    for space in (64, 128, 1 << 20):
        header = codec.fill(4, 9, space)
        record = codec.parse(memoryview(header), 0)
        assert (record.kind, record.epoch, record.seq) == (codec.FILL, 4, 9)
        assert codec.stored_size(record.kind, record.length) == space


def test_parse_all_walks_records_of_every_kind() -> None:
    records = [WRITE, TRIM, WRITE._replace(seq=9, length=64, payload=bytes(64)), ZERO]
    data = b"".join(bytes(encoded(record)) for record in records)
    assert list(codec.parse_all(memoryview(data))) == records


@pytest.mark.parametrize(("length", "padded"), [(0, 0), (1, 64), (63, 64), (64, 64), (65, 128)])
def test_padding(length: int, padded: int) -> None:
    assert length + len(codec.padding(length)) == padded
    assert codec.stored_size(codec.WRITE, length) == codec.HEADER_SIZE + padded


@pytest.mark.parametrize("at", range(0, codec.HEADER_SIZE, 8))
def test_what_damage_left_of_a_header_is_known(at: int) -> None:
    """X6: eight bytes anywhere; the seq itself may be among them."""
    data = encoded(WRITE)
    data[at : at + 8] = b"\xa5" * 8
    assert codec.was_header(bytes(data[: codec.HEADER_SIZE]), WRITE.seq)


def test_numbers_in_an_older_record_are_no_header() -> None:
    """I4: what a record of an earlier lap carried may have the next seq where a header would have
    it; a start within one boot would take that for damage, and compare everything."""
    assert not codec.was_header(WRITE.seq.to_bytes(8, "little") * 8, WRITE.seq)
