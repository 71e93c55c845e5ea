"""A cap on a rate, as a bucket that fills with time; the caller brings the time. Pure."""

from __future__ import annotations

BURST_SECONDS = 0.1
"""What was not used for a moment may be made up for: no more than this."""


class Bucket:
    """Says how long to wait after each amount so that the mean rate stays at ``rate``."""

    def __init__(self, rate: float | None) -> None:
        assert rate is None or rate > 0
        self.rate = rate
        """Amount a second; ``None``: no cap."""
        self._paid_until = 0.0

    def take(self, now: float, amount: int) -> float:
        """``amount`` is used now; returns the seconds to wait before anything more is."""
        if self.rate is None:
            return 0.0
        start = max(self._paid_until, now - BURST_SECONDS)
        self._paid_until = start + amount / self.rate
        return max(0.0, self._paid_until - now)
