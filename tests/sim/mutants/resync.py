"""Mutants of overflow, of maps and of resync (O6, O7, O12-O14, T-rules)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nbdmirror.codec.repl import Type
from nbdmirror.core import identity
from nbdmirror.core.dcm import Dcm
from nbdmirror.engine import session
from nbdmirror.engine.batch import Batch, Records
from nbdmirror.engine.copier import Copier
from nbdmirror.engine.gate import SyncGate
from nbdmirror.engine.group import Group
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import Cursor
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.primary import Primary
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.resync import Resync
from nbdmirror.engine.session import Session
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import FormatError
from tests.sim import convergence
from tests.sim.mutants.aims import DEATHS, INTERRUPTED, NEW_DISKS, REWRITTEN
from tests.sim.mutation import Assign, mutant, nothing
from tests.sim.options import storm
from tests.sim.plays.log import LET_GO_TOO_SOON
from tests.sim.plays.remotes import AHEAD, REMOVED_WHILE_FILLED, ROTTEN_IN_A_RESYNC, TRIED_FIRST
from tests.sim.plays.standins import CONSISTENT_AND_CUT


@mutant("O12 pending entries are released before they are marked")
def _(assign: Assign) -> None:
    def floor(self: Remote, head_seq: int) -> int:
        return head_seq if self.tracking and not self.starting else self.durable_seq

    async def mark_pending(self: Remote, cursor: Cursor) -> None:
        # Left as it is, it ends in an assertion: what it is to read is gone.
        log = self.group.log
        while (seq := max(cursor.seq, log.ring.tail_seq)) < self._mark_end:
            cursor = cursor if cursor.seq == seq else Cursor(seq)
            for record in (await log.read(cursor)).parsed():
                self.note(record)

    assign(Remote, "floor", floor)
    assign(Remote, "_mark_pending", mark_pending)


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


@mutant("O7 a comparison is the end of a region that is still to be copied", INTERRUPTED)
def _(assign: Assign) -> None:
    original = Dcm.begin

    def begin(self: Dcm, first: int, count: int, token: int) -> None:
        if token:  # 0: what differs, and is copied later
            original(self, first, count, token)

    assign(Dcm, "begin", begin)


@mutant("O7 a copy is done when it was sent", INTERRUPTED)
def _(assign: Assign) -> None:
    original = Copier._send

    async def send(self: Copier, token: int, volume: Volume, runs: list[tuple[int, int]]) -> None:
        await original(self, token, volume, runs)
        window = self._windows[token]
        self.remote.dcms[volume.index].finish(window.first, window.count, token)

    assign(Copier, "_send", send)


@mutant("O13 a region is copied without its lock", REWRITTEN)
def _(assign: Assign) -> None:
    @asynccontextmanager
    async def locked(*_: Any, **__: Any) -> AsyncIterator[None]:
        yield

    original = Copier.copy

    async def copying(self: Copier, volume: Volume, *args: Any) -> None:
        proxy = copy.copy(volume)
        proxy.locked = locked  # type: ignore[method-assign, assignment]
        await original(self, proxy, *args)

    assign(Copier, "copy", copying)


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

    async def fill(self: Remote, why: str, *, save: bool = True) -> None:
        if not self.facts["full"]:
            await original(self, why, save=save)

    assign(Remote, "fill", fill)


@mutant("T7 a secondary that is ahead begins at the log's head", run=AHEAD)
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


@mutant("O14 the remote is told of a resync before its map is durable", NEW_DISKS)
def _(assign: Assign) -> None:
    original = Session._start

    async def start(self: Session, decision: Any) -> None:
        setattr(self.remote, "sync_maps", nothing)  # noqa: B010
        try:
            await original(self, decision)
        finally:
            del self.remote.__dict__["sync_maps"]

    assign(Session, "_start", start)


@mutant("X3 records take a turn of any length while regions are copied", run=convergence.run)
def _(assign: Assign) -> None:
    assign(Session, "_frame_bytes", lambda self: session.FRAME_BYTES)


@mutant("X3 the stream never goes on in order", run=convergence.run)
def _(assign: Assign) -> None:
    assign(Resync, "_may_order", lambda self, seen: seen.left_bytes == 0)


@mutant("O12 a map is filled while a resync clears it", run=ROTTEN_IN_A_RESYNC)
def _(assign: Assign) -> None:
    original = Session._ship

    async def ship(self: Session) -> None:
        try:
            await original(self)
        except FormatError as error:
            await self._log_rotten(error)
            self._rotten = None
            raise

    assign(Session, "_ship", ship)


@mutant("M17 a remote is removed while its maps are filled", run=REMOVED_WHILE_FILLED)
def _(assign: Assign) -> None:
    async def resync(self: Primary, name: str, full: bool) -> dict[str, Any]:
        remote = self.remote(name)
        remote.drop.set()
        await remote.fill("asked for by a person")
        remote.kick.set()
        return {}

    assign(Primary, "resync", resync)


@mutant("O12 whoever finds a remote out of the log takes it for marked", run=LET_GO_TOO_SOON)
def _(assign: Assign) -> None:
    original = Remote.overflow

    async def overflow(self: Remote, why: str) -> None:
        if not self.tracking:
            await original(self, why)

    assign(Remote, "overflow", overflow)


@mutant("M11 a consistent remote has all marked in the superblock", run=CONSISTENT_AND_CUT)
def _(assign: Assign) -> None:
    save, sync = Remote.save_defaults, Remote.sync_maps

    def save_defaults(self: Remote) -> None:
        if not self.facts["consistent"]:
            save(self)

    async def sync_maps(self: Remote) -> None:
        await sync(self)
        save(self)

    assign(Remote, "save_defaults", save_defaults)
    assign(Remote, "sync_maps", sync_maps)


@mutant("I8 a remote that nobody has tried yet counts as lost", run=TRIED_FIRST)
def _(assign: Assign) -> None:
    original = SyncGate.excuse

    def excuse(self: SyncGate, excused: bool) -> None:
        original(self, excused)
        self.renewing = False

    assign(SyncGate, "excuse", excuse)
