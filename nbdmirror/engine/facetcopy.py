"""Copies what a returning local facet lacks from the others, while it is in use (M8, M16).

The facet takes every write already. A marked stretch is read and written under the range lock
that writes wait for, so the copy is never older than a write beside it (O13). A bit is cleared
when the facet was synced past the copy (O7), and those too that it was read from (O16). Knows
nothing of logs and of the superblock.
"""

from __future__ import annotations

import asyncio

from nbdmirror.core.progress import Progress
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.sources import Sources
from nbdmirror.engine.volume import Volume
from nbdmirror.ports import Buffer

COPY_BYTES = 1 << 20
"""A stretch is copied in pieces of at most this (or one region): writes to it wait as long."""
HOLE_BYTES = 1 << 30
"""... and where it is a hole, in pieces of at most this."""
SYNC_BYTES = 64 << 20
"""So much is copied between two syncs."""
LOOK_SECONDS = 1.0
"""While a remote is to say what a stretch holds, it is looked so often whether it is in reach."""
TOKEN = 1
"""Of every copy in flight: nothing marks the map while it is worked off."""


class FacetCopy:
    """One facet's way back; ``progress`` is what the status shows."""

    def __init__(
        self,
        volume: Volume,
        facet: LocalFacet,
        dcm: DcmFile,
        sources: Sources,
        *,
        compare: bool,
    ) -> None:
        """``compare``: the content may be the same; then it is not written again."""
        self._volume = volume
        self._facet = facet
        self._dcm = dcm
        self._sources = sources
        self._compare = compare
        self._copied: list[int] = []
        total = dcm.map.count * dcm.region_size
        self.progress = Progress("full" if compare else "dcm", total, phase="passes")

    async def run(self) -> None:
        """Returns when nothing is marked and the facet was synced past all of it.

        DiskFailed: the facet failed. VolumeFailed: there is nothing to read from."""
        dcm = self._dcm.map
        dcm.abandon()
        while dcm.count:
            at = 0
            while (run := next(dcm.runs(at), None)) is not None:
                first, count = run
                at = first + await self._stretch(first, count)
                if len(self._copied) * self._dcm.region_size >= SYNC_BYTES:
                    await self._settle()
            await self._settle()
        await self._facet.sync()

    async def _stretch(self, first: int, count: int) -> int:
        """Copies the start of a marked stretch; returns how many regions that was."""
        volume, facet = self._volume, self._facet
        region = volume.region_size
        offset = first * region
        span = min(count * region, max(HOLE_BYTES, region), volume.size - offset)
        hole = next(volume.allocation_below(offset, span))
        if hole[2]:
            # Whole regions only: a region that is partly data is copied.
            count = hole[1] // region if hole[1] < span else -(-span // region)
        if not hole[2] or not count:
            hole = (offset, 0, False)
            count = min(max(1, COPY_BYTES // region), -(-span // region))
        length = min(count * region, volume.size - offset)
        self._check_source()
        async with volume.locked(offset, length, exclusive=False), volume.beside:
            self._check()
            try:
                if hole[2] and all(piece[2] for piece in volume.allocation_below(offset, length)):
                    await self._clear(offset, length)
                elif not hole[2]:
                    await self._copy(offset, length)
                else:
                    return count  # written to meanwhile: the walk comes by again
            except OSError as error:
                raise facet.fail("write", error) from error
        for number in range(first, first + count):
            self._dcm.map.begin(number, 1, TOKEN)
            self._copied.append(number)
        return count

    async def _clear(self, offset: int, length: int) -> None:
        facet = self._facet
        if any(True for _ in facet.file.data_ranges(offset, length)):
            await facet.punch(offset, length)

    async def _copy(self, offset: int, length: int) -> None:
        facet = self._facet
        end = offset + length
        for at in range(offset, end, COPY_BYTES):
            size = min(COPY_BYTES, end - at)
            data = await self._content(at, size)
            self._check()
            if self._compare and await facet.read(at, size) == data:
                self.progress.skipped_bytes += size
                continue
            self._check()
            await facet.copy(at, data)
            self.progress.sent_bytes += size

    async def _content(self, offset: int, length: int) -> Buffer:
        """What the other facets hold, though a restore may not have come by yet; what a remote
        has instead of them is what clients read."""
        volume = self._volume
        if volume.in_service():
            return await volume.read_below(offset, length)
        if volume.overlay is not None:
            await volume.overlay.give_up(offset, length)
        reading = asyncio.ensure_future(volume.read(offset, length))
        try:
            while not reading.done():
                await asyncio.wait([reading], timeout=LOOK_SECONDS)
                if not reading.done():
                    self._check_source()
            return reading.result()
        finally:
            reading.cancel()

    def _check_source(self) -> None:
        """A client would wait for a remote that comes back; a copy does not, for writes to the
        stretch wait for it. What is being restored may come from a snapshot."""
        volume = self._volume
        if volume.in_service() or volume.overlay is not None:
            return
        if not self._sources.in_reach(volume):
            raise volume.no_facet()

    def _check(self) -> None:
        """A write that came beside the copy may have seen the facet fail."""
        if self._facet.failed is not None:
            raise self._facet.failed

    async def _settle(self) -> None:
        """The copies so far are durable, and of what the others have kept: their bits may go."""
        if not self._copied:
            return
        copied, self._copied = self._copied, []
        if await self._sources.lost():
            self._dcm.map.abandon()
            return
        await self._facet.sync()
        before = self._dcm.map.count
        for number in copied:
            self._dcm.finish(number, 1, TOKEN)
        left, region = self._dcm.map.count, self._dcm.region_size
        now = asyncio.get_running_loop().time()
        self.progress.moved(now, (before - left) * region, left * region)
