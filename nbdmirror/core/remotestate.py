"""The state of a remote as people see it, worked out from facts; and the next thing to do (X4).

States are never stored: what is durable are the facts, so no state can contradict them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stall:
    """Why nothing moves, or nothing comes to an end, and what a person can do."""

    why: str
    action: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a remote now; all but ``connected`` and ``resyncing`` is durable."""

    initialised: bool = False
    paused: bool = False
    tracking: bool = False
    consistent: bool = True
    """It has confirmed the end of its last resync."""
    full: bool = False
    dirty_regions: int = 0
    connected: bool = False
    resyncing: bool = False
    refused: str | None = None
    diverged: bool = False
    failed: str | None = None
    stall: Stall | None = None
    shut: bool = False
    """It is synchronous, and no write is carried out while it is away (``on_link_loss``)."""
    differing: int = 0
    """Regions that the last verify found to differ, and that were not repaired."""


def state_of(facts: Facts) -> str:
    """One word of the design's list of states."""
    if facts.diverged:
        return "diverged"
    if facts.failed is not None:
        return "failed"
    if facts.paused:
        return "paused"
    if facts.refused is not None:
        return "refused"
    if facts.resyncing:
        return "resyncing"
    if not facts.initialised:
        return "uninitialised"
    if facts.tracking or facts.dirty_regions or not facts.consistent:
        return "tracking"
    return "synchronised" if facts.connected else "behind"


def facet_word(state: str) -> str:
    """The state in M6's three words."""
    if state in ("synchronised", "behind"):
        return "synchronised"
    return "being-synchronised" if state == "resyncing" else "not-synchronised"


def next_action(facts: Facts, name: str) -> str | None:
    """What a person should do next; ``None`` if nothing: it happens by itself."""
    if facts.diverged:
        return f"decide which side is right; see: nbdmirror events, and the log of {name}"
    writes = f"; no write is carried out until then: nbdmirror pause {name} lets them go on"
    writes = writes if facts.shut else ""
    if facts.failed is not None:
        then = f"; then nbdmirror resume {name}" if facts.paused else writes
        return f"replace the disk of {name}, then restart it{then}"
    if facts.paused:  # nothing is tried again by itself
        return f"nbdmirror resume {name}"
    if facts.refused is not None:
        what = f"correct what the message says on {name} or here"
        return f"{what}; the link is tried again by itself{writes}"
    if not facts.connected:
        return f"start {name}, or mend the network to it; it catches up by itself{writes}"
    if facts.stall is not None:
        return facts.stall.action
    if facts.differing:
        return f"nbdmirror verify {name} --repair"
    return None
