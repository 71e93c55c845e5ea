"""The chain of snapshots of one volume: copies on write, reads, merges (V9, O21).

A region that the newest snapshot needs is kept, durably, before the volume overwrites it. Requests
that wait for it are served in batches, one sync for each; requests to other regions never wait.
What to give up when the disk of the layers is full is decided in ``engine.snapshots``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from nbdmirror.codec.hashing import is_zeros
from nbdmirror.core import layers
from nbdmirror.core.dcm import Dcm
from nbdmirror.engine.layer import FULL, LayerFile
from nbdmirror.errors import FormatError, VolumeFailed
from nbdmirror.ports import Buffer

if TYPE_CHECKING:
    from nbdmirror.engine.volume import Volume

BATCH_BYTES = 8 << 20
"""Regions kept with one sync."""
MERGE_REGIONS = 16
"""Regions of a deleted snapshot that move at a time: copies on write wait for no more."""


class Member:
    """One snapshot's place in a volume's chain."""

    def __init__(self, uuid: str, layer: LayerFile) -> None:
        self.uuid = uuid
        self.layer = layer
        self.own: LayerFile | None = None
        """What was written into the snapshot itself."""

    @property
    def bytes_kept(self) -> int:
        """About what its files take."""
        return self.layer.bytes_kept + (self.own.bytes_kept if self.own is not None else 0)

    def close(self) -> None:
        """Closes its files."""
        self.layer.close()
        if self.own is not None:
            self.own.close()


class Chain:
    """The snapshots of a volume, oldest first; the volume's ``guard`` while there are any."""

    def __init__(
        self,
        volume: Volume,
        give_up: Callable[[Chain, OSError | None], Awaitable[None]],
        may_keep: Callable[[int], bool],
    ) -> None:
        self.volume = volume
        self.members: list[Member] = []
        self._give_up = give_up
        """Awaited when the newest layer could not keep regions: makes room, or ends snapshots."""
        self._may_keep = may_keep
        """Whether so many bytes more are within the limit."""
        self._wanted: dict[int, asyncio.Future[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._moving = asyncio.Lock()
        """Held while regions move from one layer to the one before: neither of them leaves."""

    # -- the guard of the data path --------------------------------------------------------------

    def holds(self, offset: int, length: int) -> bool:
        """Whether a change of this range has to wait for ``make_way``."""
        size = self.volume.region_size
        is_marked = self.members[-1].layer.map.kept.is_marked
        first, last = offset // size, (offset + length - 1) // size
        if first == last:
            return not is_marked(first)
        return not all(is_marked(region) for region in range(first, last + 1))

    def stops(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Whether any of a batch's (offset, length) ranges has to wait."""
        size = self.volume.region_size
        is_marked = self.members[-1].layer.map.kept.is_marked
        for offset, length in ranges:
            first = offset // size
            if not is_marked(first):
                return True
            if (offset + length - 1) // size != first and self.holds(offset, length):
                return True
        return False

    async def make_way(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Returns when every region in (offset, length) ranges is kept that the newest snapshot
        needed. Look again then: there may be a newer one."""
        if not self.members:
            return
        size = self.volume.region_size
        waits = []
        newest = self.members[-1].layer.map
        for offset, length in ranges:
            for region in layers.missing(newest, offset // size, (offset + length - 1) // size):
                future = self._wanted.get(region)
                if future is None:
                    future = asyncio.get_running_loop().create_future()
                    self._wanted[region] = future
                waits.append(future)
        if waits and self._task is None:
            self._task = asyncio.ensure_future(self._work())
        for future in waits:
            await asyncio.shield(future)

    async def _work(self) -> None:
        """Keeps what is wanted, batch after batch; errors reach those who wait."""
        batch: list[int] = []
        try:
            while self._wanted:
                count = max(1, BATCH_BYTES // self.volume.region_size)
                batch = list(self._wanted)[:count]
                await self._keep(batch)
                for region in batch:
                    _resolve(self._wanted.pop(region), None)
        except BaseException as error:
            # Whatever it was, nobody goes on as if the region were kept.
            cause = error if isinstance(error, Exception) else stopping()
            for future in self._wanted.values():
                _resolve(future, cause)
            self._wanted.clear()
            if not isinstance(error, Exception):
                raise
        finally:
            self._task = None

    async def _keep(self, batch: list[int]) -> None:
        """Who waits for it looks again afterwards, so a snapshot may come or go meanwhile."""
        while self.members:
            newest = self.members[-1].layer
            needed = [r for r in batch if not newest.map.kept.is_marked(r)]
            if not needed:
                return
            if not self._may_keep(len(needed) * self.volume.region_size):
                await self._give_up(self, None)
                continue
            contents: list[tuple[int, Buffer | None]] = []
            unreadable: list[int] = []
            for region in needed:
                try:
                    contents.append((region, await self._content_twice(region)))
                except VolumeFailed:
                    if self._awaits_facet(region):
                        raise
                    unreadable.append(region)  # as it is for who reads the volume
            if not self.members or self.members[-1].layer is not newest:
                continue  # it has left meanwhile, or is not the newest any more
            try:
                await newest.keep(contents, unreadable)
                return
            except OSError as error:
                await self._give_up(self, error)

    def _awaits_facet(self, region: int) -> bool:
        """Whether only a facet can give the region, and none is in service: one may come back."""
        volume, size = self.volume, self.volume.region_size
        if volume.overlay is None or volume.in_service():
            return False
        return volume.overlay.hides(region * size, size)

    async def lose(self, regions: Iterable[int]) -> None:
        """The regions are about to be lost before the newest snapshot has them; it says so."""
        while self.members:
            newest = self.members[-1].layer
            needed = [r for r in regions if not newest.map.kept.is_marked(r)]
            try:
                await newest.keep([], needed)
                return
            except OSError as error:
                await self._give_up(self, error)

    async def _content_twice(self, region: int) -> Buffer | None:
        """As ``_content``; an error of the moment does not cost the snapshots the region."""
        try:
            return await self._content(region)
        except VolumeFailed:
            return await self._content(region)

    async def _content(self, region: int) -> Buffer | None:
        """A region of the volume as it is; ``None``: nothing but zeros."""
        volume = self.volume
        offset = region * volume.region_size
        length = min(volume.region_size, volume.size - offset)
        await volume.wait_landed(offset, length)
        if all(hole for _, _, hole in volume.allocation_below(offset, length)):
            return None
        data = bytes(await volume.read_below(offset, length))
        return None if is_zeros(data) else data

    # -- reading -----------------------------------------------------------------------------

    def has(self, uuid: str) -> bool:
        """Whether a snapshot is in the chain."""
        return any(member.uuid == uuid for member in self.members)

    def index(self, uuid: str) -> int:
        """Where a snapshot is in the chain; VolumeFailed if it is gone."""
        for index, member in enumerate(self.members):
            if member.uuid == uuid:
                return index
        raise VolumeFailed(f"snapshot {uuid} of volume {self.volume.name} is gone", number=5)

    async def read_region(self, uuid: str, region: int, start: int, end: int) -> Buffer:
        """Bytes start..end of a region of a snapshot; VolumeFailed if they cannot be had."""
        while True:
            source = self._source(uuid, region)
            if source is not None:
                try:
                    return memoryview(await source.read(region))[start:end]
                except (FormatError, OSError) as error:
                    if self._source(uuid, region) is not source:
                        continue  # it was moved from there while it was read
                    raise VolumeFailed(f"snapshot {uuid}: {error}", number=5) from error
            offset = region * self.volume.region_size
            await self.volume.wait_landed(offset, self.volume.region_size)
            data = await self.volume.read_below(offset + start, end - start)
            # Kept meanwhile: what was read may be newer. The keeping precedes any change.
            if self._source(uuid, region) is None:
                return data

    def _source(self, uuid: str, region: int) -> LayerFile | None:
        """Where a region of a snapshot is; ``None``: in the volume. VolumeFailed if it is gone."""
        index = self.index(uuid)
        own = self.members[index].own
        if own is not None and own.map.kept.is_marked(region):
            return own
        at = layers.holder([m.layer.map for m in self.members], index, region)
        return None if at is None else self.members[at].layer

    async def read(self, uuid: str, offset: int, length: int) -> bytes:
        """A range of a snapshot; VolumeFailed if it cannot be had."""
        size = self.volume.region_size
        parts: list[Buffer] = []
        for region in range(offset // size, (offset + length - 1) // size + 1):
            base = region * size
            start, end = max(offset - base, 0), min(offset + length - base, size)
            parts.append(await self.read_region(uuid, region, start, end))
        return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)

    def changed(self, uuid: str, end: str | None = None) -> Dcm:
        """What the volume changed since a snapshot, or until a later one (V9)."""
        stop = None if end is None else self.index(end)
        return layers.changed([m.layer.map for m in self.members], self.index(uuid), stop)

    def holes(self, uuid: str, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, hole) pieces that cover a range of a snapshot: a region that is kept is
        a piece, and what lies between such regions is as it is in the volume."""
        index, size = self.index(uuid), self.volume.region_size
        own = self.members[index].own
        files = [*([own] if own is not None else []), *(m.layer for m in self.members[index:])]
        maps = [file.map for file in files]
        at, end = offset, offset + length
        while at < end:
            region = at // size
            holder = layers.holder(maps, 0, region)
            if holder is not None:
                high = min(end, (region + 1) * size)
                yield at, high - at, files[holder].is_zeros(region)
            else:
                following = layers.next_kept(maps, region + 1)
                high = end if following is None else min(end, following * size)
                yield from self.volume.allocation_below(at, high - at)
            at = high

    # -- members -----------------------------------------------------------------------------

    def push(self, member: Member) -> None:
        """A new snapshot, newest from this step on."""
        self.members.append(member)
        if self.volume.guard is None:
            self.volume.guard = self

    def drop(self, uuid: str) -> Member | None:
        """Takes a snapshot out of the chain, as it is: what older ones need of it goes with it."""
        for member in self.members:
            if member.uuid == uuid:
                self.members.remove(member)
                if not self.members and self.volume.guard is self:
                    self.volume.guard = None
                return member
        return None

    async def leave(self, uuid: str, *, free: bool) -> Member | None:
        """Moves what the snapshot before needs of this one into that one's layer, a few regions at
        a time, and takes it out of the chain in the step in which nothing is left to move; ``None``
        if it is gone already. Where the disk is full and ``free`` is given, what nobody will read
        of this one makes room. OSError as from ``keep``."""
        at, count, freeing = 0, MERGE_REGIONS, False
        while True:
            async with self._moving:
                index = next((i for i, m in enumerate(self.members) if m.uuid == uuid), 0)
                if index == 0:
                    return self.drop(uuid)  # the oldest, or gone
                older, deleted = self.members[index - 1].layer, self.members[index].layer
                regions = layers.orphans(older.map, deleted.map, at, count)
                if not regions and at == 0:
                    return self.drop(uuid)
                if not regions:
                    at = 0  # once more from the start: it may have kept some meanwhile
                    continue
                try:
                    await self._move(deleted, older, regions)
                except OSError as error:
                    if error.errno not in FULL or not free or (freeing and count == 1):
                        raise
                    if freeing:
                        count //= 2
                    else:
                        freeing = True
                        await deleted.release(layers.shared(older.map, deleted.map))
                    continue
                if freeing:
                    await deleted.release((region, 1) for region in regions)
                at = regions[-1] + 1

    @staticmethod
    async def _move(deleted: LayerFile, older: LayerFile, regions: Iterable[int]) -> None:
        moved: list[tuple[int, Buffer | None]] = []
        unreadable: list[int] = []
        for region in regions:
            try:
                moved.append((region, await _kept_twice(deleted, region)))
            except (FormatError, OSError):
                unreadable.append(region)
        await older.keep(moved, unreadable)

    async def stop(self, sync_own: Callable[[str, LayerFile], Awaitable[None]]) -> None:
        """Ends copying; leaves nothing to prove at the next start, nor to doubt: what was written
        into one is on the disk, or ``sync_own`` has ended that one (O16)."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for member in list(self.members):
            if member.own is not None:
                with contextlib.suppress(OSError):
                    await sync_own(member.uuid, member.own)
        for member in self.members:
            await member.layer.settle()

    def close(self) -> None:
        """Closes all files."""
        for member in self.members:
            member.close()


def stopping() -> VolumeFailed:
    """What a request gets that waits for something when the node stops."""
    return VolumeFailed("the node stops", number=errno.ESHUTDOWN, hint="start it again")


async def _kept_twice(layer: LayerFile, region: int) -> Buffer | None:
    """What a layer keeps of a region, ``None``: nothing but zeros; an error of the moment does not
    cost the snapshot that gets it the region."""
    if layer.is_zeros(region):
        return None
    try:
        return await layer.read(region)
    except (FormatError, OSError):
        return await layer.read(region)


def _resolve(future: asyncio.Future[None], error: BaseException | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
            future.exception()  # perhaps nobody waits any more
