"""The ring's arithmetic: places, gaps, room, the index, and two tails (O5)."""

from __future__ import annotations

import pytest

from nbdmirror.core.ring import INDEX_STEP, Ring


@pytest.mark.parametrize(
    ("head", "size", "gap"),
    [(0, 4096, 0), (64, 4096, 4032), (4032, 64, 0), (4032, 128, 64), (4096 * 7 + 64, 4096, 4032)],
)
def test_gap(head: int, size: int, gap: int) -> None:
    assert Ring(4096, head, 1).gap(size) == gap


def test_room_counts_from_the_durable_tail() -> None:
    """O5: space is free only when a durable tail says so."""
    ring = Ring(8192, 0, 1)
    ring.advance(1, 1, 4096)
    assert (ring.used, ring.room()) == (4096, 8192 - 4096 - 64)
    ring.release(2, 4096)
    assert (ring.used, ring.room()) == (0, 8192 - 4096 - 64)
    ring.durable_tail = ring.tail
    assert ring.room() == 8192 - 64


def test_more_than_there_is_room_for_is_a_mistake() -> None:
    ring = Ring(4096, 0, 1)
    ring.advance(1, 1, 4096)
    with pytest.raises(AssertionError):
        ring.advance(2, 1, 64)
    with pytest.raises(AssertionError):
        Ring(4096, 0, 5).advance(6, 1, 64)


def test_locate_never_starts_behind_the_wanted_record() -> None:
    size = 4096
    ring = Ring(1 << 22, 128 * size, 10)
    positions = {}
    for seq in range(10, 210):
        positions[seq] = ring.head
        ring.advance(seq, 1, size)
    for seq in range(10, 211):
        found, position = ring.locate(seq)
        assert found <= seq and positions[found] == position
        assert seq - found <= INDEX_STEP // size
    for seq in (10, 11, 42, 100, 209):
        ring.release(seq, positions[seq])
        assert ring.locate(seq) == (seq, positions[seq])
        for later in range(seq, 211):
            found, position = ring.locate(later)
            assert seq <= found <= later and positions[found] == position
        assert (ring.tail, ring.tail_seq) == (positions[seq], seq)
    ring.release(210, ring.head)
    assert ring.locate(210) == (210, ring.head)
    assert ring.used == 0


def test_the_index_stays_small() -> None:
    """I6."""
    ring = Ring(1 << 30, 0, 1)
    for seq in range(1, 20_001):
        ring.advance(seq, 1, 8192)
    assert len(ring._index_seqs) <= 20_000 * 8192 // INDEX_STEP + 1


def test_a_release_goes_forward_only() -> None:
    ring = Ring(8192, 0, 1)
    ring.advance(1, 1, 64)
    ring.advance(2, 1, 64)
    ring.release(2, 64)
    for seq, position in ((1, 0), (4, 128), (3, 256)):
        with pytest.raises(AssertionError):
            ring.release(seq, position)
