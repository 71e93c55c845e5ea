"""When records were taken: a sparse map from seq to wall-clock time, for lag in seconds (X4)."""

from __future__ import annotations

from bisect import bisect_right

_STEP_NS = 50_000_000
_ENTRIES_MAX = 16_384


class Timeline:
    """One entry for 50 ms of writing, fewer for what lies long ago: bounded (I6)."""

    def __init__(self) -> None:
        self._seqs: list[int] = []
        self._times: list[int] = []

    def add(self, seq: int, time_ns: int) -> None:
        """Record ``seq`` was taken at ``time_ns``; seqs ascend."""
        if not self._times or time_ns - self._times[-1] >= _STEP_NS or time_ns < self._times[-1]:
            self._seqs.append(seq)
            self._times.append(time_ns)
            if len(self._seqs) > _ENTRIES_MAX:
                del self._seqs[1::2]
                del self._times[1::2]

    def last_before(self, time_ns: int) -> int:
        """A record that was taken at ``time_ns`` or before, and all before it too: the last such,
        to 50 ms; 0 if there is none. For a clock that never steps back."""
        at = bisect_right(self._times, time_ns) - 1
        return self._seqs[at] - 1 if at >= 0 else 0

    def time_of(self, seq: int) -> int | None:
        """When the record was taken: to 50 ms, less exact the longer ago; ``None`` if that is not
        known."""
        at = bisect_right(self._seqs, seq) - 1
        return self._times[at] if at >= 0 else None

    def trim(self, seq: int) -> None:
        """Nothing before ``seq`` will be asked for."""
        at = bisect_right(self._seqs, seq) - 1
        if at > 0:
            del self._seqs[:at]
            del self._times[:at]
