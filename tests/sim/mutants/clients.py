"""Mutants of what goes on though the client that caused it has left (I2, I8), and of what a client
of one volume may cost another (M11)."""

from __future__ import annotations

import asyncio

from nbdmirror.engine import activemap, facet, facets, snapshots
from nbdmirror.engine.group import Group
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.rescue import Rescue
from nbdmirror.engine.volume import Volume
from tests.sim.mutation import Assign, mutant
from tests.sim.plays.awaited import AWAITED_AGAIN, FLUSHED_BESIDE_A_LOSS, FLUSHED_BESIDE_ANOTHER
from tests.sim.plays.clients import (
    LEFT_WHILE_FACET_FAILS,
    LEFT_WHILE_FORCED,
    LEFT_WHILE_GIVEN_UP,
)
from tests.sim.plays.facetcommands import OFFLINE_WHILE_IT_FAILS
from tests.sim.plays.remotes import PAUSED_AND_LOST


async def _cut(task: asyncio.Task[None]) -> None:
    """Who is cancelled takes the work along."""
    await task


@mutant("I8 a client that leaves ends a remote's overflow", run=LEFT_WHILE_FORCED)
def _(assign: Assign) -> None:
    assign(activemap, "to_the_end", _cut)


@mutant("I2 a client that leaves ends what follows a facet's failure", run=LEFT_WHILE_FACET_FAILS)
def _(assign: Assign) -> None:
    assign(facets, "to_the_end", _cut)


@mutant("V9 a client that leaves ends the giving up of a snapshot", run=LEFT_WHILE_GIVEN_UP)
def _(assign: Assign) -> None:
    assign(snapshots, "to_the_end", _cut)


@mutant("M11 a flush has the only remote of another volume out", run=FLUSHED_BESIDE_ANOTHER)
def _(assign: Assign) -> None:
    assign(Rescue, "_leaning_on", lambda self, remote: None)


@mutant("X4 a node that ends for one volume names another", run=FLUSHED_BESIDE_A_LOSS)
def _(assign: Assign) -> None:
    original = Rescue._leaning_on

    def leaning_on(self: Rescue, remote: Remote) -> Volume | None:
        return self.leaning()[0] if original(self, remote) else None

    assign(Rescue, "_leaning_on", leaning_on)


@mutant("X4 of a remote that is waited for only the first time is told", run=AWAITED_AGAIN)
def _(assign: Assign) -> None:
    assign(Rescue, "_forget", lambda self, event: None)


@mutant("M8 work that fails at its end hides that its caller was ended", run=OFFLINE_WHILE_IT_FAILS)
def _(assign: Assign) -> None:
    async def to_the_end(task: asyncio.Task[None]) -> None:
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
        task.result()
        if cancelled is not None:
            raise cancelled

    assign(facet, "to_the_end", to_the_end)


@mutant("I8 a volume without a holder keeps others from being flushed", run=PAUSED_AND_LOST)
def _(assign: Assign) -> None:
    original = Group.flush

    async def flush(self: Group) -> None:
        for volume in self.volumes:
            self._check_served(volume)
        await original(self)

    assign(Group, "flush", flush)
