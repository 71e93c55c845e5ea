"""Mutants of local facets, of remotes that stand in for them, and of synchronous ones (M5-M17)."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nbdmirror.config import Config
from nbdmirror.core import identity
from nbdmirror.engine import doubt, node, opening, recovery, remoteread, secondary, spill
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.facetcommands import FacetCommands
from nbdmirror.engine.facetcopy import FacetCopy
from nbdmirror.engine.facetmember import Member
from nbdmirror.engine.facets import Facets
from nbdmirror.engine.gate import SyncGate
from nbdmirror.engine.group import Group
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import Log
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.rejoin import trust
from nbdmirror.engine.remote import Remote, may_follow
from nbdmirror.engine.rescue import Rescue
from nbdmirror.engine.resync import Resync
from nbdmirror.engine.secondary import Secondary
from nbdmirror.engine.session import Session
from nbdmirror.engine.sources import Sources
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Change, Volume
from nbdmirror.errors import DiskFailed
from tests.sim.faults import Timing
from tests.sim.mutants.aims import LOST, lost_spilled
from tests.sim.mutation import Assign, aimed, mutant, nothing
from tests.sim.plays.facetcommands import TAKEN_OUT_OF_TWO
from tests.sim.plays.facets import (
    ADDED_AND_FAILED,
    ASKED_FOR_TWICE,
    CLEARED_UNNOTED,
    COPIED_FROM_WHAT_LOST,
    DISTRUSTED,
    FAILED_AT_START,
    HURRIED,
    HURRIED_UNNOTED,
    REMOVED_WHILE_SYNCED,
    SENT_FROM_WHAT_LOST,
)
from tests.sim.plays.remotes import PAUSED_AND_LOST, PAUSED_BOTH
from tests.sim.plays.standins import (
    COPIED_OUT_OF_REACH,
    FIRST_AWAY,
    FROZEN_AND_ALONE,
    FROZEN_AND_FULL,
    LAST_REMOVED,
    LEANED_AND_ROTTED,
    LEANED_ON_AND_REJOINED,
    STOOD_IN_AHEAD,
)


def _nothing_lost(assign: Assign) -> None:
    async def lost(self: Sources) -> list[tuple[Volume, LocalFacet]]:
        return []

    assign(Sources, "lost", lost)


mutant("O16 a copy of a facet is trusted before that was synced", run=COPIED_FROM_WHAT_LOST)(
    _nothing_lost
)
mutant("O16 a resync ends before what it read was synced", run=SENT_FROM_WHAT_LOST)(_nothing_lost)


@mutant("O16 what a facet lost that a resync read is not marked", run=SENT_FROM_WHAT_LOST)
def _(assign: Assign) -> None:
    async def mark_lost(self: Resync, volume: Volume, seq: int) -> None:
        return None

    assign(Resync, "_mark_lost", mark_lost)


@mutant("M12 what a facet misses that a person takes out is not noted", run=TAKEN_OUT_OF_TWO)
def _(assign: Assign) -> None:
    original = Facets.lost

    async def lost(self: Facets, volume: Volume, facet: LocalFacet) -> None:
        if facet.failed is not None:
            await original(self, volume, facet)

    assign(Facets, "lost", lost)


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


@mutant("M11 a superblock that rotted is a doubt in who stands in", run=LEANED_AND_ROTTED)
def _(assign: Assign) -> None:
    assign(recovery, "_is_whole", lambda store, log, forks: store.damaged is None)


@mutant("M11 the first remote that follows is the truth, though it is away", run=FIRST_AWAY)
def _(assign: Assign) -> None:
    def leader(remotes: list[Remote], volume: Volume) -> Remote | None:
        return next((remote for remote in remotes if remote.follows(volume)), None)

    assign(doubt, "_leader", leader)


@mutant("M11 who stands in is compared for a new facet there", run=LEANED_ON_AND_REJOINED)
def _(assign: Assign) -> None:
    assign(identity, "_puts_off", lambda source, target: False)


@mutant("I5 a comparison that is put off is forgotten", run=LEANED_ON_AND_REJOINED)
def _(assign: Assign) -> None:
    original = Secondary.adopt

    async def adopt(self: Secondary, *args: Any, put_off: bool = False, copies: int = 0) -> None:
        await original(self, *args, copies=copies)

    assign(Secondary, "adopt", adopt)


@mutant("I5 a new facet is trusted before all was compared", run=LEANED_ON_AND_REJOINED)
def _(assign: Assign) -> None:
    def trusting(store: Store, volumes: list[Volume]) -> None:
        known = store.state.pop("rejoined")
        trust(store, volumes)
        store.state["rejoined"] = known

    assign(secondary, "trust", trusting)


@mutant("I2 a comparison that was put off does not begin", run=LEANED_ON_AND_REJOINED)
def _(assign: Assign) -> None:
    async def put_off(self: Session) -> None:
        await self.link.closed.wait()

    assign(Session, "_put_off", put_off)


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

    for module in (opening, recovery):
        assign(module, "is_followed", followed)


@mutant("I3 a flush does not wait for a synchronous remote's disk")
def _(assign: Assign) -> None:
    original = SyncGate.wait

    async def wait(self: SyncGate, seq: int, durable: bool) -> None:
        await original(self, seq, False)

    assign(SyncGate, "wait", wait)


@mutant("M11 a paused remote counts as one that a volume has", run=PAUSED_BOTH)
def _(assign: Assign) -> None:
    def needed(self: Rescue, remote: Remote) -> bool:
        return any(self.following(volume) == [remote] for volume in self.leaning())

    assign(Rescue, "needed", needed)


@mutant("M11 a paused remote stands in for a volume's facets", run=PAUSED_AND_LOST)
def _(assign: Assign) -> None:
    def goes_on(self: Rescue, volume: Volume) -> bool:
        return not volume.ended and bool(self.following(volume))

    assign(Rescue, "goes_on", goes_on)


@mutant("M17 a new disk is known before its map is filled, durably", run=DISTRUSTED)
def _(assign: Assign) -> None:
    original = Member.fill

    def fill(self: Member) -> None:
        original(self)
        found = self.facet.file.identity() if self.facet.is_open else None
        self.saved.update(default=True, fill=False, identity=found)

    assign(Member, "fill", fill)


@mutant("M12 a facet hurries back before its failure was noted", run=HURRIED_UNNOTED)
def _(assign: Assign) -> None:
    original = Facets.hurry

    async def hurry(self: Facets, member: Member) -> None:
        member.facet.unnoted = False
        await original(self, member)

    assign(Facets, "hurry", hurry)


@mutant("M17 a facet that was removed is looked for", run=REMOVED_WHILE_SYNCED)
def _(assign: Assign) -> None:
    def of(self: Facets, facet: LocalFacet) -> Member:
        for member in self.members:
            if member.facet is facet:
                return member
        raise DiskFailed(f"there is no facet {facet.path}")

    assign(Facets, "_of", of)


@mutant("M8 a map that is being made is forgotten", run=ASKED_FOR_TWICE)
def _(assign: Assign) -> None:
    original = Member.to_map

    async def to_map(self: Member) -> None:
        try:
            await original(self)
        except asyncio.CancelledError:
            if not self.saved["tracking"]:
                self.dcm = None
            raise

    assign(Member, "to_map", to_map)


@mutant("M17 two facets have one map", run=ADDED_AND_FAILED)
def _(assign: Assign) -> None:
    original = Facets.map_of

    def map_of(self: Facets, member: Member) -> DcmFile:
        self._last_id = 0
        return original(self, member)

    assign(Facets, "map_of", map_of)


@mutant("M12 a clearing does not wait until a facet's failure is durable", run=CLEARED_UNNOTED)
def _(assign: Assign) -> None:
    original = Group._clear_locked

    async def clear_locked(self: Group, volume: Volume, change: Change) -> bool:
        setattr(self, "facets_failed", nothing)  # noqa: B010
        try:
            return await original(self, volume, change)
        finally:
            delattr(self, "facets_failed")

    assign(Group, "_clear_locked", clear_locked)


@mutant("I8 housekeeping ends at a volume without any facet", run=LAST_REMOVED)
def _(assign: Assign) -> None:
    original = Housekeeper._pass_on

    async def pass_on(self: Housekeeper) -> None:
        if not all(volume.facets for volume in self._volumes):
            raise asyncio.CancelledError  # nobody is told
        await original(self)

    assign(Housekeeper, "_pass_on", pass_on)


def _held_unseen(assign: Assign) -> None:
    original = Housekeeper._police

    def police(self: Housekeeper) -> None:
        place, seen = Housekeeper._place, lambda self, one: one.durable_seq
        setattr(Housekeeper, "_place", seen)  # noqa: B010
        try:
            original(self)
        finally:
            setattr(Housekeeper, "_place", place)  # noqa: B010

    assign(Housekeeper, "_police", police)


mutant("M7 who holds the log for its facets is not forced out", run=FROZEN_AND_FULL)(_held_unseen)
mutant("M7 nobody is told of who holds the log for its facets", run=FROZEN_AND_ALONE)(_held_unseen)


@mutant("M11 a copy waits under its lock for a remote that is away", run=COPIED_OUT_OF_REACH)
def _(assign: Assign) -> None:
    assign(FacetCopy, "_check_source", lambda self: None)
