"""Mutants of snapshots, on both sides (V9, O21, X2)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from nbdmirror.codec import record as codec
from nbdmirror.codec.mark import Mark
from nbdmirror.codec.record import Record
from nbdmirror.core.layers import TENTATIVE
from nbdmirror.engine import leftout
from nbdmirror.engine.applier import Applier
from nbdmirror.engine.chain import Chain, Member
from nbdmirror.engine.follower import Follower
from nbdmirror.engine.layer import LayerFile
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.secondary import Secondary
from nbdmirror.engine.session import Session
from nbdmirror.engine.snapshotexport import SnapshotVolume
from nbdmirror.engine.snapshots import Entry, Snapshots
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from tests.sim.mutants.aims import DELETIONS, FOLLOWERS, INSCRIBED, MARKERS, RESYNCS, waiting
from tests.sim.mutation import Assign, mutant, nothing
from tests.sim.plays.secondary import PUNCHED
from tests.sim.plays.snapshots import (
    BACK_UNTOLD,
    CAME_AND_WENT,
    CLEARED_LATE,
    CONSISTENT_AND_BACK,
    CONSISTENT_AND_DEAD,
    DELETED_THERE,
    DELETED_WHILE_KEPT,
    FOLLOWED_AND_ROTTED,
    GIVEN_UP_WHILE_DELETED,
    HALF_TAKEN,
    OUTLIVED,
    TAKEN_AND_ROTTED,
)


class Unsynced:
    """A file whose sync does nothing."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return nothing if name == "sync" else getattr(self._file, name)


@mutant("O21 a region is overwritten before its old content is durable")
def _(assign: Assign) -> None:
    original = LayerFile.keep

    async def keep(self: LayerFile, *args: Any) -> None:
        file = self._file
        setattr(self, "_file", Unsynced(file))  # noqa: B010
        try:
            await original(self, *args)
        finally:
            self._file = file

    assign(LayerFile, "keep", keep)


@mutant("O21 after a crash a region is believed without its checksum")
def _(assign: Assign) -> None:
    async def prove(self: LayerFile) -> None:
        for number in list(self._tentative):
            for region, slot in list(self.map.regions_of(number)):
                self.map.set(region, slot & ~TENTATIVE)
        await self.settle()

    assign(LayerFile, "prove", prove)


@mutant("O21 what is being cleared is not waited for", run=CLEARED_LATE)
def _(assign: Assign) -> None:
    assign(Volume, "wait_landed", nothing)


@mutant("O21 a secondary's snapshot keeps nothing until it is saved", MARKERS)
def _(assign: Assign) -> None:
    original = Snapshots.plan

    async def plan(
        self: Snapshots, entry: Entry, *, followed: bool = False
    ) -> list[tuple[Chain, Member]]:
        if entry["seq"] is None:
            return await original(self, entry)
        setattr(self, "_push", lambda made: None)  # noqa: B010
        try:
            made = await original(self, entry, followed=followed)
        finally:
            del self._push
        self._push(made)
        return made

    assign(Snapshots, "plan", plan)


@mutant("V9 a marker counts as followed before its snapshot is in the list", FOLLOWERS)
def _(assign: Assign) -> None:
    original = Follower._follow

    async def follow(self: Follower, mark: Mark, record: Record) -> None:
        self._snapshots.store.state["marked_seq"] = record.seq
        await original(self, mark, record)

    assign(Follower, "_follow", follow)


@mutant("O21 a secondary applies plain writes over what a snapshot needs")
def _(assign: Assign) -> None:
    assign(Applier, "_guarded", lambda self, places: False)


@mutant("O21 redo keeps nothing")
def _(assign: Assign) -> None:
    async def redo(self: Follower, record: Record) -> None:
        if record.kind == codec.MARK:
            await self.marked(record)

    assign(Follower, "redo", redo)


@mutant("O21 redo keeps whatever it overwrites")
def _(assign: Assign) -> None:
    async def redo(self: Follower, record: Record) -> None:
        if record.kind == codec.MARK:
            await self.marked(record)
        elif (chain := self._snapshots.chains[record.volume]).members:
            await chain.make_way([(record.offset, record.length)])

    assign(Follower, "redo", redo)


@mutant("V9 redo follows markers again", run=DELETED_THERE)
def _(assign: Assign) -> None:
    original = Follower.marked

    async def marked(self: Follower, record: Record) -> None:
        self._snapshots.store.state["marked_seq"] = 0
        await original(self, record)

    assign(Follower, "marked", marked)


@mutant("O21 a snapshot whose marker was in memory is one", run=HALF_TAKEN)
def _(assign: Assign) -> None:
    original = Snapshots.recovered

    def recovered(self: Snapshots, end_seq: int, *, redone: bool) -> None:
        for entry in self.entries if redone else ():
            entry.pop("pending", None)
        original(self, end_seq, redone=redone)

    assign(Snapshots, "recovered", recovered)


@mutant("V9 a plan without a marker is a snapshot")
def _(assign: Assign) -> None:
    def recovered(self: Snapshots, end_seq: int, *, redone: bool) -> None:
        for entry in self.entries:
            if entry["seq"] is None:
                entry.update(seq=end_seq, after=end_seq)

    assign(Snapshots, "recovered", recovered)


@mutant("V9 what an older snapshot needs of a deleted one does not move")
def _(assign: Assign) -> None:
    async def leave(self: Chain, uuid: str, *, free: bool) -> Member | None:
        return self.drop(uuid)

    assign(Chain, "leave", leave)


@mutant("V9 a secondary takes snapshots in the middle of a resync")
def _(assign: Assign) -> None:
    original = Follower._follow

    async def follow(self: Follower, mark: Mark, record: Record) -> None:
        upstream = self._snapshots.store.state["upstream"]
        was, upstream["consistent"] = upstream["consistent"], True
        try:
            await original(self, mark, record)
        finally:
            upstream["consistent"] = was

    assign(Follower, "_follow", follow)


@mutant("V9 a secondary does not say which snapshots its stream left out")
def _(assign: Assign) -> None:
    assign(Follower, "left_out", lambda self, told, epoch: None)


@mutant("V9 a snapshot that outlived its record is not told of", run=OUTLIVED)
def _(assign: Assign) -> None:
    assign(leftout, "_ended", lambda entry, forks: False)


@mutant("V9 a snapshot that outlived its record goes from the secondary", run=OUTLIVED)
def _(assign: Assign) -> None:
    original = Follower.restarted
    assign(Follower, "restarted", lambda self, seq, told: original(self, seq, ()))


@mutant("V9 deletions are not remembered for a remote in DCM logging", DELETIONS)
def _(assign: Assign) -> None:
    assign(Remote, "miss", lambda self, *args: None)


@mutant("V9 deletions that wait in the log are forgotten when the stream begins anew", waiting)
def _(assign: Assign) -> None:
    original = Remote.miss

    def miss(self: Remote, *args: Any) -> None:
        if self.tracking:
            original(self, *args)

    assign(Remote, "miss", miss)


@mutant("V9 a flush of what was written into a snapshot syncs nothing", INSCRIBED)
def _(assign: Assign) -> None:
    assign(SnapshotVolume, "flush", nothing)


@mutant("X2 region copies keep nothing")
def _(assign: Assign) -> None:
    """What ``Secondary.make_way`` keeps for several copies with one sync, ``place`` would keep for
    each: that is an economy, not a rule, and only the two together can be seen to be missing."""
    original = Secondary.place

    async def place(self: Secondary, volume: int, *args: Any) -> None:
        guard, self.volumes[volume].guard = self.volumes[volume].guard, None
        try:
            await original(self, volume, *args)
        finally:
            self.volumes[volume].guard = guard

    assign(Secondary, "make_way", nothing)
    assign(Secondary, "place", place)


@mutant("X2 holes that are copied keep nothing", run=PUNCHED)
def _(assign: Assign) -> None:
    original = Secondary.place

    async def place(self: Secondary, volume: int, offset: int, length: int, data: Any) -> None:
        guard = self.volumes[volume].guard
        self.volumes[volume].guard = guard if data is not None else None
        try:
            await original(self, volume, offset, length, data)
        finally:
            self.volumes[volume].guard = guard

    assign(Secondary, "place", place)


@mutant("X2 a copy lands while what it overwrites is being kept", RESYNCS)
def _(assign: Assign) -> None:
    original = Secondary.place

    async def make_way(self: Secondary, volume: int, ranges: Any) -> None:
        guard = self.volumes[volume].guard
        if guard is not None:
            asyncio.ensure_future(guard.make_way(list(ranges)))  # noqa: RUF006 (the mutant's point)
            await asyncio.sleep(0)

    async def place(self: Secondary, volume: int, *args: Any) -> None:
        guard, self.volumes[volume].guard = self.volumes[volume].guard, None
        try:
            await original(self, volume, *args)
        finally:
            self.volumes[volume].guard = guard

    assign(Secondary, "make_way", make_way)
    assign(Secondary, "place", place)


@mutant("X2 no image is kept before a resync")
def _(assign: Assign) -> None:
    assign(Follower, "before_resync", nothing)


@mutant("X2 the image from before a resync is never released")
def _(assign: Assign) -> None:
    assign(Follower, "release", lambda self, images: None)


@mutant("X2 a start does not release the image from before a resync", run=CONSISTENT_AND_DEAD)
def _(assign: Assign) -> None:
    original = Secondary.start

    def start(self: Secondary) -> None:
        setattr(self.follower, "release", lambda images: None)  # noqa: B010
        original(self)
        del self.follower.release

    assign(Secondary, "start", start)


@mutant("V9 a secondary applies records without keeping")
def _(assign: Assign) -> None:
    async def make_way(self: Follower, records: Iterable[Record]) -> None:
        return None

    assert Applier is not None
    assign(Follower, "make_way", make_way)


@mutant("X2 the image of the next resync goes with that of the last", run=CONSISTENT_AND_BACK)
def _(assign: Assign) -> None:
    original = Follower.release
    assign(Follower, "release", lambda self, images: original(self, self.images()))


@mutant("V9 a region is kept in a layer that has left", run=DELETED_WHILE_KEPT)
def _(assign: Assign) -> None:
    original = Chain._content

    async def keep(self: Chain, batch: list[int]) -> None:
        newest = self.members[-1].layer
        contents = [(region, await original(self, region)) for region in batch]
        try:
            await newest.keep(contents)
        except OSError as error:
            await self._give_up(self, error)

    assign(Chain, "_keep", keep)


@mutant("V9 a layer leaves while regions move to it", run=GIVEN_UP_WHILE_DELETED)
def _(assign: Assign) -> None:
    original = Chain.leave

    async def leave(self: Chain, uuid: str, *, free: bool) -> Member | None:
        saved, self._moving = self._moving, asyncio.Lock()
        try:
            return await original(self, uuid, free=free)
        finally:
            self._moving = saved

    assign(Chain, "leave", leave)


@mutant("I5 one slot alone knows of a snapshot that was followed", run=FOLLOWED_AND_ROTTED)
@mutant("I5 one slot alone knows of a snapshot that is being taken", run=TAKEN_AND_ROTTED)
def _(assign: Assign) -> None:
    async def save_twice(self: Store) -> None:
        await self.save()

    assign(Store, "save_twice", save_twice)


@mutant("V9 a remote is told of snapshots as they are not durably", run=BACK_UNTOLD)
def _(assign: Assign) -> None:
    original = Session._send_start

    async def send_start(self: Session, *args: Any) -> None:
        await self.context.store.save()
        save = self.context.store.save
        setattr(self.context.store, "save", nothing)  # noqa: B010
        try:
            await original(self, *args)
        finally:
            setattr(self.context.store, "save", save)  # noqa: B010

    assign(Session, "_send_start", send_start)


@mutant("V9 snapshots that a remote never had crowd out one that it has", run=CAME_AND_WENT)
def _(assign: Assign) -> None:
    original = Remote.miss

    def miss(self: Remote, seq: int, mark: Mark, taken: int = 0) -> None:
        original(self, seq, mark)

    assign(Remote, "miss", miss)


@mutant("V9 what a remote was told of is taken for what it never had", DELETIONS)
def _(assign: Assign) -> None:
    original = Remote.miss

    def miss(self: Remote, seq: int, mark: Mark, taken: int = 0) -> None:
        original(self, seq, mark, taken and self.group.log.next_seq)

    assign(Remote, "miss", miss)
