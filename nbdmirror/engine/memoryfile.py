"""A file in memory: what the log is kept in when its disk is gone (M13). Nothing in it is durable.

Only what ``engine.log`` does with its file is here; whoever syncs it must sync what stands for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nbdmirror.codec.hashing import digests
from nbdmirror.ports import Buffer


class MemoryFile:
    """``size`` bytes of zeros at first; costs what was written to."""

    block_device = False

    def __init__(self, size: int) -> None:
        self.path = "(memory)"
        self._data = bytearray(size)
        self._view = memoryview(self._data)

    def size(self) -> int:
        """The length in bytes."""
        return len(self._data)

    def identity(self) -> str:
        """None: it is gone with the process."""
        return ""

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes, within the size."""
        assert offset + length <= len(self._data)
        return bytes(self._view[offset : offset + length])

    def try_pread(self, offset: int, length: int) -> bytes:
        """As ``pread``."""
        return self.pread(offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        """As ``pread``."""
        return self.pread(offset, length)

    async def hashes(self, offset: int, length: int, step: int, key: bytes) -> bytes:
        """As ``ports.File.hashes``."""
        return digests(self.pread(offset, length), step, key)

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Writes within the size."""
        assert offset + len(data) <= len(self._data)
        self._view[offset : offset + len(data)] = data

    def pwritev(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes the parts one behind the other."""
        for part in parts:
            self.pwrite(offset, part)
            offset += len(part)

    def pwrite_places(self, block: Buffer, places: bytes, volume: int) -> None:
        """Not of a log."""
        raise AssertionError("a log in memory is written from end to end")

    async def write(self, offset: int, data: Buffer) -> None:
        """As ``pwrite``."""
        self.pwrite(offset, data)

    async def sync(self) -> None:
        """Nothing is made durable."""

    async def forget(self) -> None:
        """There is nothing else."""

    async def forget_range(self, offset: int, length: int) -> None:
        """There is nothing else."""

    async def punch(self, offset: int, length: int) -> None:
        """The range reads as zeros."""
        self.pwrite(offset, bytes(length))

    async def zero(self, offset: int, length: int) -> None:
        """The range reads as zeros."""
        self.pwrite(offset, bytes(length))

    async def allocate(self, length: int) -> None:
        """It has its size already."""
        assert length <= len(self._data)

    def data_ranges(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """All of the range."""
        return [(offset, length)]

    def truncate(self, length: int) -> None:
        """Not of a log."""
        raise AssertionError("a log in memory keeps its size")

    def close(self) -> None:
        """Nothing to close."""
