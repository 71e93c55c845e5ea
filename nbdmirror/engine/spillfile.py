"""The file of a log in ``spill`` mode: its newest bytes are in memory, the older ones in the file.

One position divides the two: ``start``. Memory holds the ring's bytes from there to the head, the
file those from the durable tail to there, without a hole. Three things move it:

- an append for which memory has no room writes the oldest bytes out first (in order, as they are);
- ``write_out`` writes all of them out, for who needs them on disk;
- a durable tail that has passed it: what nobody needs is never written at all.

Only a durable tail drops what was not written: a recovery begins to read at the last durable tail,
and would not get past a hole behind it. Knows nothing of seqs and records; ``engine.log`` asks it
for what it asks a file for, and ``engine.spill`` decides when all of it must be in the file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nbdmirror.core.ring import Ring
from nbdmirror.ports import Buffer, File

WRITE_BYTES = 1 << 20
"""Written out at a time: large enough for one system call not to matter, small enough for the
event loop. Or half of the memory, where that is less."""
PAGE = 4096
"""Whole pages are written out where that is possible: a part of one may have to be read first."""


class SpillFile:
    """``threshold`` bytes of memory in front of the ring in ``file``, which begins at ``base``."""

    def __init__(self, file: File, base: int, ring: Ring, threshold: int) -> None:
        assert threshold >= PAGE and threshold % PAGE == 0
        self.path = file.path
        self.file = file
        self.threshold = threshold
        self.through = False
        """Nothing is kept in memory: each append goes to the file."""
        self.start = ring.head
        """Positions from here on are in memory, those before in the file."""
        self.bytes_spilled = 0
        """Written out of memory so far."""
        self._base = base
        self._ring = ring
        self._memory = memoryview(bytearray(threshold))

    @property
    def memory_bytes(self) -> int:
        """Of records that are only in memory."""
        return max(0, self._ring.head - max(self.start, self._ring.tail))

    # -- writing -----------------------------------------------------------------------------

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Appends at the head; OSError if what had to be written out could not be."""
        self.pwritev(offset, [data])

    def pwritev(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Appends the parts at the head; OSError if what had to be written out could not be."""
        position = self._ring.head
        assert offset == self._base + position % self._ring.capacity
        # Behind the head there may be padding of what went through.
        self.start = min(self.start, position)
        size = sum(map(len, parts))
        if self.through or size > self.threshold:
            self._write_to(position)
            self.file.pwritev(offset, parts)
            self.start = position + size
            return
        excess = position + size - self.start - self.threshold
        if excess > 0:
            step = max(excess, min(WRITE_BYTES, self.threshold // 2))
            self._write_to(min(position, -(-(self.start + step) // PAGE) * PAGE))
        for part in parts:
            self._put(position, memoryview(part))
            position += len(part)

    def _put(self, position: int, data: memoryview) -> None:
        at = position % self.threshold
        first = min(len(data), self.threshold - at)
        self._memory[at : at + first] = data[:first]
        if first < len(data):
            self._memory[: len(data) - first] = data[first:]

    def _write_to(self, upto: int) -> None:
        """Writes out everything before ``upto``; what a fill has skipped holds anything."""
        capacity = self._ring.capacity
        while self.start < upto:
            at, offset = self.start % self.threshold, self.start % capacity
            length = min(upto - self.start, self.threshold - at, capacity - offset)
            self.file.pwrite(self._base + offset, self._memory[at : at + length])
            self.start += length
            self.bytes_spilled += length

    def write_all(self) -> None:
        """Writes everything out, at once."""
        self._write_to(self._ring.head)

    async def write_out(self) -> None:
        """Writes out everything up to the head of now, piece by piece; OSError if it cannot be."""
        upto = self._ring.head
        while self.start < upto:
            self._write_to(min(upto, self.start + WRITE_BYTES))
            await asyncio.sleep(0)

    async def write(self, offset: int, data: Buffer) -> None:
        """As ``pwrite``."""
        self.pwrite(offset, data)

    async def sync(self) -> None:
        """Makes durable what was written out before; OSError if it cannot be."""
        await self.file.sync()

    def drop(self, position: int) -> None:
        """A durable tail is at ``position``: nothing before it is needed."""
        self.start = max(self.start, position)

    # -- reading -----------------------------------------------------------------------------

    def pread(self, offset: int, length: int) -> bytes:
        """The ring's bytes there, wherever they are."""
        beyond, rest = self._split(offset, length)
        return self.file.pread(offset, beyond) + rest if beyond else rest

    async def read(self, offset: int, length: int) -> bytes:
        """As ``pread``, without stalling the loop."""
        beyond, rest = self._split(offset, length)
        return await self.file.read(offset, beyond) + rest if beyond else rest

    def _split(self, offset: int, length: int) -> tuple[int, bytes]:
        """How much of a range is in the file, and the bytes of the rest, of this very moment."""
        ring = self._ring
        position = ring.head - (ring.head - (offset - self._base)) % ring.capacity
        beyond = min(length, max(0, self.start - position))
        at = (position + beyond) % self.threshold
        left = length - beyond
        first = min(left, self.threshold - at)
        return beyond, bytes(self._memory[at : at + first]) + bytes(self._memory[: left - first])

    def close(self) -> None:
        """Closes the file; what is in memory is gone."""
        self.file.close()
