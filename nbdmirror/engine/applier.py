"""Carries durable records from the secondary's log into its facets, in order (O2, V8).

Applying can be frozen, and delayed by a chosen time: then the facets stay at an older point while
the log goes on receiving. To come back to exactly that point after a crash, a bound that redo must
not pass is kept in the superblock, and moved durably before anything beyond it is applied:

    apply    {frozen: bool, delay: seconds, limit: seq that redo stops at, or null: no bound}
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from nbdmirror.codec import batch
from nbdmirror.codec.record import MARK, WRITE
from nbdmirror.core.timeline import Timeline
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.follower import Follower
from nbdmirror.engine.log import Chunk, Cursor, Log
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume

RECORDS_AT_ONCE = 64
"""Records applied in one step of the event loop."""
UNBOUNDED: dict[str, Any] = {"frozen": False, "delay": 0.0, "limit": None}


class Applier:
    """The applying task of a secondary, and what people may ask of it."""

    def __init__(
        self,
        volumes: list[Volume],
        log: Log,
        store: Store,
        events: EventLog,
        follower: Follower,
    ) -> None:
        self._volumes = volumes
        self._log = log
        self._store = store
        self._events = events
        self.follower = follower
        self.settings: dict[str, Any] = store.state.setdefault("apply", dict(UNBOUNDED))
        limit = self.settings["limit"]
        last = log.next_seq - 1
        self.applied_seq = last if limit is None else min(limit, last)
        self._begun_seq = self.applied_seq
        """The last record of which the facets may have something."""
        self._unsaved = False
        """The settings were changed, and nobody has seen a save of that end."""
        self._cursor = Cursor(self.applied_seq + 1)
        self.caught_up: Callable[[], Awaitable[None]] = _nothing
        """Awaited when everything that may be applied is."""
        self._moved = asyncio.Event()
        self.lock = asyncio.Lock()
        """Held while records are applied."""
        self._arrivals = Timeline()
        """When records came in, by the monotonic clock: a delay must not follow the wall clock.
        What the log holds at start counts as just come."""
        self._last_arrival_ns = self._now_ns()
        self._arrivals.add(self.applied_seq + 1, self._last_arrival_ns)

    def arrived(self, first_seq: int) -> None:
        """Records from ``first_seq`` on are in the log."""
        self._last_arrival_ns = self._now_ns()
        self._arrivals.add(first_seq, self._last_arrival_ns)

    def wake(self) -> None:
        """More records are durable, or the settings have changed."""
        self._moved.set()

    @staticmethod
    def _now_ns() -> int:
        return int(asyncio.get_running_loop().time() * 1e9)

    @property
    def bounded(self) -> bool:
        """Whether applying is held back by a person or a delay."""
        return bool(self.settings["frozen"]) or self.settings["delay"] > 0

    @property
    def delayed(self) -> bool:
        """Whether there are records that wait for their delay to pass."""
        return self.settings["delay"] > 0 and self.applied_seq < self._log.next_seq - 1

    # -- the task ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Applies for ever; OSError from a facet ends it."""
        while True:
            if self.applied_seq >= self._due():
                await self._wait()
                continue
            async with self.lock:
                await self._apply_some()
            if self.applied_seq >= self._due():
                await self.caught_up()

    async def _apply_some(self) -> None:
        """Applies some of what is due in the step in which the lock is had: whoever held it before
        may have applied that, emptied the log, or frozen it."""
        until = self._due()
        if self.applied_seq < until:
            await self._apply_until(until)

    def _due(self) -> int:
        """The last record that may be applied now."""
        durable = self._log.durable_seq
        if self.settings["frozen"]:
            return self.applied_seq
        delay_ns = int(self.settings["delay"] * 1e9)
        if not delay_ns:
            return durable
        then = self._now_ns() - delay_ns
        if then >= self._last_arrival_ns:
            return durable
        return min(durable, max(self._arrivals.last_before(then), self.applied_seq))

    async def _wait(self) -> None:
        self._moved.clear()
        delayed = self.settings["delay"] > 0 and not self.settings["frozen"]
        waiting = delayed and self.applied_seq < self._log.durable_seq
        pause = min(1.0, self.settings["delay"] / 10) if waiting else None
        try:
            async with asyncio.timeout(pause):
                await self._moved.wait()
        except TimeoutError:
            pass

    async def _apply_until(self, until: int) -> None:
        """Applies a chunk of the records up to there, once the bound on the disk is not before that
        (V8): whoever moved it may have been cancelled, and redo would stop within what is there."""
        limit = self.settings["limit"]
        if limit is not None and limit < until:
            self.settings["limit"], self._unsaved = until, True
        if self._unsaved:
            await self._save()
        self._begun_seq = until  # should this fail, or be cancelled
        await self._apply_chunk(until)
        self._begun_seq = self.applied_seq

    async def _apply_chunk(self, until: int) -> None:
        if self._cursor.seq != self.applied_seq + 1:  # the last chunk was not applied to its end
            self._cursor = Cursor(self.applied_seq + 1)
        chunk = await self._log.read(self._cursor)
        plain = chunk.places is not None and chunk.last_seq <= until
        if plain and await self._apply_places(chunk):
            return
        records = chunk.parsed()
        for count, record in enumerate(records):
            if record.seq > until:
                break
            guard = self._volumes[record.volume].guard
            if record.kind == MARK:
                await self.follower.marked(record)
            elif guard is not None and guard.holds(record.offset, record.length):
                due = min(len(records), until - records[0].seq + 1)
                await self.follower.make_way(records[count:due])
            for facet in self._volumes[record.volume].facets:
                try:
                    if record.kind == WRITE:
                        assert record.payload is not None
                        facet.write(record.seq, record.offset, record.payload)
                    else:
                        await facet.apply(record)
                except OSError as error:
                    raise facet.fail("write", error) from error
            self.applied_seq = record.seq
            if count % RECORDS_AT_ONCE == RECORDS_AT_ONCE - 1:
                await asyncio.sleep(0)

    def _guarded(self, places: bytes) -> bool:
        """Whether a snapshot still needs what any of these would overwrite."""
        for index in batch.volumes_of(places):
            guard = self._volumes[index].guard
            if guard is not None and guard.stops(batch.ranges(places, index)):
                return True
        return False

    async def _apply_places(self, chunk: Chunk) -> bool:
        """Applies a chunk of plain writes, up to those that a snapshot stands against; returns
        whether there were any before them."""
        places = chunk.places
        assert places is not None
        step = RECORDS_AT_ONCE * batch.PLACE_SIZE
        for at in range(0, len(places), step):
            if at:
                await asyncio.sleep(0)
            some = places[at : at + step]
            if self._guarded(some):
                return at > 0
            last = chunk.first_seq + (at + len(some)) // batch.PLACE_SIZE - 1
            for index in batch.volumes_of(some):
                for facet in self._volumes[index].facets:
                    try:
                        facet.write_places(last, chunk.parts[0], some, index)
                    except OSError as error:
                        raise facet.fail("write", error) from error
            self.applied_seq = last
        return True

    # -- what others ask ---------------------------------------------------------------------

    async def drain(self) -> None:
        """Applies all that is in the log, whatever holds it back; the log must be durable."""
        async with self.lock:
            await self._apply_all(self._log.next_seq - 1)

    async def settle(self) -> None:
        """Clean stop: applies what may be applied; what is held back stays in the log. The next
        start redoes nothing, so it is all up to the bound, which may have moved just before."""
        async with self.lock:
            last, limit = self._log.next_seq - 1, self.settings["limit"]
            await self._apply_all(last if limit is None else min(limit, last))

    async def _apply_all(self, until: int) -> None:
        while self.applied_seq < until:
            await self._apply_until(until)

    def reset(self, seq: int) -> None:
        """The log was emptied, to go on with ``seq``; everything before it is applied. The caller
        saves."""
        self.applied_seq = self._begun_seq = seq - 1
        self._cursor = Cursor(seq)
        self._arrivals = Timeline()
        if self.settings["limit"] is not None:
            self.settings["limit"] = seq - 1

    async def change(self, *, frozen: bool | None = None, delay: float | None = None) -> None:
        """Freezes or thaws applying, or sets its delay; durable before it takes effect (V8). The
        bound is not before what was begun: redo is to bring that to its end."""
        settings = self.settings
        async with self.lock:
            settings["frozen"] = settings["frozen"] if frozen is None else frozen
            settings["delay"] = settings["delay"] if delay is None else delay
            settings["limit"] = self._begun_seq if self.bounded else None
            self._unsaved = True
            await self._save()
        self._events.emit("apply", frozen=settings["frozen"], delay_s=settings["delay"])
        self.wake()

    async def _save(self) -> None:
        """Makes the settings durable; the lock is held."""
        await self._store.save()
        self._unsaved = False

    def status(self) -> dict[str, Any]:
        """The ``apply`` object of the status."""
        return {
            "frozen": self.settings["frozen"],
            "delay_s": self.settings["delay"],
            "pending_records": self._log.next_seq - 1 - self.applied_seq,
        }


async def _nothing() -> None:
    return None
