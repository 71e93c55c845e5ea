"""The page cache of a file: let go, and brought back in single pages.

For ``edge.files``. All of it runs in a thread: pages that are dirty are written out before they are
let go. Errors are left to who reads or syncs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from nbdmirror.codec import batch

if batch.COMPILED:
    from nbdmirror.edge._scatter import pread_cached
else:
    from nbdmirror.edge.scatterpure import pread_cached

LARGE_BYTES = 64 << 10
"""Writes from here on make large folios anyway, and cost less where pages are cached."""
STRETCH_SHIFT = 22
"""A stretch is one of 4 MiB; they are counted from the file's beginning."""
PROBES = 16
PIECE_BYTES = 256 << 10


def forget(fd: int) -> None:
    """Writes out what can be, and drops all that is cached.

    What a failed writeback leaves in the cache is marked clean, so it is nowhere else; and ext4
    takes its blocks for written: what is written over it there reaches the disk with the next sync,
    but in extents that still read as zeros once the cache is gone (seen with a thin disk that was
    full). Read anew, they are what they are (O16)."""
    with contextlib.suppress(OSError):
        os.fdatasync(fd)
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def let_go(fd: int, stretch: int) -> bool:
    """Drops what is cached of a stretch; whether that was most of it."""
    offset, length = stretch << STRETCH_SHIFT, 1 << STRETCH_SHIFT
    with contextlib.suppress(OSError):
        places = range(offset, offset + length, length // PROBES)
        cached = sum(_is_cached(fd, at) for at in places)
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        return 2 * cached > PROBES
    return False


def bring_back(fd: int, stretch: int, wanted: Callable[[], bool]) -> None:
    """Reads a stretch, as long as that is ``wanted``; ``fd`` reads without readahead, so single
    pages come."""
    with contextlib.suppress(OSError):
        for at in range(stretch << STRETCH_SHIFT, stretch + 1 << STRETCH_SHIFT, PIECE_BYTES):
            if wanted():
                os.pread(fd, PIECE_BYTES, at)


def _is_cached(fd: int, offset: int) -> bool:
    try:
        return bool(pread_cached(fd, 1, offset))
    except BlockingIOError:
        return False
