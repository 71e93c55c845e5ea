"""Pages of the durable maps (X6, O17): rot, tears and misdirected writes (fault 16) are seen."""

from __future__ import annotations

import pytest

from nbdmirror.codec import mappage
from nbdmirror.errors import FormatError

BITS = bytes(range(256)) * 15 + bytes(mappage.BITMAP_BYTES - 3840)


def test_page_round_trip() -> None:
    page = mappage.encode_page(5, BITS)
    assert len(page) == mappage.PAGE_SIZE
    assert mappage.decode_page(5, page) == BITS
    assert mappage.decode_page(5, bytes(mappage.PAGE_SIZE)) is None


def test_sector_round_trip() -> None:
    slots = [1 + (3 << 40 | 17), *range(mappage.SLOTS - 1)]
    sector = mappage.encode_sector(2, slots)
    assert len(sector) == mappage.SECTOR_SIZE
    assert mappage.decode_sector(2, sector) == slots
    assert mappage.decode_sector(2, bytes(mappage.SECTOR_SIZE)) == [0] * mappage.SLOTS


@pytest.mark.parametrize("at", [*range(24), 24, 25, 511, 512, 4095])
def test_a_flipped_bit_is_seen(at: int) -> None:
    page = bytearray(mappage.encode_page(5, BITS))
    page[at] ^= 0x40
    with pytest.raises(FormatError):
        mappage.decode_page(5, page)


def test_a_torn_page_is_seen() -> None:
    """O17: of eight sectors any may be the old ones."""
    old, new = mappage.encode_page(5, bytes(mappage.BITMAP_BYTES)), mappage.encode_page(5, BITS)
    for sector in range(8):
        torn = bytearray(new)
        torn[sector * 512 : sector * 512 + 512] = old[sector * 512 : sector * 512 + 512]
        if torn != new:
            with pytest.raises(FormatError):
                mappage.decode_page(5, torn)


def test_a_page_that_never_landed_where_its_head_did_is_not_taken_for_unwritten() -> None:
    page = bytearray(mappage.PAGE_SIZE)
    page[4000] = 1
    with pytest.raises(FormatError, match="magic"):
        mappage.decode_page(0, page)


def test_a_misdirected_write_is_seen() -> None:
    with pytest.raises(FormatError, match="page 6 holds page 5"):
        mappage.decode_page(6, mappage.encode_page(5, BITS))


def test_a_page_is_no_sector() -> None:
    slots = [7] * mappage.SLOTS
    with pytest.raises(FormatError, match="magic"):
        mappage.decode_sector(5, mappage.encode_page(5, BITS)[:512])
    with pytest.raises(FormatError, match="magic"):
        mappage.decode_page(5, mappage.encode_sector(5, slots).ljust(4096, b"\0"))
