"""``_scatter`` in plain Python: what the compiled form is held against, and stands in for it."""

from __future__ import annotations

import errno
import os
from os import pwrite

from nbdmirror.codec import batch
from nbdmirror.ports import Buffer


def write_all(fd: int, offset: int, data: Buffer) -> None:
    """Writes everything; a write that makes no progress is a full device (ENOSPC)."""
    view = memoryview(data)
    while view:
        count = pwrite(fd, view, offset)
        if count == 0:
            raise OSError(errno.ENOSPC, "the device took no more bytes")
        view = view[count:]
        offset += count


def pwrite_places(fd: int, block: Buffer, places: bytes, volume: int, /) -> None:
    """Writes the pieces of a block that are for a volume to their places (``codec.batch``)."""
    for offset, data in batch.pieces(block, places, volume):
        write_all(fd, offset, data)


def pread_cached(fd: int, length: int, offset: int, /) -> bytes:
    """As much as the page cache holds of a range, from its start; BlockingIOError if that is
    nothing, OSError where the file system cannot tell."""
    buffer = bytearray(length)
    count = os.preadv(fd, (buffer,), offset, os.RWF_NOWAIT)
    return bytes(buffer if count == length else buffer[:count])
