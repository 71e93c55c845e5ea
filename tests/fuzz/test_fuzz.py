"""Every target on its seeds, and for a moment on what hypothesis makes of them (I9).

All of it stays under a minute; campaigns are ``make fuzz``.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

WHOLE = [name for name in TARGETS if name.startswith("node_")]


def mutated(seeds: tuple[bytes, ...], length_max: int) -> st.SearchStrategy[bytes]:
    """Seeds cut, spliced, and with bytes replaced; or anything."""

    @st.composite
    def draw(pick: st.DrawFn) -> bytes:
        data = bytearray(pick(st.sampled_from(seeds)) + pick(st.sampled_from(seeds)))
        for _ in range(pick(st.integers(0, 4))):
            if data:
                data[pick(st.integers(0, len(data) - 1))] = pick(st.integers(0, 255))
        cut = pick(st.integers(0, len(data)))
        return bytes(data[:cut] + pick(st.binary(max_size=16)) + data[cut:])[:length_max]

    return st.one_of(draw(), st.binary(max_size=256))


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    """The seeds themselves, whole, cut at every eighth, and twice."""
    target = TARGETS[name]
    for seed in target.seeds:
        for end in {len(seed) * part // 8 for part in range(9)}:
            target.run(seed[:end])
        target.run(seed * 2)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations(name: str) -> None:
    """A first look; what is found here needs no campaign."""
    target = TARGETS[name]

    @settings(
        max_examples=25 if name in WHOLE else 150,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(target.seeds, target.length_max))
    def run(data: bytes) -> None:
        target.run(data)

    run()
