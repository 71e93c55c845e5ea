"""Mutants of what notices a write that was lost or misplaced (fault 16, X6)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbdmirror.codec import mappage, slots
from nbdmirror.core.timeline import Timeline
from nbdmirror.engine import doubt, recovery
from nbdmirror.engine.log import Log
from nbdmirror.engine.logscan import Forks
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.store import Store
from nbdmirror.engine.verify import Verify
from nbdmirror.ports import Buffer
from tests.sim.mutation import Assign, aimed, mutant, nothing
from tests.sim.options import Options
from tests.sim.plays.log import ONLY_IN_THE_CACHE, ROTTEN_AND_STOPPED
from tests.sim.plays.remotes import FILLED_TWICE

FACETS = aimed(rot=0.0, astray=1.0, snapshot_gap=0.0, facets=2, faults={}, last_facet=False)
FILES = aimed(
    rot=0.0,
    astray=1.0,
    snapshot_gap=0.0,
    mode="async",
    spill=0,
    hot_extents=mappage.SLOTS,
    operations=8,
    faults={},
    last_facet=False,
)


def maps(options: Options) -> Options:
    """The same where an active map has two sectors, of which one is lost or misplaced."""
    return replace(FILES(options), hot_extents=2 * mappage.SLOTS)


@mutant("X6 a verify passes over what a disk lost or misplaced", FACETS)
def _(assign: Assign) -> None:
    original = Verify._judge

    def judge(self: Verify, look: Any, region: int, index: int, differs: bool) -> bool:
        return original(self, look, region, index, False)

    assign(Verify, "_judge", judge)


@mutant("X6 a map's sector is taken for good in another's place", maps)
def _(assign: Assign) -> None:
    original = mappage._open

    def opened(magic: bytes, number: int, data: Buffer) -> bytes | None:
        _, _, place, _ = mappage._HEAD.unpack_from(data)
        return original(magic, place, data)

    assign(mappage, "_open", opened)


@mutant("X6 a save of the superblock in the other slot goes unnoticed", FILES)
def _(assign: Assign) -> None:
    assign(slots, "home", lambda counter: 0)
    original = slots.damage

    def damage(images: list[bytes]) -> str | None:
        found = original(images)
        return None if found is not None and "of the other slot" in found else found

    assign(slots, "damage", damage)


@mutant("X6 records of an epoch that the superblock does not know tell nothing", FILES)
def _(assign: Assign) -> None:
    def scan(store: Store, log: Log, forks: Forks) -> tuple[Timeline, int]:
        timeline, records = Timeline(), 0
        for record in log.scan(forks, int(store.state["epoch"]) + (store.damaged is not None)):
            records += 1
            timeline.add(record.seq, record.time_ns)
        return timeline, records

    assign(recovery, "_scan", scan)


@mutant("X6 a superblock that may be out of date is believed to be of a clean stop", FILES)
def _(assign: Assign) -> None:
    original = Store.doubt

    def doubt(self: Store, why: str) -> None:
        clean = self.state["clean"]
        original(self, why)
        self.state["clean"] = clean

    assign(Store, "doubt", doubt)


@mutant("X6 what a damaged log lost is relied on in the page cache", run=ONLY_IN_THE_CACHE)
def _(assign: Assign) -> None:
    assign(doubt, "write_anew", nothing)


@mutant("O12 a map that is being filled counts before that is durable", run=ROTTEN_AND_STOPPED)
def _(assign: Assign) -> None:
    async def fill(self: Remote, why: str, *, save: bool = True) -> None:
        for dcm in self.dcms:
            dcm.fill()
        if not self.tracking:
            self.facts.update(tracking=True, base_seq=0)
            self._track()
        await self.sync_maps()
        self.facts.update(full=True, compare=True, consistent=False, holds=[], why=why)
        self.save_defaults()
        await self._store.save()

    assign(Remote, "fill", fill)


@mutant(
    "O12 who is cancelled while a map is filled takes the marks of others along", run=FILLED_TWICE
)
def _(assign: Assign) -> None:
    original = Remote.fill

    async def fill(self: Remote, why: str, *, save: bool = True) -> None:
        try:
            await original(self, why, save=save)
        except BaseException:
            assign(Remote, "_track", lambda self: None)
            raise

    assign(Remote, "fill", fill)


@mutant("X6 records behind a gap in the log tell nothing", FILES)
def _(assign: Assign) -> None:
    assign(Log, "seq_behind", lambda self, forks: 0)
