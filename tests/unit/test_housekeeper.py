"""The background work of a node on its log (M6, O16)."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.errors import DiskFailed, NbdmirrorError, VolumeFailed
from tests.sim.faults import Fault, Kind
from tests.unit.primary import REGIONS, Primary, primary

HANGS = Fault(Kind.STALL, seconds=3600.0)


def test_who_waits_for_space_is_told_that_the_node_ends() -> None:
    """O16, I8: whatever ended it, and not after the patience of a stop for requests."""

    async def test(world: Primary) -> None:
        def inject(operation: str, path: str, nth: int) -> Fault | None:
            return HANGS if operation == "sync" and path.startswith("/facets") else None

        world.disk.faults = inject

        async def write_until_it_ends() -> None:
            number = 0
            while True:
                await world.write(number % REGIONS, number % 256)
                number += 1

        writing = asyncio.ensure_future(write_until_it_ends())
        await asyncio.sleep(30.0)
        assert world.node.housekeeper._waiting, "the log is full"
        world.group.fail(DiskFailed("the map cannot be written"))
        with pytest.raises(VolumeFailed, match="the map cannot be written"):
            async with asyncio.timeout(1.0):
                await writing

    primary(test)


def test_a_defect_ends_the_node_and_not_only_what_gives_space_back() -> None:
    """I8: writes would wait for space for ever, and nobody would know why."""

    async def test(world: Primary) -> None:
        async def release() -> None:
            raise ValueError("a list is empty")

        told: list[str] = []
        world.node.events.listen(lambda event: told.append(str(event["kind"])))
        world.node.housekeeper._release = release  # type: ignore[method-assign]
        with pytest.raises(NbdmirrorError, match="a list is empty"):
            async with asyncio.timeout(60.0):
                number = 0
                while True:
                    await world.write(number % REGIONS, number % 256)
                    number += 1
        assert world.node.failed is not None and world.node.failed.done()
        assert "defect" in told and "failed" in told
        await world.node.stop()

    primary(test)
