"""Makes room for clients while a resync or a verify runs; one for each node, on by default.

What copies reports how long it has just kept the event loop; while clients are active it then
rests in proportion, so that a request seldom meets it and never waits for more than one piece.
The proportion follows the latency of those requests that have to wait for a disk, against what it
was before: a resync that slows down the disk yields too. With no client it takes all it can get.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nbdmirror.ports import Clock

IDLE_SECONDS = 0.25
"""Without a request for so long nobody is there to yield to."""
SHARE_MAX, SHARE_MIN = 0.3, 0.02
"""Of the event loop's time, while clients are active. The least keeps a resync from starving."""
RISE_MAX = 2.0
"""Requests may take so many times what they took before; beyond it the share is cut."""
REST_SECONDS_MIN = 0.001
"""Timers are no finer: rests are saved up."""
ADJUST_SECONDS = 0.1


class Governor:
    """Shared by everything of a node that runs beside its clients."""

    def __init__(self, clock: Clock, activity: Callable[[], int]) -> None:
        self.now_ns = clock.monotonic_ns
        self._activity = activity
        self._seen = activity()
        self._active_at = self._worked_at = self._adjusted_at = float("-inf")
        self._debt = 0.0
        self._calm = self._busy = 0.0
        self.share = SHARE_MAX

    def active(self) -> bool:
        """Whether clients have sent requests a moment ago."""
        now, seen = asyncio.get_running_loop().time(), self._activity()
        if seen != self._seen:
            self._seen, self._active_at = seen, now
        return now - self._active_at < IDLE_SECONDS

    def observe(self, ns: int) -> None:
        """A client's request that had to wait for something took so long."""
        now = asyncio.get_running_loop().time()
        if now - self._worked_at > 2 * IDLE_SECONDS:
            self._calm = self._calm + (ns - self._calm) / 16 if self._calm else float(ns)
            self._busy = self._calm
            return
        self._busy += (ns - self._busy) / 16
        # A load that has changed for good becomes what is usual.
        self._calm += (ns - self._calm) / 1024
        if now - self._adjusted_at >= ADJUST_SECONDS:
            self._adjusted_at = now
            slow = self._calm and self._busy > RISE_MAX * self._calm
            share = self.share * (0.7 if slow else 1.1)
            self.share = max(SHARE_MIN, min(SHARE_MAX, share))

    async def rest(self, spent_ns: int) -> None:
        """After ``spent_ns`` of work that kept the event loop: lets clients go first."""
        self._worked_at = asyncio.get_running_loop().time()
        if not self.active():
            self._debt = 0.0
            return
        self._debt += spent_ns / 1e9 * (1 / self.share - 1)
        if self._debt >= REST_SECONDS_MIN:
            debt, self._debt = self._debt, 0.0
            await asyncio.sleep(debt)
