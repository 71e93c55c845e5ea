"""Mutants of what people ask of local facets (M8, M13, M17)."""

from __future__ import annotations

import asyncio

from nbdmirror.engine.edit import Edit
from nbdmirror.engine.facetcommands import FacetCommands
from nbdmirror.engine.facetmember import Member
from nbdmirror.engine.facets import Facets
from tests.sim.mutation import Assign, mutant
from tests.sim.plays.facetcommands import (
    BACK_WHILE_REPLACED,
    EDITED_AND_LEFT,
    LAST_TAKEN,
    OUT_AND_FAILED,
    STOPPED_AND_REPLACED,
)
from tests.sim.plays.standins import REMOVED_UNPASSED, REPLACED_UNPASSED


@mutant("M13 a facet is removed that alone has what was flushed", run=REMOVED_UNPASSED)
def _(assign: Assign) -> None:
    assign(FacetCommands, "_check_passed", lambda self, member: None)


@mutant("V13 a facet that was away has what was written to it", run=EDITED_AND_LEFT)
def _(assign: Assign) -> None:
    assign(Edit, "check", lambda self: None)


@mutant("M8 a person takes out the last facet", run=LAST_TAKEN)
def _(assign: Assign) -> None:
    original, calls = FacetCommands._check_last, list[None]()

    def check(self: FacetCommands, member: Member) -> None:
        calls.append(None)
        if len(calls) % 2:  # before the wait, not after it
            original(self, member)

    assign(FacetCommands, "_check_last", check)


@mutant("M8 what a person took out comes back", run=OUT_AND_FAILED)
def _(assign: Assign) -> None:
    def serve(self: Facets, member: Member, pause: float) -> None:
        if member.task is None or member.task.done():
            member.task = asyncio.ensure_future(self._guard(member, pause))

    assign(Facets, "serve", serve)


@mutant("M8 a replacement begins before it may be refused", run=REPLACED_UNPASSED)
def _(assign: Assign) -> None:
    original = FacetCommands._replace

    async def replace(self: FacetCommands, path: str, new: str | None) -> None:
        if new is None:
            await original(self, path, new)
            return
        await self._add(self._facets.member(path).volume.name, new)
        await self._remove(path)

    assign(FacetCommands, "_replace", replace)


@mutant("M8 a replacement that is refused after all leaves the new facet", run=BACK_WHILE_REPLACED)
def _(assign: Assign) -> None:
    original = FacetCommands._remove

    async def remove(self: FacetCommands, path: str) -> None:
        if self._facets.members[-1].facet.path != path:
            await original(self, path)

    assign(FacetCommands, "_remove", remove)


@mutant("M8 a facet begins to return after a stop", run=STOPPED_AND_REPLACED)
def _(assign: Assign) -> None:
    original = Facets.stop

    async def stop(self: Facets) -> None:
        await original(self)
        self._stopped = False

    assign(Facets, "stop", stop)


@mutant("M8 a replacement that is refused ends a facet's return", run=REPLACED_UNPASSED)
def _(assign: Assign) -> None:
    assign(FacetCommands, "_serve", lambda self, member: None)
