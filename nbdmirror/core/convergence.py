"""When a resync stops going over the map and begins to forward changes in order (X3, semantics 6).

Going over the map needs no log: a region that a client rewrites ten times travels once for each
pass. It ends, in order, only if the log can hold what the client writes meanwhile; begun too early
the log overflows, and what was pending is marked again: a loop, on a slow link a long one. So the
need is foretold from the last pass, with a margin that grows with each time it was wrong. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

MARGIN = 2.0
"""The log must have room for so many times the backlog that is foretold."""
SMALL = 16
"""What is marked may be this part of the log to begin in order without having gone over the map:
even if all of it is written again, that fits."""
SHRINKING = 0.9
"""A pass that leaves more than this part of what it began with does not converge by itself."""
ACK_SECONDS = 0.05
"""A record stays in the log at least so long."""
AGAIN_SECONDS, AGAIN_SECONDS_MAX = 1.0, 60.0
"""After an overflow in order the next attempt waits, twice as long with each of them ..."""
ANYWAY = 5.0
"""... and so many times as long where it is not foretold to fit: what was foretold may be wrong."""
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Pass:
    """What was seen during a pass over the map."""

    began_bytes: int
    """Marked when it began ..."""
    left_bytes: int
    """... and when it ended."""
    seconds: float
    waited_seconds: float
    """Of these, how long the link, or the remote behind it, was what all waited for."""
    written_bytes: int
    """What clients added to the log meanwhile."""
    sent_bytes: int
    """What the link took meanwhile."""

    @property
    def written(self) -> float:
        """Bytes a second that clients add to the log."""
        return self.written_bytes / max(self.seconds, 1e-3)

    @property
    def link(self) -> float:
        """Bytes a second that the link takes when there is enough to send."""
        return max(self.sent_bytes, 1) / max(self.waited_seconds, 1e-3)


def needed(seen: Pass) -> float:
    """Bytes of log that the ordered end would take, at the rates of the last pass.

    Copies get half of the link. What clients write beyond the other half piles up while the rest
    is copied; while the link takes that backlog, it grows further."""
    written, link = seen.written, seen.link
    need = written * ACK_SECONDS
    if written > link / 2:
        copies = seen.sent_bytes * seen.left_bytes / max(seen.began_bytes, 1)
        need += MARGIN * written * copies / (link / 2) * (1 + written / link)
    return need


def may_order(seen: Pass, room_bytes: int, failures: int, since_seconds: float) -> bool:
    """Whether to go on in order now. ``failures``: how often the log overflowed doing so;
    ``since_seconds``: since the last of them, or since the resync began."""
    again = min(AGAIN_SECONDS * (1 << min(failures, 10)), AGAIN_SECONDS_MAX)
    if needed(seen) <= room_bytes:
        return failures == 0 or since_seconds >= again
    return since_seconds >= again * ANYWAY


def begin_ordered(marked_bytes: int, room_bytes: int, failures: int) -> bool:
    """Whether so little is marked that no pass is needed first."""
    return failures == 0 and marked_bytes * SMALL <= room_bytes


def stuck(seen: Pass, room_bytes: int) -> str | None:
    """Why passes do not come to an end, for people; ``None`` while they get shorter."""
    if seen.left_bytes <= seen.began_bytes * SHRINKING or needed(seen) <= room_bytes:
        return None
    return (
        f"clients write {seen.written / _MIB:.1f} MiB/s, the link takes "
        f"{seen.link / _MIB:.1f} MiB/s: to end in order the log needs "
        f"{needed(seen) / _MIB:.0f} MiB, it has {room_bytes / _MIB:.0f} MiB"
    )
