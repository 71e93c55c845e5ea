"""Reads that the chosen facet could not serve: asked of another one, and mended (M14, I8).

The error is counted. What another facet gave is written to the one that failed, in the background
and under the range lock; one that fails too often leaves service. Called by ``Volume.read``; what
the usual read costs, this does not touch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from nbdmirror.engine.events import EventLog
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.volume import Volume, read_failed
from nbdmirror.errors import DiskFailed
from nbdmirror.ports import Buffer

READ_ERRORS_MAX = 32
"""A facet that had so many reads fail since it came into service leaves it."""
MEND_ALIGN = 4096
"""A bad sector is written as a whole page: a part of one would be read first, and fail again."""
MEND_BYTES_MAX = 4 << 20
"""A longer read that failed is not mended at once: one bad sector does not cost a rewrite."""
MENDING_MAX = 16

FacetLost = Callable[[Volume, LocalFacet], Awaitable[None]]


class Rescue:
    """The other ways to a volume's data, for one node."""

    def __init__(self, volumes: list[Volume], events: EventLog, lost: FacetLost) -> None:
        self._events = events
        self._lost = lost
        self._mending: dict[asyncio.Task[None], None] = {}
        for volume in volumes:
            volume.rescue = self.read

    async def read(
        self,
        volume: Volume,
        offset: int,
        length: int,
        facet: LocalFacet | None,
        error: OSError | None,
    ) -> Buffer:
        """The bytes that ``facet`` failed to give with ``error``; VolumeFailed if nobody can."""
        if facet is None or error is None:
            raise volume.no_facet()
        await self._count(volume, facet, error)
        for other in volume.in_service():
            if other is facet:
                continue
            try:
                data = await other.read(offset, length)
            except OSError as failure:
                await self._count(volume, other, failure)
                continue
            self._mend_soon(volume, facet, offset, length)
            return data
        raise read_failed(facet, offset, length, error) from error

    async def _count(self, volume: Volume, facet: LocalFacet, error: OSError) -> None:
        facet.errors += 1
        facet.read_errors += 1
        self._events.emit(
            "read-error", volume=volume.name, facet=facet.path, why=error.strerror or str(error)
        )
        others = [other for other in volume.in_service() if other is not facet]
        if facet.read_errors >= READ_ERRORS_MAX and others and facet.in_service:
            facet.fail(f"{facet.read_errors} reads failed; the last", error)
            await self._lost(volume, facet)

    # -- mending -------------------------------------------------------------------------------

    def _mend_soon(self, volume: Volume, facet: LocalFacet, offset: int, length: int) -> None:
        start = offset // MEND_ALIGN * MEND_ALIGN
        end = min(-(-(offset + length) // MEND_ALIGN) * MEND_ALIGN, volume.size)
        if end - start > MEND_BYTES_MAX or len(self._mending) >= MENDING_MAX:
            return
        # Not awaited: the reader may hold the range itself, and has its data.
        task = asyncio.ensure_future(self._mend(volume, facet, start, end - start))
        self._mending[task] = None
        task.add_done_callback(self._mended)

    def _mended(self, task: asyncio.Task[None]) -> None:
        del self._mending[task]
        # A superblock that cannot be saved has told the node of it.
        if not task.cancelled() and not isinstance(task.exception(), DiskFailed):
            task.result()

    async def _mend(self, volume: Volume, facet: LocalFacet, offset: int, length: int) -> None:
        """Writes a range anew from another facet; writes to it wait meanwhile."""
        async with volume.locked(offset, length, exclusive=True):
            for other in volume.in_service():
                if other is facet or not facet.writable:
                    continue
                try:
                    data = await other.read(offset, length)
                except OSError:
                    continue
                if not facet.writable:
                    return
                try:
                    facet.pwrite(offset, data)
                except OSError as error:
                    facet.fail("write", error)
                    break
                self._events.emit(
                    "read-mended",
                    volume=volume.name,
                    facet=facet.path,
                    offset=offset,
                    length=length,
                )
                return
        if facet.failed is not None:
            await self._lost(volume, facet)

    async def stop(self) -> None:
        """Ends what is being mended: it is, at the next error."""
        tasks = list(self._mending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
