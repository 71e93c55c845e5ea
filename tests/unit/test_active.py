"""The active map's slots (O1, O6): who is in, who may go, and what is on disk meanwhile."""

from __future__ import annotations

import pytest

from nbdmirror.codec.mappage import SLOTS
from nbdmirror.core.active import ActiveMap, key_of, volume_extent


def admitted(map_: ActiveMap, keys: list[int], safe_seq: int = 0) -> list[int]:
    sectors = map_.admit(keys, safe_seq)
    assert sectors is not None
    map_.enter(keys)
    return sectors


def on_disk(map_: ActiveMap) -> list[int]:
    values = [v for n in range(map_.sectors) for v in map_.sector(n)]
    return sorted(value - 1 for value in values if value)


@pytest.mark.parametrize(
    ("volume", "extent"), [(0, 0), (1, 0), (0, (1 << 40) - 1), (2**23 - 2, (1 << 40) - 1)]
)
def test_keys(volume: int, extent: int) -> None:
    key = key_of(volume, extent)
    assert volume_extent(key) == (volume, extent)
    assert 0 < key + 1 < 2**64


def test_an_extent_is_not_in_before_it_was_entered() -> None:
    """O1: between admit and enter its sector is being made durable."""
    map_ = ActiveMap(SLOTS)
    assert map_.admit([5], 0) == [0]
    assert 5 not in map_.hot
    assert on_disk(map_) == [5]
    map_.enter([5])
    assert 5 in map_.hot


def test_only_safe_extents_make_room() -> None:
    """O6: compared are seqs; the extent written last stays longest."""
    map_ = ActiveMap(SLOTS)
    admitted(map_, list(range(SLOTS)))
    for key in range(SLOTS):
        map_.hot[key] = 100 + key
    assert map_.admit([1000], 99) is None
    assert map_.admit([1000], 100) is not None
    map_.enter([1000])
    assert 0 not in map_.hot, "written at 100"
    assert all(key in map_.hot for key in range(1, SLOTS))
    assert 1000 in on_disk(map_) and 0 not in on_disk(map_)


def test_a_refused_admission_changes_no_extent_that_is_not_safe() -> None:
    map_ = ActiveMap(SLOTS)
    admitted(map_, list(range(SLOTS)))
    for key in range(SLOTS):
        map_.hot[key] = 10
    map_.hot[7] = 1
    assert map_.admit([1000, 1001], 5) is None
    assert sorted(map_.hot) == [key for key in range(SLOTS) if key != 7]
    assert admitted(map_, [7], 5) is not None


def test_withdrawn_extents_give_their_slots_back() -> None:
    map_ = ActiveMap(SLOTS)
    keys = list(range(SLOTS))
    assert map_.admit(keys, 0) is not None
    map_.withdraw(keys)
    assert map_.hot == {} and on_disk(map_) == []
    admitted(map_, keys)
    assert sorted(map_.hot) == keys


def test_admit_names_every_sector_that_it_changed() -> None:
    map_ = ActiveMap(3 * SLOTS)
    before = [map_.sector(n) for n in range(map_.sectors)]
    sectors = admitted(map_, list(range(SLOTS + 5)))
    changed = [n for n in range(map_.sectors) if map_.sector(n) != before[n]]
    assert sorted(sectors) == changed
    assert len(changed) == 2


def test_load_takes_over_and_counts_a_double_once() -> None:
    map_ = ActiveMap(2 * SLOTS)
    first = [10 + 1, 0, 11 + 1] + [0] * (SLOTS - 3)
    second = [11 + 1, 12 + 1] + [0] * (SLOTS - 2)
    map_.load(0, first)
    map_.load(1, second)
    assert map_.hot == {10: 0, 11: 0, 12: 0}
    free = 2 * SLOTS - 3
    admitted(map_, list(range(1000, 1000 + free)))
    assert len(on_disk(map_)) == 2 * SLOTS
    assert len(set(on_disk(map_))) == 2 * SLOTS, "no slot was given away twice"


def test_drop_safe_keeps_what_is_not() -> None:
    map_ = ActiveMap(SLOTS)
    admitted(map_, [1, 2, 3])
    map_.hot.update({1: 5, 2: 6, 3: 7})
    assert map_.drop_safe(6) == [0]
    assert map_.hot == {3: 7}
    assert on_disk(map_) == [3]


def test_loading_a_large_map_is_linear() -> None:
    sectors = 1100
    map_ = ActiveMap(sectors * SLOTS)
    for sector in range(sectors):
        map_.load(sector, [1 + sector * SLOTS + n for n in range(SLOTS)])
    assert len(map_.hot) == sectors * SLOTS
