"""Mutants of verify and of its repair (X6)."""

from __future__ import annotations

import dataclasses
from typing import Any

from nbdmirror.codec.regions import Hashes
from nbdmirror.engine import verify
from nbdmirror.engine.comparer import Comparer
from nbdmirror.engine.verify import Look, Verify
from nbdmirror.engine.volume import Volume
from tests.sim.faults import Timing
from tests.sim.mutation import Assign, aimed, mutant

ROTTEN = aimed(rot=1.0, snapshot_gap=0.0, facets=2, operations=32, faults={}, last_facet=False)
LOOKED_AT = aimed(
    faults={"verify": 1.0},
    fault_gap=0.3,
    facets=1,
    timing=Timing(sync=(0.01, 0.2), read=(0.001, 0.05)),
    clients=4,
    operations=300,
    hot_cells=16,
    pause=0.05,
    mode="async",
    snapshot_gap=0.0,
    last_facet=False,
)
"""Verifies one after the other, beside clients that write the same regions all the time."""


@mutant("X6 a verify does not wait for the records that it knows of", LOOKED_AT)
def _(assign: Assign) -> None:
    original = Comparer._verify

    async def verifying(self: Comparer, hashes: Hashes) -> None:
        await original(self, dataclasses.replace(hashes, seq=0))

    assign(Comparer, "_verify", verifying)


@mutant("X6 what a client writes between the two hashes is a difference", LOOKED_AT)
def _(assign: Assign) -> None:
    """Each alone is covered by the other: untouched, and seen twice."""
    assign(Verify, "mark", lambda self, volume, offset, length: None)
    assign(verify, "SEEN_MIN", 1)


@mutant("X6 what differs is passed over", ROTTEN)
def _(assign: Assign) -> None:
    original = Verify._judge

    def judge(self: Verify, look: Look, region: int, index: int, differs: bool) -> bool:
        return original(self, look, region, index, False)

    assign(Verify, "_judge", judge)


@mutant("X6 only one of several facets is looked at", ROTTEN)
def _(assign: Assign) -> None:
    original = Verify._hashed

    async def hashed(
        self: Verify, volume: Volume, first: int, count: int, turn: int
    ) -> Look | None:
        looked_at = list(volume.serving(turn))[:1]
        setattr(volume, "serving", lambda turn=0: looked_at)  # noqa: B010
        try:
            return await original(self, volume, first, count, turn)
        finally:
            del volume.serving

    assign(Verify, "_hashed", hashed)


@mutant("X6 what was found in a remote is not sent", ROTTEN)
def _(assign: Assign) -> None:
    original = Verify._mark_found

    async def unmarked(self: Verify) -> int:
        setattr(self.remote, "mark", lambda *_: None)  # noqa: B010
        try:
            return await original(self)
        finally:
            del self.remote.__dict__["mark"]

    assign(Verify, "_mark_found", unmarked)


@mutant("X6 what was found in a facet is not mended", ROTTEN)
def _(assign: Assign) -> None:
    async def mend(*_: Any) -> bool:
        return True

    assign(Verify, "_mend", mend)


@mutant("X6 facets are mended from the one that is rotten", ROTTEN)
def _(assign: Assign) -> None:
    original = Verify._mend

    async def mend(
        self: Verify, volume: Volume, offset: int, length: int, paths: list[str]
    ) -> bool:
        others = [facet.path for facet in volume.in_service() if facet.path not in paths]
        return await original(self, volume, offset, length, others)

    assign(Verify, "_mend", mend)
