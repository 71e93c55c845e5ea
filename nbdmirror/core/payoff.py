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
        self._asked = False

    @property
    def doubtful(self) -> bool:
        """Whether what was tried last, and is answered, has failed."""
        return self._pause > 0

    def worth(self) -> bool:
        """Whether to try this time; the caller then reports with ``result``."""
        if self._left:
            self._left -= 1
            return False
        # Where it failed before it counts as failed until it is known: an answer takes a while.
        self._left = self._pause
        self._asked = self.doubtful
        return True

    def result(self, paid: bool) -> None:
        """What came of a try. Failures of tries that were under way together are one failure."""
        if paid:
            self._pause = self._left = 0
        elif self._asked or not self._pause:
            self._pause = self._left = min(PAUSE_MAX, self._pause * 2 or 1)
        self._asked = False
