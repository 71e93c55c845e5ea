"""Mutants of the primary's own disk: the active map, the log, its release, recovery, flushes."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

from nbdmirror.codec import record as codec
from nbdmirror.core.active import ActiveMap
from nbdmirror.engine import doubt, logscan, node, recovery
from nbdmirror.engine.activemap import ActiveMapFile
from nbdmirror.engine.batch import Batch, Records
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.group import Group
from nbdmirror.engine.groupcommit import GroupCommit
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import RING_AT, Log
from nbdmirror.engine.node import Node
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import FormatError
from nbdmirror.ports import Buffer
from tests.sim.mutants.aims import UNFINISHED
from tests.sim.mutation import Assign, mutant, nothing
from tests.sim.plays.facets import (
    READ_AND_FAILED,
    STOPPED_AND_CLEARED,
    STOPPED_AND_CLEARING,
    STOPPED_AND_WAITING,
)
from tests.sim.plays.log import BELIEVED, ENDED_EPOCH, LOG_REVERTS
from tests.sim.plays.remotes import OFTEN_WITHOUT_POWER


@mutant("O1 an extent counts as in before it is durable")
def _(assign: Assign) -> None:
    async def activate(self: ActiveMapFile, keys: list[int], along: Any = ()) -> None:
        cold = [key for key in dict.fromkeys(keys) if key not in self.hot]
        while cold and (sectors := self.map.admit(cold, self.safe_seq(), keys)) is None:
            assert self.make_safe is not None
            await self.make_safe()
        if cold and sectors is not None:
            self.map.enter(cold)
            asyncio.ensure_future(self._write(sectors))  # noqa: RUF006 (the mutant's point)

    assign(ActiveMapFile, "activate", activate)


@mutant("O1 only the ends of a long write are marked")
def _(assign: Assign) -> None:
    def must_wait(self: Group, volume: Volume, batch: Batch) -> bool:
        return not self.log.fits(batch.size_max, 1 << 20)

    def append(self: Group, volume: Volume, batch: Batch) -> Records:
        before = dict(self.active.hot)
        records = original(self, volume, batch)
        for key in [key for key in self.active.hot if key not in before]:
            del self.active.hot[key]
        return records

    original = Group._append
    assign(Group, "_must_wait", must_wait)
    assign(Group, "_append", append)


@mutant("O1 extents that come along count as in, and are not in the map")
def _(assign: Assign) -> None:
    activate, sector = ActiveMapFile.activate, ActiveMap.sector
    left_out: weakref.WeakKeyDictionary[ActiveMap, dict[int, None]] = weakref.WeakKeyDictionary()

    async def activating(self: ActiveMapFile, keys: list[int], along: Any = ()) -> None:
        likely = [key for key in along if key not in keys and key not in self.hot]
        left_out.setdefault(self.map, {}).update(dict.fromkeys(likely))
        for key in keys:
            left_out[self.map].pop(key, None)
        await activate(self, keys, likely)

    def written(self: ActiveMap, number: int) -> list[int]:
        absent = left_out.get(self, {})
        return [0 if slot and slot - 1 in absent else slot for slot in sector(self, number)]

    assign(ActiveMapFile, "activate", activating)
    assign(ActiveMap, "sector", written)


@mutant("O6 an extent leaves the active map though its last write is not safe")
def _(assign: Assign) -> None:
    original = ActiveMap.admit

    def admit(self: ActiveMap, keys: list[int], safe_seq: int, keep: Any = ()) -> Any:
        return original(self, keys, 1 << 60, keep)

    assign(ActiveMap, "admit", admit)


@mutant("O1 after a power loss active extents are not compared")
def _(assign: Assign) -> None:
    assign(doubt, "doubtful_ranges", lambda active, volumes: [])


@mutant("M1 after a power loss local facets are not made equal")
def _(assign: Assign) -> None:
    assign(doubt, "level", nothing)


@mutant("O5 the log is released before facets are synced")
def _(assign: Assign) -> None:
    assign(LocalFacet, "floor", lambda self, applied_seq: applied_seq)


@mutant("O5 the log is released when a remote has received it")
def _(assign: Assign) -> None:
    def floor(self: Remote, head_seq: int) -> int:
        if self.starting or not self.tracking:
            return self.received_seq
        return head_seq if self.marked_seq is None else self.marked_seq

    assign(Remote, "floor", floor)
    assign(Housekeeper, "_place", lambda self, one: getattr(one, "received_seq", one.durable_seq))


@mutant("O5 a sync covers what was written while it ran")
def _(assign: Assign) -> None:
    async def sync(self: LocalFacet) -> None:
        await self.file.sync()
        self.synced_seq = max(self.synced_seq, self.written_seq)

    assign(LocalFacet, "sync", sync)


@mutant("O5 space is used again before the tail is durable")
def _(assign: Assign) -> None:
    original = Log.release

    def release(self: Log, seq: int, position: int) -> None:
        original(self, seq, position)
        self.ring.durable_tail = position

    def confirm(self: Log, position: int) -> None:
        return None

    assign(Log, "release", release)
    assign(Log, "confirm_tail", confirm)


@mutant("O23 facets count as synced after redo")
def _(assign: Assign) -> None:
    original = recovery.redo

    async def redo(store: Store, log: Log, volumes: list[Volume], *rest: Any) -> Any:
        recovered = await original(store, log, volumes, *rest)
        for volume in volumes:
            for facet in volume.facets:
                facet.synced_seq = facet.written_seq
        return recovered

    assign(node, "redo", redo)


@mutant("O10 recovery does not begin a new epoch")
def _(assign: Assign) -> None:
    def note_end(store: Store, recovered: Any) -> None:
        recovery.note_end(store, recovered)
        store.state["epoch"] -= 1

    assign(node, "note_end", note_end)


@mutant("O10 the end of an epoch is not remembered")
def _(assign: Assign) -> None:
    assign(node, "note_end", lambda store, recovered: store.state.setdefault("ends", []))


@mutant("I2 forks are remembered for ever, more than a HELLO may tell of", run=OFTEN_WITHOUT_POWER)
def _(assign: Assign) -> None:
    def forget_oldest(state: dict[str, Any]) -> None:
        del state["runs"][: -recovery.RUNS_MAX]

    assign(node, "forget_oldest", forget_oldest)


@mutant("O10 a scan takes records of an epoch that had ended", run=ENDED_EPOCH)
def _(assign: Assign) -> None:
    def scan(self: Log, forks: Any, epoch_max: int) -> Iterator[codec.Record]:
        ring = self.ring
        while ring.head - ring.tail < ring.capacity:
            window = logscan.window(self._file, RING_AT, ring, ring.head % ring.capacity)
            try:
                record = codec.parse(window, 0)
            except FormatError:
                return
            size = codec.stored_size(record.kind, record.length)
            if record.seq != ring.next_seq or ring.head + size - ring.tail > ring.capacity:
                return
            if record.kind == codec.FILL:
                ring.head += size
                continue
            ring.advance(record.seq, 1, size)
            yield record

    assign(Log, "scan", scan)


@mutant("O10 a scan takes torn records")
def _(assign: Assign) -> None:
    original = codec.parse

    def parse(data: memoryview, at: int, *, verify_payload: bool = True) -> codec.Record:
        return original(data, at, verify_payload=False)

    assign(codec, "parse", parse)


@mutant("O19 an unfinished overflow is not finished at the next start", UNFINISHED)
def _(assign: Assign) -> None:
    async def pending(log: Log) -> list[Any]:
        return []

    assign(doubt, "_pending", pending)


@mutant("O16 a log that lost records is redone over the facets", run=LOG_REVERTS)
def _(assign: Assign) -> None:
    original = recovery._apply

    async def apply(store: Store, *args: Any, only_healing: bool) -> None:
        await original(store, *args, only_healing=bool(store.state["clean"]))

    assign(recovery, "_apply", apply)


@mutant("O16 what a log still has is sent though it lost what followed", run=LOG_REVERTS)
def _(assign: Assign) -> None:
    assign(Remote, "leave_log", lambda self: None)


@mutant("O15 a flush is content with a sync that was running")
def _(assign: Assign) -> None:
    async def sync_head(self: Log) -> None:
        await self._file.sync()
        self.durable_seq = self.ring.next_seq - 1

    assign(Log, "_sync_head", sync_head)


@mutant("O15 whoever asks joins the commit that is running")
def _(assign: Assign) -> None:
    async def run(self: GroupCommit) -> None:
        while self._asking:
            failure: Exception | None = None
            try:
                await self._commit()
            except Exception as error:
                failure = error
            waiters, self._asking = self._asking, []
            for waiter in (waiter for waiter in waiters if not waiter.done()):
                waiter.set_exception(failure) if failure else waiter.set_result(None)
        self._task = None

    assign(GroupCommit, "_run", run)


@mutant("O16 a sync of the log that failed is passed over")
def _(assign: Assign) -> None:
    async def sync_head(self: Log) -> None:
        upto = self.ring.next_seq - 1
        with suppress(OSError):
            await self._file.sync()
        self.durable_seq = max(self.durable_seq, upto)

    assign(Log, "_sync_head", sync_head)


@mutant("O16 after a sync that failed the page cache is believed", run=BELIEVED)
def _(assign: Assign) -> None:
    async def rewrite(self: Log, seq: int) -> None:
        await self.sync(self.next_seq - 1)

    assign(Log, "rewrite", rewrite)


@mutant("I3 a flush syncs nothing")
def _(assign: Assign) -> None:
    assign(Group, "flush", nothing)


@mutant("O22 clearings are not logged")
def _(assign: Assign) -> None:
    async def clear(self: Group, volume: Volume, change: Any, *, durable: bool = False) -> None:
        for facet in volume.in_service():
            await facet.file.punch(change.offset, change.length)

    assign(Group, "clear", clear)


@mutant("O5 a stop is clean though a request has not ended", run=STOPPED_AND_CLEARING)
def _(assign: Assign) -> None:
    original = Node._settle

    async def settle(self: Node) -> None:
        for facet in (facet for volume in self.volumes for facet in volume.facets):
            facet.pending.clear()
        await original(self)

    assign(Node, "_settle", settle)


def _clean_anyway(assign: Assign) -> None:
    original = Node._make_safe

    async def make_safe(self: Node) -> None:
        await original(self)
        assert self.exports is not None
        if self.exports.stopping:
            for facet in (facet for volume in self.volumes for facet in volume.facets):
                facet.synced_seq = facet.written_seq

    assign(Node, "_make_safe", make_safe)


@mutant(
    "O5 a stop is clean though what ended after its syncs is not durable", run=STOPPED_AND_CLEARED
)
def _(assign: Assign) -> None:
    _clean_anyway(assign)


@mutant("M12 a request that outlives the patience of a stop is made", run=STOPPED_AND_WAITING)
def _(assign: Assign) -> None:
    _clean_anyway(assign)  # else redo makes it good; but the last save is no moment for a request
    assign(Group, "end", lambda self: None)


@mutant("O16 a facet answers that has lost what it held", run=READ_AND_FAILED)
def _(assign: Assign) -> None:
    async def ask(
        self: Volume,
        offset: int,
        length: int,
        ask: Callable[[LocalFacet], Awaitable[Any]],
        otherwise: Callable[[Buffer], Any],
    ) -> Any:
        return await ask(self.facets[0])

    assign(Volume, "_ask", ask)
