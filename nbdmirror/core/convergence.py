"""When a resync stops going over the map and begins to forward changes in order (X3, semantics 6).

Going over the map needs no log: a region that a client rewrites ten times travels once for each
pass. It ends, in order, only if the log can hold what the client writes meanwhile; begun too early
the log overflows, and what was pending is marked again: a loop, on a slow link a long one. So the
need is foretold from the last pass, with a margin that grows with each time it was wrong. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

MARGIN = 2.0
"""The log must have room for so many times what is foretold ..."""
FAILURES_MAX = 4
"""... twice as many after each overflow, up to so many of them."""
SMALL = 16
"""What is marked may be this part of the log to begin in order without having gone over the map:
even if all of it is written again, that fits."""
SHRINKING = 0.9
"""A pass that leaves more than this part of what it began with does not converge by itself."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What was seen during a pass over the map."""

    began_bytes: int
    """Marked when it began ..."""
    left_bytes: int
    """... and when it ended."""
    seconds: float
    written_bytes: int
    """What clients added to the log meanwhile."""
    sent_bytes: int
    """What the link took meanwhile."""


def needed(seen: Pass) -> float:
    """Bytes of log that the ordered end would take, at the rates of the last pass.

    Copies get half of the link. While ``left`` is copied the log grows; while the link takes that
    backlog it grows further."""
    if not seen.written_bytes:
        return 0.0
    seconds = max(seen.seconds, 1e-3)
    written = seen.written_bytes / seconds
    copied = max(seen.began_bytes, 1) / seconds
    copying_seconds = 2 * seen.left_bytes / copied
    load = min(seen.written_bytes / max(seen.sent_bytes, 1), 1e6)
    return written * copying_seconds * (1 + load)


def may_order(seen: Pass, room_bytes: int, failures: int) -> bool:
    """Whether to go on in order now; ``failures``: how often the log overflowed doing so."""
    return needed(seen) * MARGIN * _caution(failures) <= room_bytes


def begin_ordered(marked_bytes: int, room_bytes: int, failures: int) -> bool:
    """Whether so little is marked that no pass is needed first."""
    return marked_bytes * SMALL * _caution(failures) <= room_bytes


def _caution(failures: int) -> int:
    return 1 << min(failures, FAILURES_MAX)


def stuck(seen: Pass, room_bytes: int) -> str | None:
    """Why passes do not come to an end, for people; ``None`` while they get shorter."""
    if seen.left_bytes <= seen.began_bytes * SHRINKING:
        return None
    seconds = max(seen.seconds, 1e-3)
    return (
        f"clients write {seen.written_bytes / seconds / (1 << 20):.1f} MiB/s, the link takes "
        f"{seen.sent_bytes / seconds / (1 << 20):.1f} MiB/s: to end in order the log needs "
        f"{needed(seen) * MARGIN / (1 << 20):.0f} MiB, it has {room_bytes / (1 << 20):.0f} MiB"
    )
