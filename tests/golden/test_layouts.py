"""Every layout on disk and on the wire, byte for byte: a change of one must change a fixture here,
and with it the version that the layout names. ``python -m tests.golden.test_layouts`` writes the
fixtures anew; the difference is then to be read, not only committed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdmirror.codec import mappage, regions, repl, slots
from nbdmirror.codec import record as codec
from nbdmirror.codec.mark import Mark
from nbdmirror.codec.record import Record
from nbdmirror.codec.repl import Type
from nbdmirror.config import Limits
from nbdmirror.core import layers
from nbdmirror.ports import Buffer

FIXTURES = Path(__file__).parent
KEY = bytes(range(0xF0, 0x100))
SESSION = 0x1122334455667788
TIME = 1_700_000_000_123_456_789
WRITE = Record(codec.WRITE, 0, 3, 1, 0x0102030405060708, 4096, 5, TIME, b"hello")
MARK = Mark("snapshot", "0123456789abcdef" * 2, (0, 2), 7, True).encode()


def record(value: Record) -> bytes:
    return b"".join(codec.encode(value))


def frame(kind: Type, *parts: Buffer, compress: bool = False) -> bytes:
    return b"".join(repl.encode(kind, SESSION, list(parts), compress=compress))


def json(kind: Type, value: dict[str, object]) -> bytes:
    return b"".join(repl.encode_json(kind, SESSION, value))


def layouts() -> dict[str, bytes]:
    bits = b"\x01\x80" + bytes(mappage.BITMAP_BYTES - 2)
    zeros: regions.Extent = (0, 1 << 30, None)
    data: regions.Extent = (1 << 30, 4, b"data")
    verify = repl.VERIFY.pack(9, 1, 65536, 0, 131072, KEY, 77)
    hashes = repl.HASHES.pack(8, 1, 65536, 0, 131072, KEY)
    return {
        "record-write": record(WRITE),
        "record-trim": record(Record(codec.TRIM, 0, 3, 1, 9, 4096, 1 << 40, TIME, None)),
        "record-zero": record(Record(codec.ZERO, codec.NO_HOLE, 3, 1, 10, 0, 512, TIME, None)),
        "record-fill": codec.fill(3, 11, 128),
        "record-mark": record(Record(codec.MARK, 0, 3, 0, 12, 0, len(MARK), TIME, MARK)),
        "layer-sector": mappage.encode_sector(
            2, [layers.ZEROS, 1 << 63 | 12345, *[0] * (mappage.SLOTS - 2)], mappage.LAYER
        ).rstrip(b"\0"),
        "superblock-slot": slots.encode(5, {"format": 1, "epoch": 2}).rstrip(b"\0"),
        "map-page": mappage.encode_page(3, bits).rstrip(b"\0"),
        "active-sector": mappage.encode_sector(
            2, [1 + (1 << 40 | 5), *[0] * (mappage.SLOTS - 1)]
        ).rstrip(b"\0"),
        "frame-hello": json(Type.HELLO, {"versions": [3, 3], "group": "g"}),
        "frame-welcome": json(Type.WELCOME, {"version": 3}),
        "frame-refuse": json(Type.REFUSE, {"rule": "T1", "why": "x"}),
        "frame-start": json(Type.START, {"action": "continue", "seq": 1}),
        "frame-ready": json(Type.READY, {}),
        "frame-records": frame(Type.RECORDS, *codec.encode(WRITE)),
        "frame-ack": frame(Type.ACK, repl.ACK.pack(3, 2, 1)),
        "frame-region": frame(Type.REGION, *regions.pack_region(7, 1, [zeros, data], more=False)),
        "frame-region-more": frame(Type.REGION, *regions.pack_region(7, 1, [data], more=True)),
        "frame-verify": frame(Type.VERIFY, verify, bytes(range(32))),
        "frame-verified": frame(Type.VERIFIED, repl.TOKEN.pack(9), b"\1\0"),
        "frame-hashes": frame(Type.HASHES, hashes, bytes(range(32))),
        "frame-want": frame(Type.WANT, repl.TOKEN.pack(8), b"\1\0", bytes(range(16)) * 16),
        "frame-done": frame(Type.DONE, repl.TOKEN.pack(7), repl.TOKEN.pack(8)),
        "frame-copies": frame(Type.COPIES, repl.COPIES.pack(12)),
        "frame-resync-end": frame(Type.RESYNC_END, repl.SEQ.pack(99)),
        "frame-consistent": frame(Type.CONSISTENT, repl.SEQ.pack(99)),
        "frame-ping": frame(Type.PING),
        "frame-read": frame(Type.READ, repl.READ.pack(9, 1, 0, 65536, 4096)),
        "frame-data": frame(Type.DATA, repl.DATA.pack(9, 41, 0), b"data"),
    }


def hexed(data: bytes) -> str:
    lines = (data[at : at + 16] for at in range(0, len(data), 16))
    return "".join(f"{line.hex(' ', 4)}\n" for line in lines)


def stored(name: str) -> bytes:
    return bytes.fromhex((FIXTURES / f"{name}.hex").read_text())


@pytest.mark.parametrize("name", sorted(layouts()))
def test_layout(name: str) -> None:
    assert hexed(layouts()[name]) == (FIXTURES / f"{name}.hex").read_text()


def test_every_frame_type_has_a_fixture_and_no_fixture_is_left_over() -> None:
    names = {path.stem for path in FIXTURES.glob("*.hex")}
    assert names == {*layouts(), "frame-compressed"}
    for kind in Type:
        assert f"frame-{kind.name.lower().replace('_', '-')}" in names


def test_the_fixtures_are_read_by_the_code() -> None:
    """The other direction: what an older program wrote is still understood."""

    assert codec.parse(memoryview(stored("record-write")), 0) == WRITE
    assert codec.parse(memoryview(stored("record-zero")), 0).flags == codec.NO_HOLE
    assert slots.decode(stored("superblock-slot")) == (5, {"format": 1, "epoch": 2})
    page = mappage.decode_page(3, stored("map-page").ljust(mappage.PAGE_SIZE, b"\0"))
    assert page is not None and page[:3] == b"\x01\x80\0"
    sector = stored("active-sector").ljust(mappage.SECTOR_SIZE, b"\0")
    assert mappage.decode_sector(2, sector)[0] == 1 + (1 << 40 | 5)
    for name in sorted(layouts()):
        if name.startswith("frame-"):
            assert received(name).session == SESSION


def received(name: str) -> repl.Frame:
    data = stored(name)
    reader = repl.FrameReader(Limits())
    reader.get_buffer()[: len(data)] = data
    (found,) = reader.received(len(data))
    return found


def test_a_compressed_frame_is_read() -> None:
    """Not compared byte for byte: another lz4 may pack otherwise."""
    found = received("frame-compressed")
    assert (found.type, bytes(found.payload)) == (Type.RECORDS, bytes(600))


if __name__ == "__main__":
    for fixture, content in layouts().items():
        (FIXTURES / f"{fixture}.hex").write_text(hexed(content))
