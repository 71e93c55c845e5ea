"""Rates and ETAs from samples of a growing count; the caller brings the time."""

from __future__ import annotations

from collections import deque


class Meter:
    """Bytes a second over a sliding window; honest after a stall, because the window empties."""

    def __init__(self, window_seconds: float = 5.0) -> None:
        self._window = window_seconds
        self._samples: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, now: float, amount: int) -> None:
        """``amount`` more at time ``now`` (seconds, monotonic)."""
        self._total += amount
        if self._samples and now - self._samples[-1][0] < self._window / 50:
            self._samples[-1] = (self._samples[-1][0], self._total)
        else:
            self._samples.append((now, self._total))
        self._expire(now)

    def _expire(self, now: float) -> None:
        # One sample from before the window stays, or slow but steady progress would read as none.
        while len(self._samples) > 1 and self._samples[1][0] <= now - self._window:
            self._samples.popleft()

    def rate(self, now: float) -> float:
        """Amount a second over the window."""
        self._expire(now)
        if not self._samples:
            return 0.0
        start, first = self._samples[0]
        return (self._total - first) / max(now - start, self._window / 10)

    def eta(self, now: float, remaining: int) -> float | None:
        """Seconds until ``remaining`` is done at the current rate; ``None`` while it stalls."""
        rate = self.rate(now)
        return remaining / rate if rate > 0 else None
