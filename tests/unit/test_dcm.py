"""The data change map in memory (V1, O6, O13): what is marked, in flight, finished."""

from __future__ import annotations

import pytest

from nbdmirror.codec.mappage import BITMAP_BYTES, BITS
from nbdmirror.core.dcm import Dcm

REGIONS = 2 * BITS + 100


def marked(dcm: Dcm) -> list[int]:
    return [region for first, count in dcm.runs() for region in range(first, first + count)]


@pytest.mark.parametrize(
    ("first", "last", "pages"),
    [
        (0, 0, [0]),
        (BITS - 1, BITS - 1, [0]),
        (BITS, BITS, [1]),
        (BITS - 1, BITS, [0, 1]),
        (0, REGIONS - 1, [0, 1, 2]),
        (REGIONS - 1, REGIONS - 1, [2]),
    ],
)
def test_mark_names_the_pages_to_write_once(first: int, last: int, pages: list[int]) -> None:
    """O12: a page that is not named is not made durable."""
    dcm = Dcm(REGIONS)
    assert dcm.mark(first, last) == pages
    assert dcm.count == last - first + 1
    assert list(dcm.runs()) == [(first, last - first + 1)]
    assert dcm.mark(first, last) == [], "nothing new: nothing to write"


def test_overlapping_marks_count_each_region_once() -> None:
    dcm = Dcm(REGIONS)
    dcm.mark(10, 20)
    assert dcm.mark(15, 25) == [0]
    assert dcm.count == 16


def test_fill_then_finish_clears_one_region_and_no_other() -> None:
    dcm = Dcm(REGIONS)
    dcm.fill()
    assert dcm.count == REGIONS
    assert dcm.mark(5, 9) == [], "all is marked already"
    dcm.begin(BITS, 1, 1)
    assert dcm.finish(BITS, 1, 1) == [1]
    assert dcm.count == REGIONS - 1
    assert list(dcm.runs()) == [(0, BITS), (BITS + 1, REGIONS - BITS - 1)]
    assert dcm.mark(BITS, BITS) == [1], "its page is real now and must be written"


def test_a_region_marked_again_in_flight_is_not_finished() -> None:
    """O6, O13: a write after the copy was read keeps the bit."""
    dcm = Dcm(REGIONS)
    dcm.mark(3, 5)
    for region in (3, 4, 5):
        dcm.begin(region, 1, 7)
    assert dcm.mark(4, 4) == []
    assert dcm.finish(3, 1, 7) == [0]
    assert dcm.finish(4, 1, 7) == []
    assert dcm.finish(5, 1, 7) == [0]
    assert marked(dcm) == [4]


def test_only_the_newest_copy_of_a_region_finishes_it() -> None:
    dcm = Dcm(REGIONS)
    dcm.mark(3, 3)
    dcm.begin(3, 1, 1)
    dcm.begin(3, 1, 2)
    assert dcm.finish(3, 1, 1) == []
    assert dcm.is_marked(3)
    assert dcm.finish(3, 1, 2) == [0]
    assert dcm.finish(3, 1, 2) == [], "once"


@pytest.mark.parametrize("lose", ["abandon", "fill", "clear"])
def test_what_was_in_flight_is_not_finished_later(lose: str) -> None:
    """A DONE of a former session, or of before a full resync was asked for, clears nothing."""
    dcm = Dcm(REGIONS)
    dcm.mark(3, 3)
    dcm.begin(3, 1, 1)
    getattr(dcm, lose)()
    before = dcm.count
    assert dcm.finish(3, 1, 1) == []
    assert dcm.count == before == {"abandon": 1, "fill": REGIONS, "clear": 0}[lose]


def test_runs_cross_pages_and_start_anywhere() -> None:
    dcm = Dcm(REGIONS)
    dcm.mark(BITS - 2, BITS + 3)
    dcm.mark(REGIONS - 1, REGIONS - 1)
    assert list(dcm.runs()) == [(BITS - 2, 6), (REGIONS - 1, 1)]
    assert list(dcm.runs(BITS)) == [(BITS, 4), (REGIONS - 1, 1)]
    assert list(dcm.runs(REGIONS - 1)) == [(REGIONS - 1, 1)]
    assert list(dcm.runs(REGIONS)) == []


def test_runs_of_a_filled_map_pass_over_finished_pages() -> None:
    dcm = Dcm(REGIONS)
    dcm.fill()
    for region in range(BITS, 2 * BITS):
        dcm.begin(region, 1, 1)
        dcm.finish(region, 1, 1)
    assert list(dcm.runs()) == [(0, BITS), (2 * BITS, 100)]


def test_a_loaded_page_never_marks_past_the_end() -> None:
    """A page filled with ones on disk holds bits for regions that the volume does not have."""
    dcm = Dcm(REGIONS)
    dcm.load_page(2, b"\xff" * BITMAP_BYTES)
    assert dcm.count == 100
    assert list(dcm.runs()) == [(2 * BITS, 100)]


def test_loading_over_a_default_of_one() -> None:
    dcm = Dcm(REGIONS)
    dcm.fill()
    dcm.load_page(2, bytes(BITMAP_BYTES))
    assert dcm.count == 2 * BITS
    assert list(dcm.runs()) == [(0, 2 * BITS)]


def test_a_huge_volume_costs_what_is_marked() -> None:
    """I7: 64 TiB in regions of 4 KiB."""
    regions = (64 << 40) // 4096
    dcm = Dcm(regions)
    dcm.fill()
    assert list(dcm.runs()) == [(0, regions)]
    dcm.clear()
    dcm.mark(regions - 1, regions - 1)
    assert len(dcm._pages) == 1
    assert dcm.is_marked(regions - 1) and not dcm.is_marked(0)


@pytest.mark.parametrize("how", ["mark", "merge", "singly", "together"])
def test_a_wide_window_clears_only_what_nothing_touched(how: str) -> None:
    """O6, O13: a hole of a million regions is one window; what was marked since stays."""
    dcm = Dcm(4 * BITS)
    dcm.fill()
    dcm.begin(10, 3 * BITS, 1)
    if how == "mark":
        dcm.mark(BITS, BITS + 1)
    elif how == "merge":
        other = Dcm(4 * BITS)
        other.mark(BITS, BITS + 1)
        dcm.merge(other)
    elif how == "singly":
        dcm.begin(BITS, 1, 2)
        dcm.begin(BITS + 1, 1, 2)
    else:
        dcm.begin(BITS, 2, 2)
    assert dcm.finish(10, 3 * BITS, 1) == [0, 1, 2, 3]
    assert list(dcm.runs()) == [(0, 10), (BITS, 2), (3 * BITS + 10, BITS - 10)]
    assert dcm.count == BITS + 2
    assert dcm.finish(10, 3 * BITS, 1) == [], "once"


@pytest.mark.parametrize("lose", ["abandon", "fill", "begin"])
def test_a_wide_window_that_was_lost_clears_nothing(lose: str) -> None:
    dcm = Dcm(4 * BITS)
    dcm.fill()
    dcm.begin(0, BITS, 1)
    if lose == "begin":
        dcm.begin(0, BITS, 2)
    else:
        getattr(dcm, lose)()
    assert dcm.finish(0, BITS, 1) == []
    assert dcm.count == 4 * BITS
