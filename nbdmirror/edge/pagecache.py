"""The page cache of a stretch of a file: let go, and brought back in single pages.

For ``files.ScatteredFile``. Both run in a thread: pages that are dirty are written out before they
are let go. Errors are left to who reads or syncs.
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
