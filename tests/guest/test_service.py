"""``deploy/``: the units under a real systemd, with a real ``/dev/nbd0``; O16 and X7 among them."""

from __future__ import annotations

from tests.guest import guest
from tests.guest.kernel import TREE

SECONDS = 900.0


def test_units() -> None:
    """Start, lock-down, restarts that must be and one that must not, attachment, stop."""
    guest.run("service", SECONDS, environment={"TREE": str(TREE)}).check()
