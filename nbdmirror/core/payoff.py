"""Whether something that may not pay is worth another try: compression of a batch, a comparison
before a copy. Pure; one object for each link and purpose."""

from __future__ import annotations

PAUSE_MAX = 32
"""Of what never pays, one in so many is still tried: the data may change."""


class Payoff:
    """Done while it pays; after failures left out for 1, 2, 4 ... turns."""

    def __init__(self) -> None:
        self._pause = 0
        self._left = 0

    def worth(self) -> bool:
        """Whether to try this time; the caller then reports with ``result``."""
        if self._left:
            self._left -= 1
            return False
        return True

    def result(self, paid: bool) -> None:
        """What came of a try. Failures that come in while one is being left out for tell nothing
        new: they were begun before, and are one failure with it."""
        if paid or not self._left:
            self._pause = 0 if paid else min(PAUSE_MAX, self._pause * 2 or 1)
            self._left = self._pause
