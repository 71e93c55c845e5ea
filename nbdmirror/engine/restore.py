"""Restoring volumes from a snapshot: complete at once, the copy runs behind (V10, V12).

The regions to restore are the OR of both maps of the snapshot. From the step in which that map and
the superblock's ``restore`` are durable, reads of these regions are served from the layers, and a
region is copied into the facets before anything else may change it. The rules of the copy:

- it begins when no redo comes by records from before the restore any more;
- what newer snapshots need of the facets' old content is kept first, so the state before the
  restore, kept as a snapshot, is one to restore from again;
- a region's bit is cleared when the facets have it durably, and only then do writes go on there.

So each step may be cut by a crash and is then done again. Remotes get the regions as V11 says, see
``engine.bypass``; their resync reads what clients read.

    restore    {snapshot, undo: uuid of the snapshot from before, or null, seq: of the mark,
               sources: {volume index: uuids of the layers that it reads, oldest first},
               total_bytes, began_ns}
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol

from nbdmirror.codec.hashing import is_zeros
from nbdmirror.core.dcm import Dcm
from nbdmirror.engine.chain import Chain, Member, stopping
from nbdmirror.engine.maps import DcmFile
from nbdmirror.errors import DiskFailed, FormatError, VolumeFailed
from nbdmirror.ports import Buffer

if TYPE_CHECKING:
    from nbdmirror.engine.facet import LocalFacet
    from nbdmirror.engine.volume import Volume

COPY_BYTES = 4 << 20
"""What is copied with one sync of the facets and one of the map."""

PAUSE_SECONDS = 1.0
"""Whether a facet is back in service is looked at so often."""
RETRY_SECONDS = 60.0
"""Regions that the snapshot could not give are tried again so often, or when somebody asks."""


class Surroundings(Protocol):
    """What a restore needs of its node; see ``engine.restorer``."""

    async def settled(self) -> None:
        """Returns when no redo comes by records from before the restore."""

    def changing(
        self, volume: Volume, ranges: list[tuple[int, int]]
    ) -> AbstractAsyncContextManager[None]:
        """Within, the copy changes the facets in service in (offset, length) ranges: facets that
        lack them are told, at its end at the latest."""

    async def facets_failed(self, volume: Volume, facets: list[LocalFacet]) -> None:
        """Facets went out of service; VolumeFailed or DiskFailed if none is left."""

    def stalled(self, volume: Volume, why: str) -> None:
        """The copy does not go on by itself for now."""


def restore_map(chain: Chain, uuid: str) -> Dcm:
    """The regions in which the volume may differ from a snapshot: both maps (V10)."""
    regions = chain.changed(uuid)
    own = chain.members[chain.index(uuid)].own
    if own is not None:
        regions.merge(own.map.kept)
    return regions


class VolumeRestore:
    """One volume while it is being restored: its overlay, and its guard in front of the chain."""

    def __init__(
        self,
        chain: Chain,
        members: Sequence[Member],
        left: DcmFile,
        around: Surroundings,
    ) -> None:
        self.chain = chain
        self.volume = chain.volume
        self.left = left
        """Regions that are not in the facets yet."""
        self._members = list(members)
        self._around = around
        self._wanted: dict[int, asyncio.Future[None]] = {}
        self._unsynced: frozenset[int] = frozenset()
        """Regions that the facets have, and that a restart would copy once more: over a write."""
        self._again = asyncio.Event()
        """Somebody waits for a region that could not be read."""
        self.stall: str | None = None
        """Why the copy does not go on: no local facet is in service."""
        self.unreadable: dict[int, str] = {}
        """Regions that the snapshot could not give when it was last asked for them."""

    @property
    def sources(self) -> list[str]:
        """The uuids of the layers that it reads, oldest first."""
        return [member.uuid for member in self._members]

    @property
    def left_bytes(self) -> int:
        """What is not copied yet."""
        return self.left.map.count * self.volume.region_size

    def install(self) -> None:
        """From this step on the volume reads as the snapshot."""
        self.volume.overlay = self
        self.volume.guard = self

    def remove(self) -> None:
        """All is copied: the volume is its facets again."""
        self.volume.overlay = None
        self.volume.guard = self.chain if self.chain.members else None

    def close(self) -> None:
        """Closes layers that have left the chain meanwhile."""
        for member in self._members:
            if not self.chain.has(member.uuid):
                member.close()

    # -- overlay -----------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes of a range; VolumeFailed if they cannot be had."""
        size, volume = self.volume.region_size, self.volume
        parts: list[Buffer] = []
        at, end = offset, offset + length
        while at < end:
            region = at // size
            stop = min(end, (region + 1) * size)
            if self.left.map.is_marked(region):
                data = memoryview(await self._source(region))
                parts.append(data[at - region * size : stop - region * size])
            else:
                while stop < end and not self.left.map.is_marked(stop // size):
                    stop = min(end, stop + size)
                parts.append(await volume.read_below(at, stop - at))
            at = stop
        return b"".join(parts)

    def hides(self, offset: int, length: int) -> bool:
        """See ``volume.Overlay``."""
        return bool(self._left(offset, length))

    async def give_up(self, offset: int, length: int) -> None:
        """See ``volume.Overlay``: snapshots that are newer than the restored one."""
        await self.chain.lose(self._left(offset, length))

    async def _source(self, region: int) -> Buffer:
        """A region as the snapshot has it; it never is where the facets have it."""
        snapshot = self._members[0]
        layers = [m.layer for m in self._members if m.layer.map.kept.is_marked(region)]
        if snapshot.own is not None and snapshot.own.map.kept.is_marked(region):
            layers.insert(0, snapshot.own)
        if not layers:
            raise VolumeFailed(f"region {region} of {self.volume.name} is in no layer", number=5)
        try:
            try:
                return await layers[0].read(region)
            except OSError:  # of the moment, perhaps
                return await layers[0].read(region)
        except (FormatError, OSError) as error:
            raise VolumeFailed(f"restoring {self.volume.name}: {error}", number=5) from error

    # -- guard -------------------------------------------------------------------------------

    def holds(self, offset: int, length: int) -> bool:
        """See ``volume.Guard``."""
        return bool(self._waiting(offset, length)) or self._chain_holds(offset, length)

    def stops(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """See ``volume.Guard``."""
        return any(self.holds(offset, length) for offset, length in ranges)

    async def make_way(self, ranges: Iterable[tuple[int, int]]) -> None:
        """See ``volume.Guard``."""
        ranges = list(ranges)
        waits = []
        for offset, length in ranges:
            for region in self._waiting(offset, length):
                if self.unreadable.pop(region, None) is not None:
                    self._again.set()
                future = self._wanted.get(region)
                if future is None:
                    future = asyncio.get_running_loop().create_future()
                    self._wanted[region] = future
                waits.append(future)
        for future in waits:
            await asyncio.shield(future)
        await self.chain.make_way(ranges)

    def _chain_holds(self, offset: int, length: int) -> bool:
        return bool(self.chain.members) and self.chain.holds(offset, length)

    def _waiting(self, offset: int, length: int) -> list[int]:
        left = self._left(offset, length)
        if not self._unsynced:
            return left
        return left + [r for r in self._regions(offset, length) if r in self._unsynced]

    def _left(self, offset: int, length: int) -> list[int]:
        return [r for r in self._regions(offset, length) if self.left.map.is_marked(r)]

    def _regions(self, offset: int, length: int) -> range:
        size = self.volume.region_size
        return range(offset // size, (offset + length - 1) // size + 1)

    # -- the copy ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Returns when all is copied; DiskFailed ends it."""
        try:
            await self._around.settled()
            while self.left.map.count:
                try:
                    while batch := self._next():
                        await self._copy(batch)
                except VolumeFailed as error:
                    await self._wait_for_facet(error)
                    continue
                await self._wait_for_snapshot()
        except BaseException as error:
            cause = error if isinstance(error, Exception) else stopping()
            self._resolve(list(self._wanted), cause)
            raise

    async def _wait_for_facet(self, error: VolumeFailed) -> None:
        """No local facet is in service, for now: who waits for a region is told so."""
        self._resolve(list(self._wanted), error)
        if self.stall is None:
            self.stall = error.message
            self._around.stalled(self.volume, error.message)
        await asyncio.sleep(PAUSE_SECONDS)
        if self.volume.in_service():
            self.stall = None

    async def _wait_for_snapshot(self) -> None:
        """What is left could not be read; it is tried again when somebody needs it, and anyhow."""
        if not self.left.map.count:
            return
        self._around.stalled(self.volume, next(iter(self.unreadable.values()), ""))
        try:
            async with asyncio.timeout(RETRY_SECONDS):
                await self._again.wait()
        except TimeoutError:
            self.unreadable.clear()
        self._again.clear()

    def _next(self) -> list[int]:
        """What somebody waits for, else what comes next."""
        count = max(1, COPY_BYTES // self.volume.region_size)
        if self._wanted:
            return list(self._wanted)[:count]
        batch: list[int] = []
        for first, length in self.left.map.runs():
            for region in range(first, first + length):
                if region not in self.unreadable:
                    batch.append(region)
                    if len(batch) == count:
                        return batch
        return batch

    async def _copy(self, batch: list[int]) -> None:
        volume, size = self.volume, self.volume.region_size
        volume.source()  # raises if there is no facet: what newer snapshots need is in none
        ranges = [(r * size, min(size, volume.size - r * size)) for r in batch]
        while any(self._chain_holds(*one) for one in ranges):
            await self.chain.make_way(ranges)
        # A facet that goes out of service meanwhile, whoever sees it fail, may lack some of it.
        async with self._around.changing(volume, ranges):
            async with volume.beside:
                done = await self._place_all(batch)
            await self._sync_facets()
        volume.source()  # raises if no facet is left
        self._unsynced = frozenset(done)
        self.left.unmark(done)
        await self.left.sync()
        self._unsynced = frozenset()
        self._resolve(done, None)

    async def _sync_facets(self) -> None:
        lost = []
        for facet in self.volume.writable():
            try:
                await facet.sync()
            except DiskFailed:
                lost.append(facet)
        if lost:
            await self._around.facets_failed(self.volume, lost)

    async def _place_all(self, batch: list[int]) -> list[int]:
        """Puts regions into the facets; returns those that could be read."""
        done: list[int] = []
        for region in batch:
            try:
                data = await self._source(region)
            except VolumeFailed as error:
                self.unreadable[region] = error.message
                self._resolve([region], error)
                continue
            await self._place(region * self.volume.region_size, data)
            done.append(region)
        return done

    async def _place(self, offset: int, data: Buffer) -> None:
        zeros = is_zeros(data)
        lost = []
        for facet in self.volume.writable():
            if not facet.writable:
                continue  # it left while another one's hole was punched
            try:
                if zeros:
                    await facet.punch(offset, len(data))
                else:
                    facet.pwrite(offset, data)
            except OSError as error:
                facet.fail("write", error)
                lost.append(facet)
        if lost:
            await self._around.facets_failed(self.volume, lost)

    def _resolve(self, regions: list[int], error: BaseException | None) -> None:
        for region in regions:
            future = self._wanted.pop(region, None)
            if future is None or future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
                future.exception()  # perhaps nobody waits any more

    def status(self) -> dict[str, Any]:
        """What is left, and why it does not go on."""
        why = self.stall or next(iter(self.unreadable.values()), None)
        return {
            "volume": self.volume.name,
            "left_bytes": self.left_bytes,
            "why": why,
        }
