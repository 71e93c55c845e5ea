"""Mutants of the secondary: its log, its acknowledgements, what it says of itself."""

from __future__ import annotations

import asyncio
from typing import Any

from nbdmirror.codec import record as codec
from nbdmirror.codec import repl
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.core import identity
from nbdmirror.engine import opening, secondary
from nbdmirror.engine.applier import Applier
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.log import Log
from nbdmirror.engine.node import Node
from nbdmirror.engine.receiver import Receiver
from nbdmirror.engine.resync import Resync
from nbdmirror.engine.secondary import Secondary
from nbdmirror.engine.session import Session
from nbdmirror.errors import PeerError
from tests.sim.mutants.aims import RESYNCS, TWO_THERE
from tests.sim.mutation import Assign, mutant, nothing
from tests.sim.plays.callers import SECOND_RUN, WRONG_NAME_FIRST
from tests.sim.plays.secondary import (
    DELAY_GIVEN_UP,
    DRAINED_TWICE,
    FAILED_AND_FROZEN,
    FAILED_FOR_A_COMMAND,
    FROZEN_AND_FULL,
    FROZEN_WITH_ROOM,
    KEPT_FROZEN,
    LOST_IN_PART,
    MOVED_AND_CUT,
    MOVED_AND_FROZEN,
    MOVED_AND_STOPPED,
    OLD_TAIL,
    PUNCHED,
    RECEIVED_ONLY,
    STOPPED_LATE,
    SYNCED_BEFORE,
    THAWED_AND_FAILED,
    UNDELAYED,
)
from tests.sim.plays.setback import (
    NEW_AND_CUT,
    SET_BACK_AND_KILLED,
    SET_BACK_LATER,
    SET_BACK_WITHIN,
)


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


@mutant("O4 WELCOME promises what is only received", run=RECEIVED_ONLY)
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

    async def adopt(self: Secondary, *args: Any, **how: Any) -> None:
        former = self.store.state["upstream"] or {}
        consistent = bool(former.get("consistent"))
        await original(self, *args, **how)
        self.store.state["upstream"]["consistent"] = consistent
        await self.store.save()

    assign(Secondary, "adopt", adopt)
    assign(Secondary, "check_resyncing", lambda self: None)


@mutant(
    "O10 what a secondary's log lost in part is taken for damage by a later start",
    run=LOST_IN_PART,
)
def _(assign: Assign) -> None:
    assign(Log, "forget_behind", nothing)


@mutant("F1 what a former link began in a thread lands after what the next one writes", run=PUNCHED)
def _(assign: Assign) -> None:
    async def enter(self: Secondary, receiver: Receiver) -> None:
        last, self.current = self.current, receiver
        if last is not None and last is not receiver:
            last.link.close(PeerError("replaced by a newer connection"))
        await asyncio.sleep(0)

    assign(Secondary, "enter", enter)


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


@mutant("O9 records reach the secondary's facet as they arrive")
def _(assign: Assign) -> None:
    checked = Receiver._checked

    def at_once(self: Receiver, view: memoryview, next_seq: int) -> Any:
        for record in codec.parse_all(view):
            if record.seq >= next_seq and record.payload is not None and record.kind != codec.MARK:
                for facet in self.secondary.volumes[record.volume].facets:
                    facet.pwrite(record.offset, record.payload)
        return checked(self, view, next_seq)

    assign(Receiver, "_checked", at_once)


@mutant("M12 of a secondary's facets only the first is compared", TWO_THERE)
def _(assign: Assign) -> None:
    assign(secondary, "agreed", lambda lists: lists[0])


@mutant("M12 another file in the place of a facet is taken for that one", TWO_THERE)
def _(assign: Assign) -> None:
    assign(opening, "_distrust", lambda store, saved, facets, followed: None)


@mutant(
    "V8 a clean stop leaves the facets below the bound of what is applied", run=MOVED_AND_STOPPED
)
def _(assign: Assign) -> None:
    original = Applier.settle

    async def settle(self: Applier) -> None:
        if not self.bounded:
            await original(self)

    assign(Applier, "settle", settle)


@mutant("V8 what is due is looked at before the lock is had", run=MOVED_AND_FROZEN)
def _(assign: Assign) -> None:
    async def run(self: Applier) -> None:
        while True:
            until = self._due()
            if self.applied_seq >= until:
                await self._wait()
                continue
            if self.bounded:
                self.settings["limit"] = until
                await self._store.save()
            async with self.lock:
                if self.applied_seq < min(until, self._log.durable_seq):
                    await self._apply_until(until)
            if self.applied_seq >= self._due():
                await self.caught_up()

    assign(Applier, "run", run)


@mutant("V8 a stop counts on a bound that is not durable", run=MOVED_AND_CUT)
@mutant("V8 a session counts on the bound that the one before it had moved", run=DRAINED_TWICE)
@mutant("V8 a delay that was taken away is gone before that is durable", run=UNDELAYED)
def _trust_memory(assign: Assign) -> None:
    original = Applier._apply_until

    async def apply_until(self: Applier, until: int) -> None:
        limit = self.settings["limit"]
        if limit is None or limit >= until:
            self._unsaved = False
        await original(self, until)

    assign(Applier, "_apply_until", apply_until)


@mutant("O16 a facet that fails for a command leaves the node running", run=FAILED_FOR_A_COMMAND)
def _(assign: Assign) -> None:
    async def drain(self: Secondary) -> None:
        await self.log.sync(self.log.next_seq - 1)
        await self.applier.drain()
        await self.sync_facets()

    assign(Secondary, "drain", drain)


@mutant("V8 a thaw is followed that could not be saved", run=THAWED_AND_FAILED)
def _(assign: Assign) -> None:
    original = Node._start_secondary

    async def start_secondary(self: Node, recovered: Any) -> None:
        await original(self, recovered)
        self.store.on_failed = self._fail

    assign(Node, "_start_secondary", start_secondary)
    _trust_memory(assign)  # else what is applied is saved once more before that


@mutant("O5 a sync of the stream before counts for the one that follows", run=SYNCED_BEFORE)
def _(assign: Assign) -> None:
    def restart(self: LocalFacet, seq: int) -> None:
        self.written_seq = self.synced_seq = seq - 1

    assign(LocalFacet, "restart", restart)


@mutant("V8 a bound goes back behind what was begun", run=FAILED_AND_FROZEN)
def _(assign: Assign) -> None:
    original = Applier._apply_chunk

    async def apply_chunk(self: Applier, until: int) -> None:
        self._begun_seq = self.applied_seq
        await original(self, until)

    assign(Applier, "_apply_chunk", apply_chunk)


async def _sync_uncounted(self: Secondary) -> None:
    await self.sync_facets()


@mutant("X6 what redo brings back by an old superblock is compared with nothing", run=OLD_TAIL)
def _(assign: Assign) -> None:
    original = Secondary.distrust

    def distrust(self: Secondary) -> None:
        original(self)
        self.store.state["damaged"] = False

    assign(Secondary, "distrust", distrust)
    # Else a save follows the one that rots, and what it counts tells of it too.
    assign(Secondary, "sync_placed", _sync_uncounted)
    assign(identity, "_set_back", lambda source, target: False)


@mutant("O4 a secondary that stops lets in who comes late", run=STOPPED_LATE)
def _(assign: Assign) -> None:
    original = Secondary.enter

    async def enter(self: Secondary, receiver: Receiver) -> None:
        self.stopping = False
        await original(self, receiver)

    assign(Secondary, "enter", enter)


@mutant("T6 a copy of the primary ends its link before it is refused", run=SECOND_RUN)
def _(assign: Assign) -> None:
    assign(secondary, "second_run", lambda hello, current: None)


@mutant("T1 a second name keeps the right one out from its handshake on", run=WRONG_NAME_FIRST)
def _(assign: Assign) -> None:
    original = Secondary.refusal

    def refusal(self: Secondary, hello: dict[str, Any]) -> tuple[str, str] | None:
        current = self.current
        if current is None or not current.hello:
            return original(self, hello)
        was, current.agreed = current.agreed, True
        try:
            return original(self, hello)
        finally:
            current.agreed = was

    assign(Secondary, "refusal", refusal)


@mutant("I5 a secondary that lacks copies is told by its records alone", run=SET_BACK_LATER)
def _(assign: Assign) -> None:
    assign(identity, "_set_back", lambda source, target: False)


@mutant("I5 copies are counted once in a resync", run=SET_BACK_WITHIN)
def _(assign: Assign) -> None:
    assign(Secondary, "sync_placed", _sync_uncounted)


@mutant("I5 what a remote has counted is saved when a resync ends", run=SET_BACK_AND_KILLED)
def _(assign: Assign) -> None:
    assign(Resync, "_save_copies", nothing)


@mutant("T5 a session that is cut leaves a save without its end", run=NEW_AND_CUT)
def _(assign: Assign) -> None:
    async def cancelled(task: asyncio.Task[None]) -> None:
        await task

    assign(secondary, "to_the_end", cancelled)


@mutant("I4 a secondary that was set back counts from there", run=SET_BACK_LATER)
def _(assign: Assign) -> None:
    original = Secondary._count_copies
    assign(Secondary, "_count_copies", lambda self, known=0: original(self))


@mutant("V8 a resync applies what a person has frozen", run=KEPT_FROZEN)
def _(assign: Assign) -> None:
    assign(Secondary, "frozen", lambda self: None)


@mutant("I8 a frozen secondary with a full log keeps its primary waiting", run=FROZEN_AND_FULL)
def _(assign: Assign) -> None:
    assign(Receiver, "_check_stuck", lambda self, room: None)


@mutant("I8 a frozen secondary takes no primary when its log is nearly full", run=FROZEN_WITH_ROOM)
def _(assign: Assign) -> None:
    original = Receiver._start

    async def start(self: Receiver, frame: Frame) -> None:
        self._check_stuck(self.secondary.log.capacity // 4)
        await original(self, frame)

    assign(Receiver, "_start", start)


@mutant("V8 a delay is given up, and the point that it kept", run=DELAY_GIVEN_UP)
def _(assign: Assign) -> None:
    assign(Applier, "delayed", property(lambda self: False))
