"""Mutants of restores, and of changes beside the write path (V11-V14, M8, M11)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from nbdmirror.codec import mark as marks
from nbdmirror.codec.mark import Mark
from nbdmirror.core.dcm import Dcm
from nbdmirror.engine import restorer
from nbdmirror.engine.bypass import Bypass, note_beside
from nbdmirror.engine.facetcopy import FacetCopy
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.primary import Primary
from nbdmirror.engine.restore import VolumeRestore
from nbdmirror.engine.restorer import Restorer
from nbdmirror.engine.secondary import Secondary
from nbdmirror.engine.snapshots import Entry
from nbdmirror.engine.volume import Volume
from tests.sim.mutants.aims import ALONE, BESIDE, INSCRIBED, LEANING, LEAVING, RESTORES
from tests.sim.mutation import Assign, mutant, nothing
from tests.sim.plays.restores import (
    FORGOTTEN_AND_CUT,
    NEVER_BEGUN,
    NOT_RESTORED,
    NOT_RESTORED_DELAYED,
    NOT_RESTORED_LEANING,
    NOTHING_LEFT,
    RESTORED,
    RESTORED_AND_BACK,
    RESTORED_AND_REMOVED,
    RESTORED_AND_WRITTEN,
    RESTORED_WITHOUT_LOG,
)


@mutant("M8 a facet is filled while a restore overwrites what was read for it", RESTORES)
def _(assign: Assign) -> None:
    original = FacetCopy._copy

    async def copy(self: FacetCopy, offset: int, length: int) -> None:
        self._volume.beside.release()
        try:
            await original(self, offset, length)
        finally:
            await self._volume.beside.acquire()

    assign(FacetCopy, "_copy", copy)


@mutant("M11 what lies below a restore is read from a remote", LEANING)
def _(assign: Assign) -> None:
    assign(VolumeRestore, "hides", lambda self, offset, length: False)


@mutant("V12 a restore waits for a mark that the log has lost", run=RESTORED_WITHOUT_LOG)
def _(assign: Assign) -> None:
    original = Restorer.open

    async def opened(self: Restorer) -> None:
        state = self._store.state.get("restore") or {"seq": 0}
        seq = state["seq"]
        await original(self)
        state["seq"] = seq

    assign(Restorer, "open", opened)


@mutant("V14 a secondary that was restored does not say so")
def _(assign: Assign) -> None:
    original = Secondary.diverge

    async def diverge(self: Secondary, change: dict[str, Any]) -> None:
        await original(self, change)
        self.store.state["altered"] = False
        await self.store.save()

    assign(Secondary, "diverge", diverge)


@mutant("V14 each remote by itself may leave the log for a restore", run=NOT_RESTORED_LEANING)
def _(assign: Assign) -> None:
    def check_leaning(self: Primary) -> None:
        for remote in self.remotes:
            self.check_needed(remote)

    assign(Primary, "check_leaning", check_leaning)


@mutant("V14 a restore that did not begin leaves a snapshot behind", run=NOTHING_LEFT)
def _(assign: Assign) -> None:
    assign(Restorer, "_take_back", lambda self, undo: None)


@mutant("V14 a restore that did not begin leaves a snapshot at secondaries", run=NOTHING_LEFT)
def _(assign: Assign) -> None:
    async def forget(self: Restorer, undo: Entry) -> None:
        await self._snapshots.delete(undo)

    assign(Restorer, "_forget", forget)


@mutant("V14 a restore that did not begin tells secondaries last", run=FORGOTTEN_AND_CUT)
def _(assign: Assign) -> None:
    original = Restorer._forget

    async def forget(self: Restorer, undo: Entry) -> None:
        await self._snapshots.delete(undo)
        await original(self, undo)

    assign(Restorer, "_forget", forget)


@mutant("V14 a start does not know of a restore that never began", run=NEVER_BEGUN)
def _(assign: Assign) -> None:
    original = Restorer.start

    def start(self: Restorer) -> None:
        for entry in self._snapshots.entries:
            entry.pop("provisional", None)
        original(self)

    assign(Restorer, "start", start)


@mutant("X2 a restore that cannot begin costs a secondary its consistency", run=NOT_RESTORED)
def _(assign: Assign) -> None:
    original = Secondary.detach

    async def detach(self: Secondary, *, force: bool) -> None:
        await original(self, force=force)
        await self.diverge({})

    assign(Secondary, "detach", detach)


@mutant("V8 a restore costs a secondary what its delay holds back", run=NOT_RESTORED_DELAYED)
def _(assign: Assign) -> None:
    original = Secondary.detach

    async def detach(self: Secondary, *, force: bool) -> None:
        await original(self, force=True)

    assign(Secondary, "detach", detach)


@mutant("V14 a primary is let in while a secondary is being restored", ALONE)
def _(assign: Assign) -> None:
    original = Secondary.refusal

    def refusal(self: Secondary, hello: dict[str, Any]) -> tuple[str, str] | None:
        refused = original(self, hello)
        return None if refused is not None and refused[0] == "V14" else refused

    assign(Secondary, "refusal", refusal)


@mutant("V11 the restore map is not in the DCM")
def _(assign: Assign) -> None:
    original = Bypass.commit

    async def commit(self: Bypass, mark: Mark, maps: Mapping[int, Dcm]) -> int:
        return await original(self, mark, {})

    assign(Bypass, "commit", commit)


@mutant("V12 the copy begins though redo may come by")
def _(assign: Assign) -> None:
    assign(Restorer, "settled", nothing)


@mutant("V12 the copy does not keep what newer snapshots need")
def _(assign: Assign) -> None:
    assign(VolumeRestore, "_chain_holds", lambda self, offset, length: False)


@mutant("V12 a region is changed before it is copied")
def _(assign: Assign) -> None:
    assign(VolumeRestore, "holds", lambda self, offset, length: self._chain_holds(offset, length))


@mutant("V12 a region is changed before its copy is remembered", run=RESTORED_AND_WRITTEN)
def _(assign: Assign) -> None:
    assign(VolumeRestore, "_waiting", VolumeRestore._left)


@mutant("V12 a restore is not remembered", run=RESTORED)
def _(assign: Assign) -> None:
    async def opened(self: Restorer) -> None:
        self._store.state["restore"] = None

    assign(Restorer, "open", opened)


@mutant("V10 what was written into a snapshot is not in the restore map", INSCRIBED)
def _(assign: Assign) -> None:
    assign(restorer, "restore_map", lambda chain, uuid: chain.changed(uuid))


@mutant("V10 what was written into a snapshot is restored before it is durable", INSCRIBED)
def _(assign: Assign) -> None:
    original = Restorer._prepare_maps

    async def prepare_maps(self: Restorer, *args: Any) -> Any:
        setattr(self._snapshots, "sync_own", nothing)  # noqa: B010
        try:
            return await original(self, *args)
        finally:
            delattr(self._snapshots, "sync_own")

    assign(Restorer, "_prepare_maps", prepare_maps)


@mutant("V13 regions that are handed over are not marked", BESIDE)
def _(assign: Assign) -> None:
    original = Bypass.commit

    async def commit(self: Bypass, mark: Mark, maps: Mapping[int, Dcm]) -> int:
        return await original(self, mark, {} if mark.do == marks.CHANGED else maps)

    assign(Bypass, "commit", commit)


@mutant("V13 what somebody else wrote is not synced", BESIDE)
def _(assign: Assign) -> None:
    original = Housekeeper.sync_facets

    async def sync_facets(self: Housekeeper, *, everything: bool = False) -> None:
        await original(self)

    assign(Housekeeper, "sync_facets", sync_facets)


@mutant("V13 other facets do not get what was written into one", BESIDE)
def _(assign: Assign) -> None:
    assign(Restorer, "_even", nothing)


@mutant("V13 a facet that leaves meanwhile is not told of the change", LEAVING)
def _(assign: Assign) -> None:
    assign(restorer, "changing_beside", lambda facets, volume, ranges: nullcontext())


@mutant("V13 snapshots are said to be whole that lack what was overwritten", BESIDE)
def _(assign: Assign) -> None:
    assign(Restorer, "_drop_spoilt", nothing)


@mutant("V13 it is taken in before redo is past the log of before", BESIDE)
def _(assign: Assign) -> None:
    assign(Restorer, "_settle", nothing)


@mutant(
    "M8 a facet that is back before a restore's batch is through lacks it", run=RESTORED_AND_BACK
)
def _(assign: Assign) -> None:
    @asynccontextmanager
    async def changing(
        self: Restorer, volume: Volume, ranges: list[tuple[int, int]]
    ) -> AsyncIterator[None]:
        await note_beside(self._facets(), volume.index, ranges)
        yield
        await note_beside(self._facets(), volume.index, ranges)

    assign(Restorer, "changing", changing)


@mutant("V11 a remote is removed from under a restore", run=RESTORED_AND_REMOVED)
def _(assign: Assign) -> None:
    original = Primary.remove

    async def remove(self: Primary, name: str) -> None:
        self.roster = asyncio.Lock()
        await original(self, name)

    assign(Primary, "remove", remove)
