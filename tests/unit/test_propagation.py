"""V11 decision by decision, and V14's refusal."""

from __future__ import annotations

import pytest

from nbdmirror.core.propagation import Link, Step, decide

ACTIVE = Link(active=True, tracking=False, trackable=True, pending=0)

CASES = {
    "not active": (Link(False, False, True, 0), Step.NOTHING),
    "not active, whatever is pending": (Link(False, True, False, 9), Step.NOTHING),
    "tracking": (Link(True, True, True, 0), Step.MERGE),
    "tracking: what is pending is marked already": (Link(True, True, True, 9), Step.MERGE),
    "active": (ACTIVE, Step.SWITCH),
    "active with pending updates": (Link(True, False, True, 9), Step.MARK_PENDING),
    "active, and changes are not tracked": (Link(True, False, False, 9), Step.REFUSE),
}


@pytest.mark.parametrize("name", CASES)
def test_each_case(name: str) -> None:
    link, step = CASES[name]
    assert decide(link, force=False) is step


def test_force_makes_the_link_inactive_and_compares_everything() -> None:
    """V14."""
    assert decide(Link(True, False, False, 0), force=True) is Step.FULL
    assert decide(ACTIVE, force=True) is Step.SWITCH, "force forces nothing that is not needed"
