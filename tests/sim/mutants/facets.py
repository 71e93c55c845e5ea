"""Mutants of local facets, synchronous remotes and the loss of the log's disk."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nbdmirror.config import Config
from nbdmirror.engine import doubt, node, recovery, remoteread, spill
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.facetcommands import FacetCommands
from nbdmirror.engine.facetcopy import FacetCopy
from nbdmirror.engine.facetmember import Member
from nbdmirror.engine.facets import Facets
from nbdmirror.engine.gate import SyncGate
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import Log
from nbdmirror.engine.remote import Remote, may_follow
from nbdmirror.engine.rescue import Rescue
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from tests.sim.faults import Timing
from tests.sim.mutants.aims import LOST, lost_spilled
from tests.sim.mutants.plays import FAILED_AT_START, HURRIED, LAST_OF_TWO, STOOD_IN_AHEAD
from tests.sim.mutation import Assign, aimed, mutant, nothing


@mutant("M8 what a facet misses past the log is not marked")
def _(assign: Assign) -> None:
    assign(Member, "mark", lambda self, volume, offset, length: None)


@mutant(
    "M12 a facet gets another file before its failure was noted",
    aimed(
        faults={"facet error": 3.0, "facet online": 1.0},
        fault_gap=0.05,
        facets=2,
        timing=Timing(sync=(0.01, 0.2)),
        clients=4,
        operations=300,
        flush=0.2,
        pause=0.02,
        last_facet=False,
    ),
)
def _(assign: Assign) -> None:
    async def settle(self: FacetCommands, member: Member) -> bool:
        await self._facets.end(member)
        return not member.facet.writable

    assign(FacetCommands, "_settle", settle)


@mutant("M12 a facet that fails as the node starts ends it", run=FAILED_AT_START)
def _(assign: Assign) -> None:
    original = spill.may_spill

    async def may_spill(config: Config, housekeeper: Housekeeper, *args: Any) -> bool:
        lost, housekeeper.facet_lost = housekeeper.facet_lost, ends
        try:
            return await original(config, housekeeper, *args)
        finally:
            housekeeper.facet_lost = lost

    async def ends(volume: Volume, facet: LocalFacet) -> None:
        assert facet.failed is not None
        raise facet.failed

    assign(node, "may_spill", may_spill)


@mutant("M8 a facet gets another file while it comes back from the log", run=HURRIED)
def _(assign: Assign) -> None:
    assign(Facets, "end", nothing)


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


@mutant("M11 a remote is not trusted with what it alone holds while others are compared", LOST)
def _(assign: Assign) -> None:
    original = Remote.doubt

    def doubt(self: Remote, why: str) -> None:
        original(self, why)
        self.facts["holds"] = []

    assign(Remote, "doubt", doubt)


@mutant("M11 redo brings back what a remote that stood in had newer", run=STOOD_IN_AHEAD)
def _(assign: Assign) -> None:
    assign(Store, "redo_seq", lambda self, volume: int(self.state.get("redo_seq", 0)))


@mutant("M11 all remotes are compared with a facet that there is not", LOST)
def _(assign: Assign) -> None:
    original = doubt.mark_doubtful

    async def mark_doubtful(store: Store, remotes: list[Remote], *args: Any) -> None:
        for remote in remotes:
            remote.facts.update(consistent=False, holds=[])
        await original(store, remotes, *args)

    assign(node, "mark_doubtful", mark_doubtful)


@mutant("M11 a remote stands in for what a log in memory held", lost_spilled)
def _(assign: Assign) -> None:
    def followed(store: Store, index: int) -> bool:
        name = store.state["volumes"][index]["name"]
        return any(may_follow(facts, name) for facts in store.state["remotes"].values())

    assign(recovery, "_followed", followed)


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


@mutant(
    "M13 a flush does not wait for the remote that stands in",
    aimed(
        faults={"log error": 1.0, "facet lost": 2.0, "power a": 1.0, "slow link": 1.0},
        fault_gap=0.2,
        facets=1,
        remotes=1,
        mode="async",
        clients=4,
        operations=200,
        flush=0.3,
        pause=0.05,
        spill=0,
        last_facet=True,
        snapshot_gap=0.0,
    ),
)
def _(assign: Assign) -> None:
    assign(Rescue, "durable", nothing)
