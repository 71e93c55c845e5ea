"""A chain of snapshots against a naive model: each equals its moment for ever (V9)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core import layers
from nbdmirror.core.layers import Layer

REGIONS = 70  # more than a sector's slots

regions = st.integers(0, REGIONS - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), regions),
        st.tuples(st.just("take"), st.just(0)),
        st.tuples(st.just("delete"), st.integers(0, 5)),
    ),
    max_size=60,
)


class Model:
    """A volume, its chain as the engine keeps it, and whole copies to compare with."""

    def __init__(self) -> None:
        self.volume = [0] * REGIONS
        self.value = 0
        self.chain: list[Layer] = []
        self.stores: list[dict[int, int]] = []
        self.copies: list[list[int]] = []
        self.touched: list[set[int]] = []

    def write(self, region: int) -> None:
        if self.chain:
            for old in layers.missing(self.chain[-1], region, region):
                self.chain[-1].set(old, layers.slot_of(old))
                self.stores[-1][old] = self.volume[old]
        self.value += 1
        self.volume[region] = self.value
        for touched in self.touched:
            touched.add(region)

    def take(self, _: int) -> None:
        self.chain.append(Layer(REGIONS))
        self.stores.append({})
        self.copies.append(list(self.volume))
        self.touched.append(set())

    def delete(self, index: int) -> None:
        if index >= len(self.chain):
            return
        if index:
            at = 0
            while found := layers.orphans(self.chain[index - 1], self.chain[index], at, 3):
                for region in found:
                    self.chain[index - 1].set(region, self.chain[index].slot(region))
                    self.stores[index - 1][region] = self.stores[index][region]
                at = found[-1] + 1
        for rows in (self.chain, self.stores, self.copies, self.touched):
            del rows[index]

    def read(self, index: int, region: int) -> int:
        at = layers.holder(self.chain, index, region)
        return self.volume[region] if at is None else self.stores[at][region]


@given(steps)
def test_every_snapshot_equals_its_moment(script: list[tuple[str, int]]) -> None:
    model = Model()
    for name, argument in script:
        getattr(model, name)(argument)
        for index, copy in enumerate(model.copies):
            assert [model.read(index, region) for region in range(REGIONS)] == copy
            found = layers.changed(model.chain, index)
            assert {r for first, n in found.runs() for r in range(first, first + n)} == (
                model.touched[index]
            )


@given(st.dictionaries(regions, st.integers(1, (1 << 64) - 1)))
def test_slots_are_found_again_by_sector(slots: dict[int, int]) -> None:
    layer = Layer(REGIONS)
    for region, slot in slots.items():
        layer.set(region, slot)
    again = Layer(REGIONS)
    for number in range(layer.sector_count):
        for index, slot in enumerate(layer.sector(number)):
            if slot:
                again.set(number * len(layer.sector(number)) + index, slot)
    assert {r: again.slot(r) for r in range(REGIONS)} == {
        r: slots.get(r, 0) for r in range(REGIONS)
    }
    assert again.kept.count == len(slots)


@given(st.integers(0, (1 << 64) - 1))
def test_a_checksum_is_never_taken_for_a_word(checksum: int) -> None:
    slot = layers.slot_of(checksum)
    assert slot > layers.UNREADABLE
    assert not slot & layers.TENTATIVE
