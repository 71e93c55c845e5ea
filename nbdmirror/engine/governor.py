"""Makes room for clients while a resync or a verify runs; one for each node, on by default.

What copies or compares reports how long a piece has just kept a processor, here or in a thread;
while clients are active it then rests in proportion, so that a request seldom meets it and never
waits for more than one piece; the remote, which works on what it is sent, rests too.
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
"""Of one processor's time, while clients are active. The least keeps a resync from starving."""
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
        self._next_at = 0.0
        """When the work so far is paid for: whoever works next begins then."""
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
        """After ``spent_ns`` of work: lets clients go first. Several that work take turns: the
        share is that of all of them together, and each gets a part of it."""
        now = self._worked_at = asyncio.get_running_loop().time()
        if not self.active():
            self._next_at = now
            return
        spent = spent_ns / 1e9
        self._next_at = max(self._next_at, now - spent) + spent / self.share
        if (rest := self._next_at - now) >= REST_SECONDS_MIN:
            await asyncio.sleep(rest)
