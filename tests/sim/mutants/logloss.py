"""Mutants of the loss of the log's disk, of its move, and of what is flushed while it is in memory
(M13)."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

from nbdmirror.engine import facets, recovery
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import Log
from nbdmirror.engine.logloss import LogKeeper
from nbdmirror.engine.logscan import Unfinished
from nbdmirror.engine.primary import Primary
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.rescue import Rescue
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from tests.sim.faults import Timing
from tests.sim.mutation import Assign, aimed, mutant, nothing
from tests.sim.plays.log import (
    KILLED_APPENDING,
    LAST_ONE_ROTS,
    MOVED_AND_LOST,
    MOVED_AND_LOST_IN_STEP,
    STOPPED_AND_FORCED_OUT,
)
from tests.sim.plays.remotes import ADDED_WHILE_MOVED
from tests.sim.plays.standins import (
    BACK_AND_FLUSHED,
    BACK_WHILE_FLUSHED,
    FLUSHED_BY_ONE_OF_TWO,
    FLUSHED_OUT_OF_REACH,
    FLUSHED_WHILE_FORCED_OUT,
    FLUSHED_WHILE_REDONE,
    LAST_OF_TWO,
    PASSED_AND_FLUSHED,
)


@mutant("I4 what a kill left of an append is taken for damage", run=KILLED_APPENDING)
def _(assign: Assign) -> None:
    assign(Log, "unfinished", lambda self, forks: None)


@mutant("X6 nobody asks the facets for the log's last record", run=LAST_ONE_ROTS)
def _(assign: Assign) -> None:
    assign(Unfinished, "was", lambda self, payload: False)


@mutant("I8 links that end for a move of the log count as lost", run=MOVED_AND_LOST_IN_STEP)
def _(assign: Assign) -> None:
    original = Primary.stop

    async def stop(self: Primary, *, for_good: bool = False) -> None:
        for remote in self.remotes:
            remote.drop.clear()
        await original(self, for_good=for_good)

    assign(Primary, "stop", stop)


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


@mutant("M13 a facet is healed though what it lacks was in memory only", run=LAST_OF_TWO)
def _(assign: Assign) -> None:
    original = recovery._healing

    def healing(store: Store, volumes: list[Volume], log: Log) -> Any:
        for entry in recovery._entries(store):
            entry["last"] = entry.get("since") is not None
        return original(store, volumes, log)

    assign(recovery, "_healing", healing)


@mutant(
    "M13 a remote is what a volume comes back from before it has all that its facet had",
    run=LAST_OF_TWO,
)
def _(assign: Assign) -> None:
    async def pass_on(self: Housekeeper) -> None:
        for volume in self._store.state["volumes"]:
            for entry in volume["facets"]:
                entry["last"] = False
        await self._store.save()

    assign(Housekeeper, "_pass_on", pass_on)


@mutant(
    "M13 a last facet is trusted though a remote went on for it",
    aimed(
        faults={"sync error a": 1.0},
        fault_gap=0.1,
        facets=1,
        remotes=1,
        mode="sync",
        on_link_loss="continue",
        timing=Timing(write=(0.001, 0.05), miss=0.2),
        clients=2,
        operations=200,
        flush=0.2,
        pause=0.05,
        spill=0,
        last_facet=False,
        snapshot_gap=0.0,
    ),
)
def _(assign: Assign) -> None:
    original = recovery._healing

    def healing(store: Store, volumes: list[Volume], log: Log) -> Any:
        for entry in recovery._entries(store):
            entry["last"] = entry.get("last") or len(volumes[0].facets) == 1
        return original(store, volumes, log)

    assign(recovery, "_healing", healing)


@mutant("M13 a flush does not wait for the remote that stands in", run=FLUSHED_OUT_OF_REACH)
def _(assign: Assign) -> None:
    async def durable(self: Rescue, volume: Any, seq: int) -> bool:
        return True

    async def pass_on(self: Housekeeper) -> list[Volume]:
        await original(self)
        return []  # else it is tried again

    original = Housekeeper._pass_on
    assign(Rescue, "durable", durable)
    assign(Housekeeper, "_pass_on", pass_on)


@mutant("M13 a flush is at one remote, and another is gone by", run=FLUSHED_BY_ONE_OF_TWO)
def _(assign: Assign) -> None:
    def holds(self: Rescue, volume: Volume, seq: int) -> bool:
        return any(remote.durable_seq >= seq for remote in self.following(volume))

    assign(Rescue, "holds", holds)


def _about_to_be_saved(assign: Assign) -> None:
    async def sync_log(self: Housekeeper) -> int:
        store, self._store = self._store, copy.copy(self._store)
        setattr(self._store, "save", nothing)  # noqa: B010
        try:
            return await original(self)
        finally:
            self._store = store

    original = Housekeeper.sync_log
    assign(Housekeeper, "sync_log", sync_log)


mutant("M13 who leaves the log is gone by at the next start", run=FLUSHED_WHILE_FORCED_OUT)(
    _about_to_be_saved
)
mutant("M13 who has a volume is not durable yet for the second flush", run=PASSED_AND_FLUSHED)(
    _about_to_be_saved
)


@mutant("M13 a log that a person has moved goes on in memory", run=MOVED_AND_LOST)
def _(assign: Assign) -> None:
    assign(LogKeeper, "_is_lost", lambda self: True)


@mutant("M13 a stop leaves out what was being marked", run=STOPPED_AND_FORCED_OUT)
def _(assign: Assign) -> None:
    async def mark_pending(self: LogKeeper, why: str, upto: int) -> None:
        for remote in self._primary.remotes:
            if not remote.tracking and remote.durable_seq < upto:
                await remote.overflow(why)

    assign(LogKeeper, "mark_pending", mark_pending)


@mutant("M13 a facet is flushed to before it is durable that it is back", run=BACK_AND_FLUSHED)
def _(assign: Assign) -> None:
    original = facets.redo  # type: ignore[attr-defined]

    async def redo(facet: LocalFacet, log: Log, volume: int) -> None:
        await original(facet, log, volume)
        facet.state = FacetState.SYNCHRONISED

    assign(facets, "redo", redo)


@mutant("M13 a facet is trusted before what it got last is synced", run=FLUSHED_WHILE_REDONE)
def _(assign: Assign) -> None:
    original = facets.redo  # type: ignore[attr-defined]

    async def redo(facet: LocalFacet, log: Log, volume: int) -> None:
        await original(facet, log, volume)

        async def sync() -> None:
            del facet.sync

        facet.sync = sync  # type: ignore[method-assign]

    assign(facets, "redo", redo)


@mutant("I8 a flush waits for a remote though a facet is back", run=BACK_WHILE_FLUSHED)
def _(assign: Assign) -> None:
    original = Rescue.durable

    async def durable(self: Rescue, volume: Volume, seq: int) -> bool:
        in_service, volume.in_service = volume.in_service, list  # type: ignore[method-assign]
        try:
            return await original(self, volume, seq)
        finally:
            volume.in_service = in_service  # type: ignore[method-assign]

    assign(Rescue, "durable", durable)


@mutant("M17 a remote is added while the log is moved", run=ADDED_WHILE_MOVED)
def _(assign: Assign) -> None:
    original = LogKeeper.replace

    async def replace(self: LogKeeper, path: str) -> dict[str, Any]:
        self._primary.moving = asyncio.Lock()
        return await original(self, path)

    assign(LogKeeper, "replace", replace)
