"""When records were taken (X4: lag in seconds), in bounded memory (I6)."""

from __future__ import annotations

from nbdmirror.core.timeline import _ENTRIES_MAX, Timeline

MS = 1_000_000


def test_to_fifty_milliseconds() -> None:
    timeline = Timeline()
    assert timeline.time_of(5) is None
    for seq in range(10, 1000):
        timeline.add(seq, seq * 10 * MS)
    assert timeline.time_of(9) is None
    for seq in range(10, 1000):
        taken = timeline.time_of(seq)
        assert taken is not None and 0 <= seq * 10 * MS - taken < 50 * MS


def test_a_clock_that_was_set_back_is_followed() -> None:
    """Fault 33."""
    timeline = Timeline()
    timeline.add(1, 1000 * MS)
    timeline.add(2, 500 * MS)
    assert (timeline.time_of(1), timeline.time_of(2)) == (1000 * MS, 500 * MS)


def test_trim_keeps_the_answer_for_what_is_left() -> None:
    timeline = Timeline()
    for seq in range(1, 100):
        timeline.add(seq, seq * 100 * MS)
    timeline.trim(50)
    assert timeline.time_of(50) == 5000 * MS
    assert timeline.time_of(49) is None
    timeline.trim(0)
    timeline.trim(10_000)
    assert timeline.time_of(10_000) == 9900 * MS


def test_years_of_writing_stay_bounded_and_the_newest_exact() -> None:
    timeline = Timeline()
    count = 3 * _ENTRIES_MAX
    for seq in range(count):
        timeline.add(seq, seq * 50 * MS)
    assert len(timeline._seqs) <= _ENTRIES_MAX
    assert timeline.time_of(count - 1) == (count - 1) * 50 * MS
    old = timeline.time_of(1000)
    assert old is not None and old <= 1000 * 50 * MS
