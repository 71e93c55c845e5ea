"""When a verify is due (X6)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

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
