"""Mutants of what a failed sync leaves in the page cache (O16)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbdmirror.engine import doubt, node, opening, recovery
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.facets import Facets
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.recovery import Recovered
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.ports import Disk
from tests.sim.file import SimFile
from tests.sim.mutation import Assign, mutant, nothing
from tests.sim.plays.facets import CLEARED_AND_FAILED, COMPARED_AND_KILLED, FAILED_AND_COMPARED
from tests.sim.plays.pagecache import (
    COPIED_AND_FAILED,
    COPIED_AND_KILLED,
    INSCRIBED_AND_KILLED,
    JOINED_AND_HANGING,
    JOINED_AND_KILLED,
    JOINED_AND_LOG_LOST,
    KEPT_AND_KILLED,
    KEPT_AND_STOPPED,
    OUT_AND_HANGING,
    RESTORED_AND_STOPPED,
    SYNCED_AND_HANGING,
    WRITTEN_AND_BACK,
    WRITTEN_AND_REDONE,
    WRITTEN_ANEW,
    WRITTEN_WITHOUT_LOG,
)
from tests.sim.plays.secondary import COPIES_REVERT, HOLES_REVERT


def _not_at_start(assign: Assign) -> None:
    assign(recovery, "_forget", nothing)


def _not_at_all(assign: Assign) -> None:
    assign(LocalFacet, "forget", nothing)


def _not_on_return(assign: Assign) -> None:
    assign(Facets, "attach", Facets.open)


for rule, run in (
    ("O16 a redo builds on what a failed sync left in the page cache", WRITTEN_AND_REDONE),
    ("O16 what a secondary's page cache has of a failed sync counts", COPIES_REVERT),
    ("O16 what reads as a hole in a secondary's page cache is one on the disk", HOLES_REVERT),
):
    mutant(rule, run=run)(_not_at_start)

for rule, run in (
    ("O16 a facet that returns builds on what a failed sync left", WRITTEN_AND_BACK),
    ("O16 a hole in a failed facet's page cache counts as one", CLEARED_AND_FAILED),
):
    mutant(rule, run=run)(_not_on_return)


for rule, run in (
    ("O16 what is in the page cache counts as equal after a death", COMPARED_AND_KILLED),
    ("O16 what a failed facet has in the page cache counts as equal", FAILED_AND_COMPARED),
):
    mutant(rule, run=run)(_not_at_all)


def _not_of(assign: Assign, directory: str) -> None:
    original = SimFile.forget

    async def forget(self: SimFile) -> None:
        if not self.path.startswith(directory):
            await original(self)

    assign(SimFile, "forget", forget)


for rule, run in (
    ("O16 what a snapshot's layer has in the page cache counts after a death", KEPT_AND_KILLED),
    ("O16 what a snapshot's layer has in the page cache counts after a stop", KEPT_AND_STOPPED),
    ("O16 what was written into a snapshot counts as on the disk", INSCRIBED_AND_KILLED),
):

    @mutant(rule, run=run)
    def _(assign: Assign) -> None:
        _not_of(assign, "/state/snapshots/")


@mutant("V12 what could not be written of a restore's map counts", run=COPIED_AND_FAILED)
def _(assign: Assign) -> None:
    assign(DcmFile, "forget", nothing)


@mutant("V12 what is found of a restore's map is not made durable", run=COPIED_AND_KILLED)
def _(assign: Assign) -> None:
    original = DcmFile.open

    def opened(self: DcmFile, default: bool, **how: bool) -> None:
        original(self, default, **how)
        self._unsynced = self._unsynced and not self.path.startswith("/state/restore")

    assign(DcmFile, "forget", nothing)
    assign(DcmFile, "open", opened)


@mutant("O16 what is written anew is written into the page cache only", run=WRITTEN_ANEW)
def _(assign: Assign) -> None:
    assign(LocalFacet, "forget_range", nothing)


@mutant(
    "O16 what is in the page cache is believed where the log was in memory", run=WRITTEN_WITHOUT_LOG
)
def _(assign: Assign) -> None:
    original = doubt.mark_doubtful

    async def mark_doubtful(
        store: Store, remotes: Any, facets: Any, recovered: Recovered, active: Any
    ) -> None:
        recovered = replace(recovered, volatile=False)
        await original(store, remotes, facets, recovered, active)

    assign(node, "mark_doubtful", mark_doubtful)


def _joined_at_start(assign: Assign, *, forgotten: bool) -> None:
    """One that was being synchronised takes the writes of the start, and all that follow."""
    original = recovery._forget

    async def forget(volumes: list[Volume], healing: list[LocalFacet], *, in_service: bool) -> None:
        for facet in (one for volume in volumes for one in volume.facets if one in joined):
            facet.state, facet.writable = FacetState.BEING_SYNCHRONISED, True
            if forgotten:
                await facet.forget()
        await original(volumes, healing, in_service=in_service)

    joined = set[LocalFacet]()
    opened = opening.open_volumes

    def open_volumes(disk: Disk, store: Store) -> list[Volume]:
        state = FacetState.BEING_SYNCHRONISED.value
        paths = {
            entry["path"]
            for volume in store.state["volumes"]
            for entry in volume["facets"]
            if entry["state"] == state
        }
        volumes = opened(disk, store)
        joined.update(f for v in volumes for f in v.facets if f.path in paths and f.is_open)
        return volumes

    assign(recovery, "_forget", forget)
    assign(node, "open_volumes", open_volumes)


@mutant("O16 a facet that is being synchronised is gone on with as it is", run=JOINED_AND_KILLED)
def _(assign: Assign) -> None:
    _joined_at_start(assign, forgotten=False)


@mutant("I8 a start waits for a facet that is being synchronised", run=JOINED_AND_HANGING)
def _(assign: Assign) -> None:
    _joined_at_start(assign, forgotten=True)


@mutant("I5 a facet that was being synchronised lacks what was not redone", run=JOINED_AND_LOG_LOST)
def _(assign: Assign) -> None:
    assign(Facets, "_mark_log", nothing)


@mutant("O16 a stop does not hear of what a copy's sync has lost", run=RESTORED_AND_STOPPED)
def _(assign: Assign) -> None:
    assign(LocalFacet, "changed_beside", lambda self: None)


@mutant("I8 a stop waits for a facet that has all, durably", run=SYNCED_AND_HANGING)
def _(assign: Assign) -> None:
    assign(LocalFacet, "unsynced", True)


@mutant("I8 a start waits for a facet that is out of service", run=OUT_AND_HANGING)
def _(assign: Assign) -> None:
    async def forget(volumes: list[Volume], healing: list[LocalFacet], *, in_service: bool) -> None:
        for facet in (one for volume in volumes for one in volume.facets if one.is_open):
            await facet.forget()

    assign(recovery, "_forget", forget)
