"""The events of one node: a bounded history that readers follow by cursor.

Owns cursors and the history; knows no kind of event and no reader. The engine emits, admin
connections follow. A slow reader costs nothing: it reads from the shared history when it can, and
is told when what it wanted is no longer held.

A cursor is the time of the event in microseconds since 1970, made larger than the last one, so it
still orders events after a restart of the daemon.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nbdmirror.ports import Clock

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """A piece of the history: ``gap`` tells that older events which were asked for are gone;
    ``cursor`` is where the next piece begins."""

    events: tuple[Event, ...]
    cursor: int
    gap: bool


class EventLog:
    """The last ``events_max`` events, oldest first (I6)."""

    def __init__(self, clock: Clock, events_max: int) -> None:
        assert events_max > 0
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=events_max)
        # The cursor of the newest event that is not held: of earlier runs at first, later of
        # those that had to go.
        self._forgotten = clock.time_ns() // 1000
        self._last = self._forgotten
        self._waiters: list[asyncio.Future[None]] = []
        self._listeners: list[Callable[[Event], None]] = []

    @property
    def cursor(self) -> int:
        """The cursor of the newest event."""
        return self._last

    def emit(self, kind: str, **fields: Any) -> Event:
        """Adds an event ``{"cursor", "time", "kind", **fields}``; fields must be JSON."""
        assert not {"cursor", "time"} & fields.keys()
        now_ns = self._clock.time_ns()
        self._last = max(self._last + 1, now_ns // 1000)
        moment = datetime.fromtimestamp(now_ns / 1e9, UTC).isoformat(timespec="milliseconds")
        event: Event = {
            "cursor": self._last,
            "time": moment.replace("+00:00", "Z"),
            "kind": kind,
            **fields,
        }
        if len(self._events) == self._events.maxlen:
            self._forgotten = self._events[0]["cursor"]
        self._events.append(event)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        for listener in self._listeners:
            listener(event)
        return event

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Calls ``listener`` with every event from now on, at once."""
        self._listeners.append(listener)

    def since(self, cursor: int, events_max: int = 100) -> Page:
        """The oldest ``events_max`` held events that are newer than ``cursor``.

        Cursor 0 means "all that is held" and never has a gap. A cursor of the future (the clock
        was set back) counts as one whose events are gone."""
        assert events_max > 0
        gap = 0 < cursor < self._forgotten or cursor > self._last
        if gap:
            cursor = self._forgotten
        newer: list[Event] = []
        # From the new end: a reader that keeps up costs what it is behind, not the whole history.
        for event in reversed(self._events):
            if event["cursor"] <= cursor:
                break
            newer.append(event)
        events = tuple(reversed(newer[-events_max:]))
        end = events[-1]["cursor"] if events else max(cursor, self._forgotten)
        return Page(events, end, gap)

    async def follow(self, cursor: int, events_max: int = 100) -> Page:
        """As ``since``, but waits until there is at least one event."""
        while not (page := self.since(cursor, events_max)).events:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        return page
