"""The product with one rule broken at a time: a campaign that lets a mutant live proves nothing.

The names begin with the rule (an O-number, V-row or invariant) that is dropped.

Not among them, because another rule makes them unobservable: each one of the two
checks of a scan against records of an ended epoch (the two together are here).
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from nbdmirror.codec import record as codec
from nbdmirror.codec import repl
from nbdmirror.codec.repl import Type
from nbdmirror.core import identity
from nbdmirror.core.active import ActiveMap
from nbdmirror.core.dcm import Dcm
from nbdmirror.engine import doubt, logscan, node, recovery, remoteread, session
from nbdmirror.engine.activemap import ActiveMapFile
from nbdmirror.engine.applier import Applier
from nbdmirror.engine.batch import Batch, Records
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.facetcopy import FacetCopy
from nbdmirror.engine.facetmember import Member
from nbdmirror.engine.gate import SyncGate
from nbdmirror.engine.group import Group
from nbdmirror.engine.groupcommit import GroupCommit
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import RING_AT, Log
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.receiver import Receiver
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.secondary import Secondary
from nbdmirror.engine.session import Session
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import FormatError
from tests.sim.faults import Timing
from tests.sim.mutation import Assign, aimed, mutant, nothing
from tests.sim.options import KIB, storm

# -- the active map ------------------------------------------------------------------------------


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


# -- the secondary -------------------------------------------------------------------------------


@mutant("O2 the secondary applies before its log is durable")
def _(assign: Assign) -> None:
    async def run(self: Applier) -> None:
        while True:
            while self.applied_seq >= self._log.next_seq - 1:
                self._log.appended.clear()
                await self._log.appended.wait()
            async with self.lock:
                if self.applied_seq < self._log.next_seq - 1:
                    await self._apply_until(self._log.next_seq - 1)
            await self.caught_up()

    assign(Applier, "run", run)


@mutant("O4 what is received is acknowledged as durable")
def _(assign: Assign) -> None:
    def acknowledge(self: Receiver) -> None:
        if not self._started or self.link.cause is not None:
            return
        received = self.secondary.log.next_seq - 1
        state = (received, received, min(received, self.secondary.applied_seq))
        if state != self._acked:
            self._acked = state
            self.link.send(Type.ACK, [repl.ACK.pack(*state)])

    assign(Receiver, "acknowledge", acknowledge)


LOST_LINKS = aimed(
    faults={"reset": 1.0},
    fault_gap=3.0,
    timing=Timing(sync=(0.001, 1.0)),
    extent=16 * KIB,
    mode="async",
    clients=4,
    operations=300,
    hot_cells=16,
    pause=2.0,
    fua=0.0,
    flush=0.02,
    snapshot_gap=0.0,
)


@mutant("O4 WELCOME promises what is only received", LOST_LINKS)
def _(assign: Assign) -> None:
    original = Receiver._handshake

    async def handshake(self: Receiver, frame: Any) -> None:
        log = self.secondary.log
        durable = log.durable_seq
        log.durable_seq = log.next_seq - 1
        try:
            await original(self, frame)
        finally:
            log.durable_seq = durable

    assign(Receiver, "_handshake", handshake)


@mutant("O7 a region is acknowledged before it is on disk")
def _(assign: Assign) -> None:
    async def sync_regions(self: Receiver) -> None:
        while self._synced_tokens:
            tokens, self._synced_tokens = self._synced_tokens, []
            if self.link.cause is None:
                self.link.send(Type.DONE, [b"".join(map(repl.TOKEN.pack, tokens))])
        self._sync_task = None

    assign(Receiver, "_sync_regions", sync_regions)


@mutant("O8 records that are there already are applied again")
def _(assign: Assign) -> None:
    original = Session._resume
    checked = Receiver._checked

    async def resume(self: Session, seq: int) -> None:
        log = self.remote.group.log
        await original(self, max(log.ring.tail_seq, seq - 3))

    def again(self: Receiver, view: memoryview, next_seq: int) -> Any:
        for record in codec.parse_all(view):
            if record.seq < next_seq and record.payload is not None:
                for facet in self.secondary.volumes[record.volume].facets:
                    facet.pwrite(record.offset, record.payload)
        return checked(self, view, next_seq)

    assign(Session, "_resume", resume)
    assign(Receiver, "_checked", again)


RESYNCS = aimed(
    faults={"resync": 1.0, "full resync": 1.0},
    fault_gap=0.1,
    moments=0.5,
    moments_of=("consistent",),
    mode="async",
    clients=4,
    operations=200,
    hot_cells=16,
    pause=0.01,
    last_facet=False,
)


@mutant("I1 consistent is said before the end of the resync is applied", RESYNCS)
def _(assign: Assign) -> None:
    async def check_end(self: Receiver) -> None:
        seq, self._end_seq = self._end_seq, None
        if seq is not None and self.link.cause is None:
            await self.secondary.become_consistent(seq)
            self.link.send(Type.CONSISTENT, [repl.SEQ.pack(seq)])

    assign(Receiver, "_check_end", check_end)


@mutant("I1 the secondary stays consistent while regions are copied")
def _(assign: Assign) -> None:
    original = Secondary.adopt

    async def adopt(self: Secondary, *args: Any) -> None:
        former = self.store.state["upstream"] or {}
        consistent = bool(former.get("consistent"))
        await original(self, *args)
        self.store.state["upstream"]["consistent"] = consistent
        await self.store.save()

    assign(Secondary, "adopt", adopt)
    assign(Secondary, "check_resyncing", lambda self: None)


@mutant(
    "O10 what a secondary's log lost in part is taken for damage by a later start",
    aimed(
        faults={"power b": 1.0, "kill b": 1.0, "slow link": 0.3},
        fault_gap=1.0,
        timing=Timing(sync=(0.001, 0.5)),
        sizes=(256 * KIB,),
        facets=1,
        remotes=1,
        extent=16 * KIB,
        log_size=1028 * KIB,
        remote_log_size=1028 * KIB,
        mode="async",
        clients=4,
        operations=500,
        write_cells=8,
        pause=0.5,
        fua=0.0,
        flush=0.0,
        snapshot_gap=0.0,
    ),
)
def _(assign: Assign) -> None:
    assign(Log, "forget_behind", nothing)


@mutant("V7 the log is emptied before it was applied")
def _(assign: Assign) -> None:
    assign(Secondary, "drain", nothing)


@mutant("O22 clearings are not applied on the secondary")
def _(assign: Assign) -> None:
    original = LocalFacet.apply

    async def apply(self: LocalFacet, record: codec.Record) -> None:
        if record.payload is not None:
            await original(self, record)

    assign(LocalFacet, "apply", apply)


# -- releasing the log ---------------------------------------------------------------------------


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


# -- recovery ------------------------------------------------------------------------------------


@mutant("O10 recovery does not begin a new epoch")
def _(assign: Assign) -> None:
    def note_fork(store: Store, recovered: Any) -> None:
        recovery.note_fork(store, recovered)
        store.state["epoch"] -= 1

    assign(node, "note_fork", note_fork)


@mutant("O10 the end of an epoch is not remembered")
def _(assign: Assign) -> None:
    assign(node, "note_fork", lambda store, recovered: None)


DEATHS = aimed(
    faults={"kill a": 1.0, "power a": 3.0, "power both": 1.0, "die starting": 1.0},
    fault_gap=0.5,
    timing=Timing(sync=(0.001, 0.03)),
    clients=4,
    operations=300,
    write_cells=1,
    hot_cells=16,
    pause=0.1,
    flush=0.02,
    last_facet=False,
)
"""One death of the primary after the other, and records of one size: what is left of a former
epoch lies where the next record would."""


@mutant("O10 a scan takes records of an epoch that had ended", DEATHS)
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


@mutant("O11 the superblock has one slot only")
def _(assign: Assign) -> None:
    original = Store._save

    async def save(self: Store) -> None:
        self._slot = 1 - self._slot
        await original(self)

    async def first_save(self: Store) -> None:
        await (original if self._counter == 0 else save)(self)

    assign(Store, "_save", first_save)


@mutant("O11 a slot that may be in the page cache only is relied on", DEATHS)
def _(assign: Assign) -> None:
    assign(Store, "_settle", nothing)


@mutant("O19 an unfinished overflow is not finished at the next start")
def _(assign: Assign) -> None:
    async def pending(log: Log) -> list[Any]:
        return []

    assign(doubt, "_pending", pending)


# -- overflow, DCM, resync -----------------------------------------------------------------------


@mutant("O12 pending entries are released before they are marked")
def _(assign: Assign) -> None:
    def floor(self: Remote, head_seq: int) -> int:
        return head_seq if self.tracking and not self.starting else self.durable_seq

    assign(Remote, "floor", floor)


@mutant("O12 pending entries are released before their marks are durable", storm)
def _(assign: Assign) -> None:
    original = Housekeeper._confirm

    async def confirm(self: Housekeeper) -> None:
        tracked = [(remote, remote.sync_maps) for remote in self.remotes]
        for remote, _ in tracked:
            setattr(remote, "sync_maps", nothing)  # noqa: B010
        try:
            await original(self)
        finally:
            for remote, _ in tracked:
                del remote.__dict__["sync_maps"]

    assign(Housekeeper, "_confirm", confirm)


@mutant("O12 the map is left before the remote is READY")
def _(assign: Assign) -> None:
    original = Session._receive

    async def receive(self: Session, wanted: Type) -> dict[str, Any]:
        if wanted is Type.READY:
            self.remote.resume_log()
            self.remote.starting = False
            for dcm in self.remote.dcms:
                dcm.clear()
            await self.context.store.save()
            self.remote.starting = True
        return await original(self, wanted)

    assign(Session, "_receive", receive)


@mutant("O12 marks stay in memory")
def _(assign: Assign) -> None:
    assign(DcmFile, "_write", lambda self, pages: None)


@mutant("O12 writes to a remote in the map are not marked")
def _(assign: Assign) -> None:
    original = Group._append

    def append(self: Group, volume: Volume, batch: Batch) -> Records:
        trackers, self.trackers = self.trackers, []
        try:
            return original(self, volume, batch)
        finally:
            self.trackers = trackers

    assign(Group, "_append", append)


@mutant("O6 a bit is cleared though its region was marked again")
def _(assign: Assign) -> None:
    def finish(self: Dcm, first: int, count: int, token: int) -> list[int]:
        self._in_flight.update(dict.fromkeys(range(first, first + count), token))
        return original(self, first, count, token)

    original = Dcm.finish
    assign(Dcm, "finish", finish)


@mutant("O12 the log is left out before the remote knows where it begins")
def _(assign: Assign) -> None:
    original = Session._order

    async def order(self: Session) -> None:
        self._ready.set()
        await original(self)

    assign(Session, "_order", order)


@mutant("O13 a region is read without its lock")
def _(assign: Assign) -> None:
    original = Volume.locked

    class Free:
        async def __aenter__(self) -> None:
            return None

        async def __aexit__(self, *_: Any) -> None:
            return None

    def locked(self: Volume, offset: int, length: int, *, exclusive: bool) -> Any:
        return original(self, offset, length, exclusive=True) if exclusive else Free()

    assign(Volume, "locked", locked)


@mutant("T2 another disk goes on with the former one's comparison")
def _(assign: Assign) -> None:
    original = Remote.fill

    async def fill(self: Remote, why: str) -> None:
        if not self.facts["full"]:
            await original(self, why)

    assign(Remote, "fill", fill)


@mutant("T7 a secondary that is ahead begins at the log's head", DEATHS)
def _(assign: Assign) -> None:
    original = identity.decide

    def decide(source: Any, target: Any) -> Any:
        decision = original(source, target)
        if decision.rule == "T7":
            return dataclasses.replace(decision, seq=source.next_seq)
        return decision

    assign(session, "decide", decide)


@mutant("T7 forks are not looked at in the handshake", DEATHS)
def _(assign: Assign) -> None:
    original = identity.decide

    def decide(source: Any, target: Any) -> Any:
        return original(dataclasses.replace(source, forks=()), target)

    assign(session, "decide", decide)


# -- durability ----------------------------------------------------------------------------------


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


@mutant(
    "O16 after a sync that failed the page cache is believed",
    aimed(
        faults={"sync loss b": 2.0, "power b": 1.0},
        fault_gap=0.5,
        mode="async",
        clients=4,
        operations=200,
        pause=0.2,
        timing=Timing(sync=(0.001, 0.1)),
        moments=0.3,
        moments_of=("connected",),
        last_facet=False,
    ),
)
def _(assign: Assign) -> None:
    async def rewrite(self: Log, seq: int) -> None:
        await self.sync(self.next_seq - 1)

    assign(Log, "rewrite", rewrite)


@mutant("O5 the superblock is not synced")
def _(assign: Assign) -> None:
    original = Store._save

    async def save(self: Store) -> None:
        file = self._file

        class Unsynced:
            path = file.path
            pwrite = staticmethod(file.pwrite)
            sync = staticmethod(nothing)
            close = staticmethod(file.close)

        if self._counter > 0:
            setattr(self, "_file", Unsynced())  # noqa: B010
        try:
            await original(self)
        finally:
            self._file = file

    assign(Store, "_save", save)


@mutant("I3 a flush syncs nothing")
def _(assign: Assign) -> None:
    assign(Group, "flush", nothing)


@mutant("O22 clearings are not logged")
def _(assign: Assign) -> None:
    async def clear(self: Group, volume: Volume, change: Any, *, durable: bool = False) -> None:
        for facet in volume.in_service():
            await facet.file.punch(change.offset, change.length)

    assign(Group, "clear", clear)


# -- local facets, synchronous remotes, the log's disk -------------------------------------------


@mutant("M8 what a facet misses past the log is not marked")
def _(assign: Assign) -> None:
    assign(Member, "mark", lambda self, volume, offset, length: None)


@mutant("M6 a facet is trusted before it has all that it lacks")
def _(assign: Assign) -> None:
    assign(FacetCopy, "run", nothing)


@mutant(
    "O13 a facet's copy is made without the range lock",
    aimed(
        faults={"facet offline": 1.0, "facet replace": 1.0},
        fault_gap=0.1,
        facets=2,
        clients=4,
        operations=300,
        hot_cells=64,
        pause=0.01,
        timing=Timing(write=(0.001, 0.05), miss=0.5),
        last_facet=False,
    ),
)
def _(assign: Assign) -> None:
    @asynccontextmanager
    async def locked(*_: Any, **__: Any) -> AsyncIterator[None]:
        yield

    original = FacetCopy._stretch

    async def stretch(self: FacetCopy, first: int, count: int) -> int:
        proxy = copy.copy(self._volume)
        proxy.locked = locked  # type: ignore[method-assign, assignment]
        self._volume, volume = proxy, self._volume
        try:
            return await original(self, first, count)
        finally:
            self._volume = volume

    assign(FacetCopy, "_stretch", stretch)


@mutant(
    "M5 the log is not laid over what a remote gives",
    aimed(
        faults={"facet error": 2.0, "slow link": 1.0, "net stall": 0.3},
        fault_gap=0.3,
        facets=1,
        last_facet=True,
        clients=4,
        operations=200,
        hot_cells=16,
        pause=0.05,
        moments=0.0,
    ),
)
def _(assign: Assign) -> None:
    async def overlay(log: Log, volume: int, offset: int, data: Any, seq: int) -> Any:
        return data

    assign(remoteread, "overlay", overlay)


@mutant("I3 a flush does not wait for a synchronous remote's disk")
def _(assign: Assign) -> None:
    original = SyncGate.wait

    async def wait(self: SyncGate, seq: int, durable: bool) -> None:
        await original(self, seq, False)

    assign(SyncGate, "wait", wait)


@mutant(
    "M13 what the lost log held for remotes is not marked",
    aimed(
        faults={"sync error a": 2.0, "cut": 1.0},
        fault_gap=0.3,
        clients=4,
        operations=200,
        pause=0.1,
        last_facet=False,
        spill=0,
    ),
)
def _(assign: Assign) -> None:
    async def overflow(self: Remote, why: str) -> None:
        if "log was" not in why or "full" in why:
            await original(self, why)

    original = Remote.overflow
    assign(Remote, "overflow", overflow)


@mutant("M13 a flush is not in the facets while the log is in memory")
def _(assign: Assign) -> None:
    async def sync_log(self: Housekeeper) -> int:
        return self._log.next_seq - 1

    assign(Housekeeper, "sync_log", sync_log)


@mutant(
    "M13 a facet is healed though what it lacks was in memory only",
    aimed(
        faults={"sync error a": 1.0, "facet error": 2.0, "kill a": 2.0},
        fault_gap=0.2,
        facets=2,
        clients=4,
        operations=200,
        pause=0.1,
        spill=0,
        last_facet=False,
    ),
)
def _(assign: Assign) -> None:
    original = recovery._healing

    def healing(store: Store, volumes: list[Volume], log: Log) -> Any:
        for entry in recovery._entries(store):
            entry["last"] = entry.get("since") is not None
        return original(store, volumes, log)

    assign(recovery, "_healing", healing)
