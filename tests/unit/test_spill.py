"""A log partly in memory, while facets come and go in the middle of a change over (M4, M11)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from nbdmirror.engine.facets import Facets
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import RING_AT, Log
from nbdmirror.engine.memoryfile import MemoryFile
from nbdmirror.engine.spill import Spill

CAPACITY = 64 << 10


class Surroundings:
    """One volume with at most one facet, and a remote that stands in for it."""

    def __init__(self) -> None:
        self.log = Log(cast(Any, MemoryFile(RING_AT + CAPACITY)), CAPACITY, 0, 1)
        self.in_service = [object()]
        self.syncing, self.synced = asyncio.Event(), asyncio.Event()
        self.state: dict[str, Any] = {"log_spill": False, "durable_seq": 0}
        volume = SimpleNamespace(in_service=lambda: self.in_service, writable=list)
        group = SimpleNamespace(
            volumes=[volume], goes_on=lambda one: True, pressure_at=CAPACITY, fail=self._fail
        )
        store = SimpleNamespace(state=self.state, save=self._save)
        events = SimpleNamespace(emit=lambda *args, **fields: None)
        facets = SimpleNamespace(group=group, store=store, events=events)
        housekeeper = SimpleNamespace(sync_facets=self._sync)
        self.spill = Spill(self.log, 4096, cast(Facets, facets), cast(Housekeeper, housekeeper))

    def _fail(self, error: Exception) -> None:
        raise error

    async def _save(self) -> None:
        await asyncio.sleep(0)

    async def _sync(self, *, everything: bool) -> None:
        self.syncing.set()
        await self.synced.wait()


def test_a_last_facet_that_leaves_and_another_that_comes_during_the_change_over() -> None:
    """The superblock does not call the log in memory when it is on disk; and it goes there."""

    async def test() -> None:
        world = Surroundings()
        world.spill.begin()  # the facet is there: the change over begins
        await world.syncing.wait()
        world.in_service.clear()
        world.spill.note()
        world.spill.look(on_disk=True)
        assert world.log.spilled is None and not world.state["log_spill"]
        world.in_service.append(object())
        world.spill.look()
        world.synced.set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert world.log.spilled is not None and world.state["log_spill"]
        assert not world.spill.status()["on_disk"]

    asyncio.run(test())
