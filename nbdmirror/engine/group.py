"""The data path of the primary: admission, active map, log, facets, reply.

A batch of requests whose extents are hot, whose ranges are free and for which the log has room
goes through ``write`` in one step of the event loop: one append to the log, then the facets, in
that order (V5). Whatever has to wait, waits in a coroutine, and takes the same step afterwards.
The order of records in the log is the order of the steps, over all volumes of the group (V4).

Asynchronous remotes are never waited for (M2): they read the log at their own rate. Synchronous
ones are: see ``engine.gate``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from nbdmirror.codec import record as codec
from nbdmirror.codec.mark import Mark
from nbdmirror.core.active import key_of
from nbdmirror.core.timeline import Timeline
from nbdmirror.engine.activemap import ALONG_MAX, ActiveMapFile
from nbdmirror.engine.batch import Changes
from nbdmirror.engine.chain import stopping
from nbdmirror.engine.facet import LocalFacet, to_the_end
from nbdmirror.engine.volume import Change, Volume
from nbdmirror.errors import DiskFailed, NbdmirrorError, VolumeFailed

if TYPE_CHECKING:
    from nbdmirror.engine.batch import Batch, Records
    from nbdmirror.engine.gate import SyncGate
    from nbdmirror.engine.log import Log
    from nbdmirror.engine.remote import Remote
    from nbdmirror.ports import Clock


APPEND_BYTES_MAX = 2 << 20
"""What is appended in one piece is sent in one frame, with what came before it: both must fit into
``repl.FRAME_BYTES_MIN``."""
CLEAR_EXTENTS_MAX = 32
"""Extents that one TRIM or WRITE_ZEROES record may touch."""


class LogLost(Exception):
    """Nothing was appended, nor done to a facet; there will be another log (M13)."""


class Tracker(Protocol):
    """A remote in DCM logging, as the data path sees it."""

    def mark(self, volume: int, offset: int, length: int) -> None:
        """Marks the regions of a change in the remote's DCM; DiskFailed if it cannot."""


class Group:
    """The volumes of a group on its primary, and the one way to change them."""

    def __init__(
        self, volumes: Sequence[Volume], log: Log, active: ActiveMapFile, clock: Clock, epoch: int
    ) -> None:
        self.volumes = list(volumes)
        self.log = log
        self.active = active
        self.epoch = epoch
        self._clock = clock
        self.trackers: list[Tracker] = []
        """Remotes in DCM logging: marked with every change instead of reading it from the log."""
        self.gates: list[SyncGate] = []
        """Synchronous remotes: replies wait for them."""
        self.need_space: Callable[[], Coroutine[Any, Any, None]] = _no_space
        """Awaited when the log is full; returns when there may be room. Set by housekeeping."""
        self.sync_facets: Callable[[], Coroutine[Any, Any, None]] = _no_space
        """Syncs the facets: who fails is out of service, durably, when it returns (M12). Set by
        housekeeping."""
        self.facet_lost: Callable[[Volume, LocalFacet], Coroutine[Any, Any, None]] = _nothing
        """Awaited, before the reply, when a facet went out of service (M12)."""
        self.log_back: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Awaited when the log has failed: returns when there is another (M13)."""
        self.goes_on: Callable[[Volume], bool] = lambda volume: False
        """Whether a volume with no local facet in service is of use: a remote follows (M11)."""
        self.in_reach: Callable[[Volume], bool] = lambda volume: False
        """Whether such a remote is connected now."""
        self.needed: Callable[[Remote], bool] = lambda remote: False
        """Whether it is the only such remote of a volume."""
        self.on_mark: Callable[[int, Mark], None] = lambda seq, mark: None
        """Called in the step in which a mark is logged, with its seq."""
        self.on_failed: Callable[[NbdmirrorError], None] = lambda error: None
        """Called once, when no write is taken any more; the node then ends."""
        self.failed: NbdmirrorError | None = None
        """Why no write is taken any more."""
        self.timeline = Timeline()
        self.bytes_written = 0
        self.pressure_at = log.capacity // 4
        self.on_pressure: Callable[[], None] = lambda: None
        """Called when this much log was written since the last housekeeping."""
        self._written_since = 0

    # -- entry points ------------------------------------------------------------------------

    def write(
        self, volume: Volume, changes: Sequence[Change], *, durable: bool = False
    ) -> Coroutine[Any, Any, None] | None:
        """Writes these, in order; see ``write_batch``."""
        return self.write_batch(volume, Changes(changes), durable=durable)

    def write_batch(
        self, volume: Volume, batch: Batch, *, durable: bool = False
    ) -> Coroutine[Any, Any, None] | None:
        """Writes a batch, in order. ``None``: all is done and may be replied to; else a coroutine
        that completes it. ``durable``: not before the log is durable past it (FUA).

        VolumeFailed (raised here or by the coroutine) carries the client's errno."""
        if self._must_wait(volume, batch):
            return self._write_later(volume, batch.changes(), durable)
        try:
            after = self._commit(volume, batch)
        except LogLost:
            return self._write_later(volume, batch.changes(), durable)
        except DiskFailed as error:
            raise self._client_error(error) from error
        if durable or after is not None or self.gates:
            return self._finish(after, self.log.next_seq - 1, durable)
        return None

    async def clear(self, volume: Volume, change: Change, *, durable: bool = False) -> None:
        """TRIM and WRITE_ZEROES: a record like any other (O22); the facets follow off the loop,
        under a lock that keeps later writes behind it."""
        try:
            for piece in self._clear_pieces(change):
                await self._clear(volume, piece)
            await self._reach(self.log.next_seq - 1, durable)
        except DiskFailed as error:
            raise self._client_error(error) from error

    async def _clear(self, volume: Volume, change: Change) -> None:
        while not await self._clear_locked(volume, change):
            for gate in self.gates:
                await gate.admit()

    async def _clear_locked(self, volume: Volume, change: Change) -> bool:
        """Whether it was done: a synchronous remote that is away is not waited for under a lock,
        because it may be for that lock that it is kept away."""
        async with volume.locked(change.offset, change.length, exclusive=True) as lock:
            while True:
                if not await self._admit(volume, change, locked=True):
                    return False
                try:
                    self._append(volume, Changes([change]))
                    break
                except LogLost:
                    continue
            volume.landing(lock)
            keep_space = change.kind == codec.ZERO and bool(change.flags & codec.NO_HOLE)
            seq = self.log.next_seq - 1
            facets = volume.writable()
            for facet in facets:
                facet.pending[seq] = None  # from this step on no sync covers it (O5)
            # To its end: what is in the log is in every facet, whoever asked for it is gone or not.
            clearing = self._clear_facets(volume, facets, seq, change, keep_space=keep_space)
            await to_the_end(asyncio.ensure_future(clearing))
        return True

    async def _clear_facets(
        self,
        volume: Volume,
        facets: list[LocalFacet],
        seq: int,
        change: Change,
        *,
        keep_space: bool,
    ) -> None:
        for facet in facets:
            if not facet.writable:
                del facet.pending[seq]
                continue
            try:
                await facet.clear(seq, change.offset, change.length, keep_space=keep_space)
            except OSError as error:
                facet.fail("clear", error)
        lost = [facet for facet in volume.facets if facet.unnoted]
        if lost:  # whoever saw it fail (M12)
            await self.facets_failed(volume, lost)
        self._check_served(volume)

    def _clear_pieces(self, change: Change) -> list[Change]:
        """A large TRIM or WRITE_ZEROES cut so that all its extents can be hot at once."""
        step = CLEAR_EXTENTS_MAX * self.active.extent_size
        return [
            change._replace(offset=change.offset + at, length=min(step, change.length - at))
            for at in range(0, change.length, step)
        ]

    async def flush(self) -> None:
        """Every write that was replied to is durable: in the log, from which redo carries it into
        the facets (O15). VolumeFailed if that cannot be promised."""
        if self.failed is not None:
            raise self._client_error(self.failed)
        for volume in self.volumes:
            # Else it has had nobody since the start, and what was written before is in the log.
            if volume.ended or any(facet.unnoted for facet in volume.facets):
                self._check_served(volume)
        try:
            await self._reach(self.log.next_seq - 1, True)
        except DiskFailed as error:
            raise self._client_error(error) from error

    # -- admission ---------------------------------------------------------------------------

    def _must_wait(self, volume: Volume, batch: Batch) -> bool:
        if volume.guard is not None and volume.guard.stops(batch.ranges()):
            return True
        if self.gates and any(gate.shut for gate in self.gates):
            return True
        if not self._extents(volume, batch).keys() <= self.active.hot.keys():
            return True
        if volume.locks.held:
            for offset, length in batch.ranges():
                if volume.locks.conflict(offset, offset + length, exclusive=True):
                    return True
        if batch.longest > self.log.payload_max or batch.size_max > APPEND_BYTES_MAX:
            return True
        return not self.log.fits(batch.size_max, batch.longest + 2 * codec.HEADER_SIZE)

    def _extents(self, volume: Volume, batch: Batch, seq: int = 0) -> dict[int, int]:
        """The extents that a batch touches, in the terms of the active map's ``hot``."""
        extents = dict.fromkeys(batch.stretches(self.active.extent_size), seq)
        if not volume.index:  # whose keys are its extents: no loop where most writes go
            return extents
        return {key_of(volume.index, extent): seq for extent in extents}

    async def _admit(self, volume: Volume, change: Change, *, locked: bool = False) -> bool:
        """Waits until nothing stands against this change: returns in the step it may be made.
        False, where the range is ``locked``: a synchronous remote is away."""
        size = codec.stored_size(change.kind, change.length)
        first = change.offset // self.active.extent_size
        last = (change.offset + change.length - 1) // self.active.extent_size
        while True:
            if self.log.failed is not None and self.log_back is not None:
                await self.log_back()
                continue
            if self.gates and any(gate.shut for gate in self.gates):
                if locked:
                    return False
                for gate in self.gates:
                    await gate.admit()
                continue
            if not locked:
                end = change.offset + change.length
                if volume.locks.conflict(change.offset, end, exclusive=True) is not None:
                    await volume.wait_unlocked(change.offset, end)
                    continue
            keys = [key_of(volume.index, extent) for extent in range(first, last + 1)]
            if any(key not in self.active.hot for key in keys):
                try:
                    await self.active.activate(keys, self._neighbours(volume, change.offset))
                except DiskFailed:
                    if self.log.failed is None or self.log_back is None:
                        raise
                continue
            if not self.log.fits(size, size):
                await self.need_space()
                continue
            guard = volume.guard
            if guard is not None and guard.holds(change.offset, change.length):
                self._check_served(volume)  # what will be refused costs no snapshot its content
                await guard.make_way([(change.offset, change.length)])
                continue
            return True

    async def _write_later(self, volume: Volume, changes: Sequence[Change], durable: bool) -> None:
        try:
            await self._heat(volume, changes)
            for change in changes:
                for piece in self._pieces(change):
                    await self._write_piece(volume, piece)
            await self._reach(self.log.next_seq - 1, durable)
        except DiskFailed as error:
            raise self._client_error(error) from error

    async def _heat(self, volume: Volume, changes: Sequence[Change]) -> None:
        """Makes the extents of a batch hot with one sync, not with one for each."""
        base = key_of(volume.index, 0)
        extents = dict.fromkeys(Changes(changes).stretches(self.active.extent_size))
        cold = [base | extent for extent in extents if base | extent not in self.active.hot]
        if len(cold) > 1:
            try:
                along = self._neighbours(volume, changes[0].offset)
                await self.active.activate(cold[: self.active.map.slots_max // 2], along)
            except DiskFailed:
                if self.log.failed is None or self.log_back is None:
                    raise  # else ``_admit`` waits for the log that comes

    def _neighbours(self, volume: Volume, offset: int) -> list[int]:
        """The extents behind an offset, then those before it: where the next writes may be."""
        here, end = offset // self.active.extent_size, -(-volume.size // self.active.extent_size)
        near = [*range(here + 1, min(end, here + 1 + ALONG_MAX))]
        near += range(here - 1, max(-1, here - 1 - ALONG_MAX), -1)
        return [key_of(volume.index, extent) for extent in near]

    async def _write_piece(self, volume: Volume, piece: Change) -> None:
        while True:
            await self._admit(volume, piece)
            try:
                after = self._commit(volume, Changes([piece]))
            except LogLost:
                continue
            if after is not None:
                await after
            return

    def _pieces(self, change: Change) -> list[Change]:
        """A change cut to records that a log of this size can hold."""
        limit = self.log.payload_max
        if change.kind != codec.WRITE or change.length <= limit:
            return [change]
        assert change.payload is not None
        payload = memoryview(change.payload)
        return [
            Change(
                change.kind,
                change.flags,
                change.offset + at,
                min(limit, change.length - at),
                payload[at : at + limit],
            )
            for at in range(0, change.length, limit)
        ]

    # -- the step ----------------------------------------------------------------------------

    def _commit(self, volume: Volume, batch: Batch) -> Coroutine[Any, Any, None] | None:
        """Log, then facets, in one step. Returns what must be awaited before the reply, if any.

        One facet after the other: they take a write into the page cache sooner than another thread
        could be asked to (``tests.bench.facets``)."""
        records = self._append(volume, batch)
        seq = self.log.next_seq - 1
        lost: list[LocalFacet] = []
        for facet in volume.facets:
            if not facet.writable:
                if facet.unnoted:
                    lost.append(facet)
                continue
            try:
                records.land(facet.file)
                facet.written_seq = seq
            except OSError as error:
                facet.fail("write", error)
                lost.append(facet)
        return self.facets_failed(volume, lost) if lost else None

    def _append(self, volume: Volume, batch: Batch) -> Records:
        """Encodes and appends; marks the maps of remotes in DCM logging."""
        if self.failed is not None:
            raise self._client_error(self.failed)
        self._check_served(volume)
        log, active, index = self.log, self.active, volume.index
        now, seq = self._clock.time_ns(), log.next_seq
        records = batch.encode(self.epoch, index, seq, now)
        active.hot.update(self._extents(volume, batch, seq + records.count - 1))
        for tracker in self.trackers:
            for offset, length in batch.ranges():
                tracker.mark(index, offset, length)
        try:
            log.append(records.parts, records.size, records.count, places=records.places)
        except DiskFailed as error:
            if self.log_back is not None:
                raise LogLost from error
            raise self._client_error(error) from error
        self.timeline.add(seq, now)
        self.bytes_written += records.size
        self._written_since += records.size
        if self._written_since >= self.pressure_at:
            self._written_since = 0
            self.on_pressure()
        return records

    async def put_mark(self, mark: Mark, done: Callable[[int], None] = lambda seq: None) -> int:
        """Puts a point into the write order (see ``codec.mark``); durable on return. ``done`` is
        called with its seq in the very step in which it is logged."""
        # What a snapshot makes wait from that step on would wait for all that is in the log now.
        await self._sync_log(self.log.next_seq - 1, kept=True)
        size = codec.stored_size(codec.MARK, len(mark.encode()))
        while True:
            if self.log.failed is not None and self.log_back is not None:
                await self.log_back()
            elif not self.log.fits(size, size):
                await self.need_space()
            else:
                try:
                    seq = self.mark(mark)
                except LogLost:
                    continue
                done(seq)
                await self._sync_log(seq, kept=True)
                return seq

    def mark(self, mark: Mark) -> int:
        """Appends a mark, for which there must be room; returns its seq."""
        if self.failed is not None:
            raise self._client_error(self.failed)
        payload, seq, now = mark.encode(), self.log.next_seq, self._clock.time_ns()
        record = codec.Record(codec.MARK, 0, self.epoch, 0, seq, 0, len(payload), now, payload)
        size = codec.stored_size(codec.MARK, len(payload))
        try:
            self.log.append(codec.encode(record), size, 1)
        except DiskFailed as error:
            if self.log_back is not None:
                raise LogLost from error
            raise self._client_error(error) from error
        self.timeline.add(seq, now)
        self.on_mark(seq, mark)
        return seq

    def _check_served(self, volume: Volume) -> None:
        """VolumeFailed if there is no facet that a write could be on: the node is about to end."""
        for facet in volume.facets:
            if facet.in_service:
                return
        if not self.goes_on(volume):
            raise volume.no_facet()

    async def facets_failed(self, volume: Volume, facets: list[LocalFacet]) -> None:
        """Out of service, durably, before the write that saw it is acknowledged (M12); to its end,
        though whoever saw it is gone."""
        await to_the_end(asyncio.ensure_future(self._note_failed(volume, facets)))
        if facets[-1].failed is not None and not (volume.in_service() or self.goes_on(volume)):
            self.fail(facets[-1].failed)
        self._check_served(volume)  # no facet left: the client's error

    async def _note_failed(self, volume: Volume, facets: list[LocalFacet]) -> None:
        for facet in facets:
            await self.facet_lost(volume, facet)

    async def _reach(self, seq: int, durable: bool) -> None:
        """Returns when record ``seq`` is wherever a reply promises it to be."""
        if durable:
            await self._sync_log(seq)
        for gate in list(self.gates):
            await gate.wait(seq, durable)

    async def _sync_log(self, seq: int, *, kept: bool = False) -> None:
        """``kept``: it is found in the log itself, wherever else its content may be."""
        while True:
            try:
                await self.log.sync(seq)
                if kept:
                    await self.log.keep()
                return
            except DiskFailed:
                if self.log.failed is None or self.log_back is None:
                    raise
            await self.log_back()

    async def _finish(
        self, after: Coroutine[Any, Any, None] | None, seq: int, durable: bool
    ) -> None:
        try:
            if after is not None:
                await after
            await self._reach(seq, durable)
        except DiskFailed as error:
            raise self._client_error(error) from error

    def fail(self, error: NbdmirrorError) -> None:
        """No write is taken any more: what it promised could not be kept (O16)."""
        if self.failed is None:
            self.failed = error
            self.on_failed(error)

    def end(self) -> None:
        """The node stops: who has waited until now appends nothing any more, or it would be in no
        facet durably when the superblock says that all is (M12)."""
        self.failed = self.failed or stopping()

    def _client_error(self, error: NbdmirrorError) -> VolumeFailed:
        if isinstance(error, DiskFailed):
            self.fail(error)  # of the log or of a map: final for that file (O16)
        return VolumeFailed(error.message, number=getattr(error, "errno", 5), hint=error.hint)


async def _no_space() -> None:
    await asyncio.sleep(0.01)


async def _nothing(volume: Volume, facet: LocalFacet) -> None:
    return None
