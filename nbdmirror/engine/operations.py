"""The requests that are more than one call of the group or the volume, for every front end.

Owns what TRIM, WRITE_ZEROES and CACHE mean for a volume; reads and writes go to ``Volume`` and
``Group`` directly. Never knows a wire format. Called by ``engine.export`` and by the edge's
nbdkit front end; both run on the node's event loop.
"""

from __future__ import annotations

import asyncio

from nbdmirror.codec import record
from nbdmirror.engine.snapshotexport import Writer
from nbdmirror.engine.volume import Change, Volume
from nbdmirror.ports import Buffer

CACHE_PIECE = 1 << 20
"""CACHE reads so many bytes at a time: its memory stays bounded (I6)."""


async def trim(group: Writer, volume: Volume, offset: int, length: int, *, durable: bool) -> None:
    """Gives space back; the range reads as zeros afterwards, on every facet (O22).

    ``durable``: as FUA. VolumeFailed carries the client's errno."""
    await group.clear(volume, Change(record.TRIM, 0, offset, length, None), durable=durable)


async def zero(
    group: Writer, volume: Volume, offset: int, length: int, *, keep_space: bool, durable: bool
) -> None:
    """The range reads as zeros; ``keep_space``: and stays allocated (NO_HOLE).

    ``durable``: as FUA. Always fast: no byte of the range is written to the log. VolumeFailed
    carries the client's errno."""
    flags = record.NO_HOLE if keep_space else 0
    await group.clear(volume, Change(record.ZERO, flags, offset, length, None), durable=durable)


async def read(volume: Volume, offset: int, length: int) -> list[tuple[int, int, Buffer | None]]:
    """(offset, length, data) pieces of the range, holes without data; VolumeFailed as a read."""
    pieces: list[tuple[int, int, Buffer | None]] = []
    for at, size, hole in list(volume.allocation(offset, length)):
        pieces.append((at, size, None if hole else await volume.read(at, size)))
    return pieces


async def cache(volume: Volume, offset: int, length: int) -> None:
    """Reads the range, so that the page cache has it; VolumeFailed as for a read."""
    end = offset + length
    for at in range(offset, end, CACHE_PIECE):
        await volume.read(at, min(CACHE_PIECE, end - at))
        await asyncio.sleep(0)  # it may have been in memory
