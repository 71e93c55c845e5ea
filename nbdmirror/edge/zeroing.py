"""Makes ranges of a file or block device read as zeros. All of it may stall: for threads."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from nbdmirror.config import MIB
from nbdmirror.edge.scatterpure import write_all

BLKGETSIZE64 = 0x80081272
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
ZEROS = bytes(MIB)

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


def size_of(fd: int, block_device: bool) -> int:
    """The length in bytes; of a block device its capacity."""
    if not block_device:
        return os.fstat(fd).st_size
    (size,) = struct.unpack("=Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))
    assert isinstance(size, int)
    return size


def write_zeros(fd: int, offset: int, length: int) -> None:
    """Writes zeros over a range; OSError if not all of them fit."""
    view = memoryview(ZEROS)
    end = offset + length
    while offset < end:
        count = min(MIB, end - offset)
        write_all(fd, offset, view[:count])
        offset += count


def clear(fd: int, block_device: bool, mode: int, offset: int, length: int) -> None:
    """Makes a range read as zeros by fallocate, or by writing zeros where that is not offered.

    fallocate serves block devices too, and unlike BLKDISCARD it promises that zeros are read and
    drops what the page cache still holds. Past the end it would do nothing, and say nothing.
    """
    if length == 0:
        return
    size = size_of(fd, block_device)
    if offset + length > size:
        raise OSError(errno.EIO, f"it ends at {size}")
    while _fallocate(fd, mode | KEEP_SIZE, offset, length) != 0:
        number = ctypes.get_errno()
        if number in UNSUPPORTED:
            write_zeros(fd, offset, length)
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
