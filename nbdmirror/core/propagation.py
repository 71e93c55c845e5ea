"""How a change that goes by the write path reaches a remote (V11, V14): one decision per remote.

Such a change (a restore, an import) is not in the log, so the log alone cannot bring the remote
along: its regions are marked in the remote's DCM, and everything around it too, until a resync has
passed. In the words of V11, first match wins:

    not active             nothing was agreed upon yet: all is marked as it is
    not tracked            order must never be given up by itself (``on_full = "block"``), so there
                           is no tracking by map: an error, or, forced, a full comparison
    tracking               the map takes the regions in
    active, pending        pending entries are marked, every later change is marked, then as above
    active, none pending   every later change is marked, then as above
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Step(Enum):
    """What is done for one remote before the regions are ORed into its DCM."""

    NOTHING = "everything is marked already"
    REFUSE = "its changes are not tracked"
    FULL = "the link is made inactive, and everything is compared"
    MERGE = "its changes are tracked already"
    SWITCH = "it goes to DCM logging"
    MARK_PENDING = "its pending entries are marked, and it goes to DCM logging"


@dataclass(frozen=True, slots=True)
class Link:
    """What is known of a remote."""

    active: bool
    """A stream was agreed upon once, and nothing is marked as a whole."""
    tracking: bool
    trackable: bool
    """Whether it may go to DCM logging at all."""
    pending: int
    """Records that it does not have durably."""


def decide(link: Link, *, force: bool) -> Step:
    """The step for a remote."""
    if not link.active:
        return Step.NOTHING
    if link.tracking:
        return Step.MERGE
    if not link.trackable:
        return Step.FULL if force else Step.REFUSE
    return Step.MARK_PENDING if link.pending else Step.SWITCH
