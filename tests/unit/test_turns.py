"""What goes over much data in memory gives others their turn: clients, heartbeats, the watchdog."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.engine import operations, snapshotexport
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.restorer import Restorer
from nbdmirror.engine.volume import Change
from nbdmirror.ports import Buffer
from tests.unit.primary import REGION, REGIONS, Primary, primary

TURNS = 1000


async def look(value: Callable[[], int], seen: set[int]) -> None:
    """What a value is in each of the next turns."""
    for _ in range(TURNS):
        seen.add(value())
        await asyncio.sleep(0)


def test_a_client_clears_a_writable_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """V9, I9: one request may be for 4 GiB; it takes no space either."""
    monkeypatch.setattr(snapshotexport, "TURN_REGIONS", 4)

    async def test(world: Primary) -> None:
        for region in range(REGIONS):
            await world.write(region, 1)
        await world.take()
        await world.node.people.export("1", True)
        snapshot, seen = world.served("v@1"), set[int]()
        write = snapshot.write(
            snapshot, [Change(codec.WRITE, 0, 0, 2 * REGION, b"\7" * 2 * REGION)]
        )
        assert write is not None
        await write
        own = world.node.snapshots.chains[0].members[0].own
        assert own is not None

        def cleared() -> int:
            assert own is not None
            return sum(own.is_zeros(region) for region in range(REGIONS))

        looking = asyncio.ensure_future(look(cleared, seen))
        rest = (REGIONS - 1) * REGION
        await snapshot.clear(snapshot, Change(codec.TRIM, 0, 512, rest, None))
        await looking
        assert seen >= {4, 8, 12, REGIONS - 2}, "nobody else had a turn meanwhile"
        await snapshot.clear(snapshot, Change(codec.ZERO, 0, rest, 512, None))
        for cut in (False, True):
            await snapshot.flush()
            data = bytes(await world.served("v@1").read(0, REGIONS * REGION))
            assert data[:512] == b"\7" * 512 and not any(data[512 : rest + 512])
            assert data[rest + 512 :] == b"\1" * (REGION - 512)
            await world.restart(cut=cut)
            snapshot = world.served("v@1")

    primary(test)


def test_a_person_says_that_all_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """V13: what is read may all be in memory."""

    async def test(world: Primary) -> None:
        reads, seen = 0, set[int]()
        read, even = LocalFacet.read, Restorer._even

        async def counted(self: LocalFacet, offset: int, length: int) -> Buffer:
            nonlocal reads
            reads += 1
            return await read(self, offset, length)

        async def watched(*arguments: object) -> None:
            monkeypatch.setattr(LocalFacet, "read", counted)
            looking = asyncio.ensure_future(look(lambda: reads, seen))
            await even(*arguments)  # type: ignore[arg-type]
            monkeypatch.setattr(LocalFacet, "read", read)
            await looking

        monkeypatch.setattr(Restorer, "_even", watched)
        await world.node.people.changed("v", [(0, REGIONS * REGION)], None, False)
        assert seen >= set(range(1, REGIONS)), "nobody else had a turn meanwhile"

    primary(test)


def test_a_client_has_a_volume_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """I6: all of it may be in memory already."""
    monkeypatch.setattr(operations, "CACHE_PIECE", REGION)

    async def test(world: Primary) -> None:
        volume, reads, seen = world.node.volumes[0], 0, set[int]()
        read = volume.read

        async def counted(offset: int, length: int) -> Buffer:
            nonlocal reads
            reads += 1
            return await read(offset, length)

        await volume.read(0, REGIONS * REGION)
        monkeypatch.setattr(volume, "read", counted, raising=False)
        looking = asyncio.ensure_future(look(lambda: reads, seen))
        await operations.cache(volume, 0, REGIONS * REGION)
        await looking
        assert seen >= set(range(1, REGIONS)), "nobody else had a turn meanwhile"

    primary(test)
