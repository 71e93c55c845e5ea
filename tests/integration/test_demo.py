"""``nbdmirror demo``: the tour of the main job, as anybody would take it (A6; I2)."""

from __future__ import annotations

from tests.integration.cluster import MIB, nbdmirror


def test_the_tour_ends_well_and_tells_each_step() -> None:
    """It writes, loses the second node, overflows the log, heals, and both facets are the same."""
    result = nbdmirror("demo", "--json", timeout=170)
    assert result.code == 0, result
    assert result.err == ""
    told = result.lines
    assert [one["step"] for one in told] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [one["equal"] for one in told if "equal" in one] == [True, True]
    assert [one["state"] for one in told if "state" in one] == ["tracking"]
    (dirty,) = [one["dirty_regions"] for one in told if "dirty_regions" in one]
    assert 128 * MIB <= dirty * (64 << 10) <= 256 * MIB
