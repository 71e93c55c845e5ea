"""Tells of strangers that were refused, without letting a flood of them fill journal and history.

One event at once, then at most one for each listener in ``PAUSE_SECONDS``, with how many more there
were. Counts go into the status.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from nbdmirror.engine.events import EventLog

PAUSE_SECONDS = 5.0


class Refusals:
    """The refusals of one node."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._last: dict[str, float] = {}
        self._untold: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def tell(self, listener: str, address: str, why: str) -> None:
        """Somebody at ``address`` was refused by a listener ("nbd", "replication", "admin")."""
        self.counts[listener] += 1
        now = asyncio.get_running_loop().time()
        last = self._last.get(listener)
        if last is not None and now - last < PAUSE_SECONDS:
            self._untold[listener] += 1
            return
        self._last[listener] = now
        more = self._untold.pop(listener, 0)
        self._events.emit(
            "stranger-refused", listener=listener, address=address, why=why, untold=more
        )
