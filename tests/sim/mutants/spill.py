"""Mutants of a log that is partly in memory (M4, ``engine.spill``); see ``mutants``."""

from __future__ import annotations

from typing import Any

from nbdmirror.core.active import ActiveMap
from nbdmirror.engine import doubt, housekeeper, node, recovery
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.facetmember import Member
from nbdmirror.engine.facets import Facets
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import Log
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.spill import Spill
from nbdmirror.engine.spillfile import SpillFile
from nbdmirror.engine.store import Store
from tests.sim.faults import Timing
from tests.sim.mutants.aims import lost_spilled
from tests.sim.mutation import Assign, aimed, mutant, nothing
from tests.sim.options import KIB
from tests.sim.plays.spill import (
    CLEARED_AND_KILLED,
    CLEARED_BEFORE,
    CLEARED_MEANWHILE,
    FAR_BEHIND,
    FLUSHED_MEANWHILE,
    IN_MEMORY_AGAIN,
    KILLED_BETWEEN,
    LEFT,
    LEFT_MEANWHILE,
    NOT_MOVED,
    ON_DISK,
    PAST_TWICE,
    RELEASED_WHILE_MADE_SAFE,
    STARTED_WITHOUT_LOG,
    UNSPILLED_TOO_SOON,
)

CROWDED = aimed(
    spill=8 * KIB,
    log_size=68 * KIB,
    remote_log_size=260 * KIB,
    clients=4,
    operations=200,
    pause=0.002,
    timing=Timing(sync=(0.001, 0.03)),
    faults={},
    snapshot_gap=0.05,
    snapshots_max=64,
    snapshot_space=None,
    last_facet=False,
)
"""A log that turns over all the time, and markers that must be in its file."""
LOSES = aimed(
    spill=8 * KIB,
    facets=2,
    timing=Timing(sync=(0.0001, 0.004)),
    faults={"sync loss and kill a": 2.0, "power a": 1.0},
    fault_gap=0.1,
    last_facet=False,
    operations=100,
    pause=0.02,
)
"""A sync that loses pages, and the death of the process before that is noted."""


@mutant("M4 an extent is let go though the file lacks its records")
def _(assign: Assign) -> None:
    async def keep(self: Log) -> None:
        self._kept_seq = self.next_seq - 1

    assign(Log, "keep", keep)


@mutant(
    "X1 what is released counts as kept before its tail is durable", run=RELEASED_WHILE_MADE_SAFE
)
def _(assign: Assign) -> None:
    def kept_seq(self: Log) -> int:
        return max(
            self.durable_seq if self.spilled is None else self._kept_seq, self.ring.tail_seq - 1
        )

    assign(Log, "kept_seq", property(kept_seq))


@mutant("M4 a flush, and letting go of an extent, sync no facet")
def _(assign: Assign) -> None:
    async def durable(self: Spill) -> int:
        return self._log.next_seq - 1

    assign(Spill, "_durable", durable)


@mutant("M4 what the file holds is redone into facets that are ahead", run=PAST_TWICE)
def _(assign: Assign) -> None:
    original = recovery.redo

    async def redo(store: Store, *args: Any) -> Any:
        store.state["log_spill"] = False
        return await original(store, *args)

    assign(node, "redo", redo)


@mutant("M4 a later start redoes what an earlier one did not", run=PAST_TWICE)
def _(assign: Assign) -> None:
    original = recovery._apply

    async def apply(store: Store, *args: Any, **named: Any) -> None:
        store.state["redo_seq"] = 0
        await original(store, *args, **named)

    assign(recovery, "_apply", apply)


@mutant("M4 what the file holds is sent to remotes though the facets are ahead", run=PAST_TWICE)
def _(assign: Assign) -> None:
    assign(Remote, "leave_log", lambda self: None)


@mutant("M4 memory is dropped before the tail is durable", CROWDED)
def _(assign: Assign) -> None:
    original = Log.release

    def release(self: Log, seq: int, position: int) -> None:
        original(self, seq, position)
        if self.spilled is not None:
            self.spilled.drop(position)

    assign(Log, "release", release)


@mutant("M4 memory that is needed is dropped instead of written out")
def _(assign: Assign) -> None:
    def write_to(self: SpillFile, upto: int) -> None:
        self.start = max(self.start, upto)

    assign(SpillFile, "_write_to", write_to)


@mutant("M4 what is written out is read from where it was in memory", run=FAR_BEHIND)
def _(assign: Assign) -> None:
    def split(self: SpillFile, offset: int, length: int) -> tuple[int, bytes]:
        ring = self._ring
        at = ring.head - (ring.head - (offset - self._base)) % ring.capacity
        return 0, bytes(self._memory[(at + i) % self.threshold] for i in range(length))

    assign(SpillFile, "_split", split)


@mutant("M4 after a process death nothing is compared")
def _(assign: Assign) -> None:
    original = recovery.doubtful_ranges

    def ranges(active: Any, volumes: Any) -> Any:
        found = original(active, volumes)
        return [] if active.damaged is None else found

    assign(doubt, "doubtful_ranges", ranges)


@mutant("M4 after a process death local facets are not made equal", run=KILLED_BETWEEN)
def _(assign: Assign) -> None:
    assign(doubt, "level", nothing)


@mutant("O16 after a process death what is in the page cache is taken to be on disk", LOSES)
def _(assign: Assign) -> None:
    assign(doubt, "write_anew", nothing)


@mutant("O16 after a process death what is a hole in the page cache is one", run=CLEARED_AND_KILLED)
def _(assign: Assign) -> None:
    original = recovery._write_anew

    async def write_anew(facet: LocalFacet, offset: int, length: int) -> None:
        facet.__dict__["punch"] = nothing
        await original(facet, offset, length)
        del facet.__dict__["punch"]

    assign(recovery, "_write_anew", write_anew)


@mutant("M4 a facet that leaves does not get the extents that it had not synced", run=LEFT)
def _(assign: Assign) -> None:
    assign(Member, "_mark_active", lambda self, since: None)


@mutant("O6 an extent is let go before a facet that left has it in its map", run=LEFT)
def _(assign: Assign) -> None:
    assign(Facets, "settle_owed", nothing)


@mutant("M11 a volume without a local facet leaves its entries in memory", lost_spilled)
def _(assign: Assign) -> None:
    assign(Spill, "_leans", lambda self: False)


@mutant("M11 the log is said to be on disk before the other facets are synced", run=ON_DISK)
def _(assign: Assign) -> None:
    async def facet_lost(self: Spill) -> None:
        if self._log.spilled is not None and self._leans():
            if not self._both:
                self._both = self._log.redone = True
                self._log.write_through()
            await self._log.keep()

    assign(Spill, "facet_lost", facet_lost)


@mutant("M4 the log is in memory again before the superblock says so", run=IN_MEMORY_AGAIN)
def _(assign: Assign) -> None:
    original = Spill._to_memory

    async def to_memory(self: Spill) -> None:
        save, self._store.save = self._store.save, nothing  # type: ignore[assignment]
        try:
            await original(self)
        finally:
            self._store.save = save
        self._store.state["log_spill"] = False

    assign(Spill, "_to_memory", to_memory)


@mutant("M4 a log whose move was refused does not change over any more", run=NOT_MOVED)
def _(assign: Assign) -> None:
    assign(Spill, "stay", lambda self: None)


@mutant("M13 a log without a disk spills after a start", run=STARTED_WITHOUT_LOG)
def _(assign: Assign) -> None:
    original = Spill.look

    def look(self: Spill, *, on_disk: bool = False) -> None:
        self._ended = False
        original(self, on_disk=on_disk)

    assign(Spill, "look", look)


@mutant("O5 a log is in memory again while a clearing is under way", run=CLEARED_MEANWHILE)
@mutant("O5 a log goes on disk while a clearing is under way", run=CLEARED_BEFORE)
def _(assign: Assign) -> None:
    async def land(self: Spill) -> None:
        await self._housekeeper.sync_facets(everything=True)

    assign(Spill, "_land", land)


@mutant("O6 an extent of a spilling log is let go by a boolean")
def _(assign: Assign) -> None:
    original = ActiveMap.admit

    def admit(self: ActiveMap, keys: list[int], safe_seq: int, keep: Any = ()) -> Any:
        return original(self, keys, max(self.hot.values(), default=0), keep)

    assign(ActiveMap, "admit", admit)


@mutant("M4 a log is on disk before that is durable", run=UNSPILLED_TOO_SOON)
def _(assign: Assign) -> None:
    original = Spill.look

    def look(self: Spill, *, on_disk: bool = False) -> None:
        original(self, on_disk=True)

    assign(Spill, "look", look)


@mutant("O5 a release does not see who has left while it read the log", run=LEFT_MEANWHILE)
def _(assign: Assign) -> None:
    found, floor, before = housekeeper.releasable, Housekeeper._floor, list[int]()

    async def releasable(log: Log, seq: int) -> tuple[int, int]:
        seq, position = await found(log, seq)
        before.append(seq - 1)
        return seq, position

    assign(housekeeper, "releasable", releasable)
    assign(Housekeeper, "_floor", lambda self: before.pop() if before else floor(self))


@mutant("M13 a flush syncs facets for as long as a clearing takes", run=FLUSHED_MEANWHILE)
def _(assign: Assign) -> None:
    assign(Housekeeper, "_first_landed", nothing)
