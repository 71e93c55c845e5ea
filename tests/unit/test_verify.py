"""When a verify is due, and what it counts (X6)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbdmirror.engine import verify
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.verify import is_due

DAY = 86_400
NOW = 1_800_000_000


@pytest.mark.parametrize(
    ("finished", "due"),
    [
        (NOW, False),
        (NOW - DAY + 1, False),
        (NOW - DAY, True),
        (NOW + 60, False),
        (NOW + 365 * DAY, True),
    ],
)
def test_a_clock_that_was_ahead_puts_off_no_verify(finished: int, due: bool) -> None:
    """X6: what ended in the future ended while the clock was wrong; by a little, it may have."""
    facts: dict[str, Any] = {
        "consistent": True,
        "verify": None,
        "verify_interval": float(DAY),
        "verified": {"finished_ns": finished * 10**9},
    }
    remote = SimpleNamespace(facts=facts, put_off=False, group=SimpleNamespace(volumes=[]))
    assert is_due(cast(Remote, remote), NOW * 10**9) is due
    assert (facts["verify"] is not None) is due


def test_a_verify_that_goes_on_counts_what_it_finds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """X4: its session ends behind what is noted; the next one comes by the same regions again."""
    told: list[int] = []
    volume = SimpleNamespace(index=0, name="v", size=10 << 20, region_size=1 << 20)
    facts = {"verify": verify.request(repair=False, now_ns=0)}
    remote = SimpleNamespace(name="b", facts=facts, group=SimpleNamespace(volumes=[volume]))
    monkeypatch.setattr(verify, "FOUND_MAX", 2)

    def session() -> Any:
        events = SimpleNamespace(emit=lambda kind, **more: told.append(more["offset"] >> 20))
        anything: Any = SimpleNamespace()
        return verify.Verify(cast(Remote, remote), anything, cast(Any, events), *[anything] * 3)

    first = session()
    first._found(volume, 1, [])
    first._note(0, 4)
    first._state["unsettled"] += 1
    for region in (5, 6):
        first._found(volume, region, [])
    for _ in range(2):
        again = session()
        assert [region for _, region, _ in again._state["found"]] == [1]
        for region in (5, 6):
            again._found(volume, region, [])
    counted = facts["verify"]
    assert (counted["differing"], counted["unsettled"], counted["more_there"]) == (3, 0, 1)
    assert told == [1, 5]
