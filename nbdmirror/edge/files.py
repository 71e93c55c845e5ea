"""Files and block devices over Linux: ``ports.Disk`` and ``ports.File``.

Owns file descriptors; calls that may stall run in ``edge.diskthreads``. Never retries a failed
write or sync, never decides what an error means: every error is an ``OSError`` with its errno.
The daemon makes one ``LinuxDisk`` per process and hands it to the engine in ``Env``.

What touches only the page cache is a plain call on the event loop; what waits for a device is
handed to a thread. A call that is cancelled while its thread runs may still take effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from mmap import PAGESIZE
from os import POSIX_FADV_DONTNEED as DONTNEED
from os import fdatasync, pread, pwrite, pwritev
from typing import Any, ParamSpec, TypeVar

from nbdmirror.codec import batch
from nbdmirror.codec.hashing import digests
from nbdmirror.edge import devices
from nbdmirror.edge.diskthreads import THREADS_MAX, DeviceThreads, DiskThreads
from nbdmirror.edge.pagecache import LARGE_BYTES, STRETCH_SHIFT, bring_back, forget, let_go
from nbdmirror.edge.scatterpure import write_all
from nbdmirror.edge.zeroing import PUNCH_HOLE, UNSUPPORTED, ZERO_RANGE, clear, size_of, write_zeros
from nbdmirror.engine.groupcommit import GroupCommit
from nbdmirror.ports import Buffer

if batch.COMPILED:
    from nbdmirror.edge._scatter import pread_cached, pwrite_places
else:
    from nbdmirror.edge.scatterpure import pread_cached, pwrite_places

P = ParamSpec("P")
T = TypeVar("T")

IOV_MAX = 1024  # parts that Linux takes in one vectored call
CLOSED_FD = (1 << 31) - 1  # no descriptor: every system call answers EBADF
FS_IOC_GETVERSION = 0x80087601
HASH_PIECE = 1 << 20
"""Read and hashed at a time: few calls, and what is hashed is still in the processor's cache."""
HASH_HERE_MAX = 64 << 10
"""As much is hashed in 50 us; to ask a thread for it takes several times as long."""


def _read_all(fd: int, offset: int, length: int) -> bytes:
    """Exactly ``length`` bytes; loops because one call may return less. EIO where the file ends
    before them: so answers a device that was pulled out, whose capacity is nothing then."""
    data = pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    done = len(data)
    while data and done < length:
        data = pread(fd, length - done, offset + done)
        parts.append(data)
        done += len(data)
    if done < length:
        raise OSError(errno.EIO, f"it ends at {offset + done}")
    return b"".join(parts)


def _hash_all(fd: int, offset: int, length: int, step: int, key: bytes) -> bytes:
    """The hashes of a range, by pieces that stay in the processor's cache."""
    size = max(step, HASH_PIECE - HASH_PIECE % step)
    return b"".join(
        digests(_read_all(fd, at, min(size, offset + length - at)), step, key)
        for at in range(offset, offset + length, size)
    )


class LinuxFile:
    """One open file or block device; one descriptor for its whole life, opened before any write.

    That descriptor is what the kernel reports a failed writeback to, once: the failure is kept
    here, and every later ``sync`` raises it again (O16).
    """

    __slots__ = (
        "_closed",
        "_failure",
        "_fd",
        "_lock",
        "_nowait",
        "_open_fd",
        "_pending",
        "_sync_lock",
        "_threads",
        "block_device",
        "path",
    )

    def __init__(self, threads: DeviceThreads, path: str, fd: int, *, block_device: bool) -> None:
        self.path = path
        self.block_device = block_device
        self._threads = threads
        self._fd = fd
        self._open_fd = fd  # what is left to close
        self._nowait = True
        self._failure: OSError | None = None
        self._closed = False
        self._pending = 0  # calls in threads; the descriptor is closed after the last one
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()

    def size(self) -> int:
        """The length in bytes; of a block device its capacity."""
        return size_of(self._fd, self.block_device)

    def identity(self) -> str:
        """Of a file: its file system, inode and the inode's generation, unless its file system
        keeps none; of a device see ``edge.devices``."""
        if self.block_device:
            return devices.identity(os.fstat(self._fd).st_rdev)
        try:
            (generation,) = struct.unpack("=Q", fcntl.ioctl(self._fd, FS_IOC_GETVERSION, bytes(8)))
        except OSError:
            return ""
        return f"{os.fstatvfs(self._fd).f_fsid:x}:{os.fstat(self._fd).st_ino}:{generation:x}"

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; may block."""
        return _read_all(self._fd, offset, length)

    def try_pread(self, offset: int, length: int) -> bytes | None:
        """As ``pread`` if the page cache holds all of it, else ``None`` at once.

        Always ``None`` where the filesystem does not offer RWF_NOWAIT: it might stall the loop.
        """
        if not self._nowait:
            return None
        try:
            data = pread_cached(self._fd, length, offset)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._nowait = False
            return None
        return data if len(data) == length else None

    async def read(self, offset: int, length: int) -> bytes:
        """As ``pread``, in a thread."""
        return await self._offload(self._threads.io, _read_all, self._fd, offset, length)

    async def hashes(self, offset: int, length: int, step: int, key: bytes) -> bytes:
        """``digests`` of the range, in bounded memory; in a thread unless short and cached."""
        data = self.try_pread(offset, length) if length <= HASH_HERE_MAX else None
        if data is not None:
            await asyncio.sleep(0)  # between many of them others have their turn
            return digests(data, step, key)
        return await self._offload(self._threads.io, _hash_all, self._fd, offset, length, step, key)

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Writes all of ``data`` into the page cache; OSError if not all of it fits."""
        count = pwrite(self._fd, data, offset)
        if count != len(data):
            write_all(self._fd, offset + count, memoryview(data)[count:])

    def pwritev(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes the parts one behind the other, IOV_MAX of them in a system call."""
        if len(parts) > IOV_MAX:
            for first in range(0, len(parts), IOV_MAX):
                batch = parts[first : first + IOV_MAX]
                self.pwritev(offset, batch)
                offset += sum(map(len, batch))
            return
        count = pwritev(self._fd, parts, offset)
        if count != sum(map(len, parts)):
            write_all(self._fd, offset + count, memoryview(b"".join(parts))[count:])

    def pwrite_places(self, block: Buffer, places: bytes, volume: int) -> None:
        """Writes pieces of ``block`` to their places (``codec.batch``), one after the other."""
        pwrite_places(self._fd, block, places, volume)

    async def write(self, offset: int, data: Buffer) -> None:
        """As ``pwrite``, in a thread; ``data`` must not change until it returns."""
        await self._offload(self._threads.io, write_all, self._fd, offset, data)

    async def sync(self) -> None:
        """fdatasync in a thread; a failure is final for this object (O16)."""
        self._check()
        await self._offload(self._threads.sync, self._sync_now, self._fd)

    async def forget(self) -> None:
        """See ``ports.File``; not a ``sync``: what fails here is not this opening's (O16)."""
        await self._offload(self._threads.sync, forget, self._fd)

    async def forget_range(self, offset: int, length: int) -> None:
        """See ``ports.File``. The kernel keeps a page that is only in part in the range, unless the
        file ends there; a file may be longer than its volume."""
        pool, length = self._threads.io, length + -(offset + length) % PAGESIZE
        await self._offload(pool, os.posix_fadvise, self._fd, offset, length, DONTNEED)

    async def punch(self, offset: int, length: int) -> None:
        """Zeros, with the space given back where the filesystem or device can."""
        await self._clear(PUNCH_HOLE, offset, length)

    async def zero(self, offset: int, length: int) -> None:
        """Zeros, with the space kept where the filesystem or device can."""
        await self._clear(ZERO_RANGE, offset, length)

    async def allocate(self, length: int) -> None:
        """Writes zeros over [0, length) and syncs (O18: fallocate alone can lose data later).

        After ENOSPC the part that fitted is still there; the caller removes the file.
        """
        await self._offload(self._threads.io, self._allocate_now, self._fd, length)

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """What SEEK_DATA and SEEK_HOLE tell; all of it where they are not offered, or fail."""
        size, end = self.size(), offset + length
        while offset < min(end, size):
            try:
                start = os.lseek(self._fd, offset, os.SEEK_DATA)
                stop = min(os.lseek(self._fd, start, os.SEEK_HOLE), end, size)
            except OSError as error:
                if error.errno != errno.ENXIO:  # which says: nothing but a hole up to the end
                    yield offset, end - offset
                    return
                start = stop = size
            if start < min(stop, end, size):  # else it was punched in between
                yield start, stop - start
            offset = stop
        if end > max(offset, size):
            yield max(offset, size), end - max(offset, size)

    def truncate(self, length: int) -> None:
        """Sets the length; a block device refuses with EINVAL."""
        os.ftruncate(self._fd, length)

    def close(self) -> None:
        """Closes once no thread uses the descriptor any more; later calls raise EBADF."""
        with self._lock:
            self._fd = CLOSED_FD
            self._closed = True
            self._close_unused()

    # Threads.

    async def _offload(
        self, pool: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await asyncio.wrap_future(self._submit(pool, work, *args, **kwargs))

    def _submit(
        self, pool: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        with self._lock:
            self._pending += 1
        future = pool.submit(work, *args, **kwargs)
        future.add_done_callback(self._leave)
        return future

    def _leave(self, _future: Future[T]) -> None:
        """Runs in the thread (or in the loop, for a call cancelled before it started)."""
        with self._lock:
            self._pending -= 1
            self._close_unused()

    def _close_unused(self) -> None:
        if self._closed and self._pending == 0 and self._open_fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._open_fd)
            self._open_fd = -1

    async def _clear(self, mode: int, offset: int, length: int) -> None:
        pool = self._threads.io
        await self._offload(pool, clear, self._fd, self.block_device, mode, offset, length)

    def _allocate_now(self, fd: int, length: int) -> None:
        write_zeros(fd, 0, length)
        self._sync_now(fd)

    def _sync_now(self, fd: int) -> None:
        """One at a time: the kernel tells a failure once, and only the first to ask."""
        with self._sync_lock:
            self._check()
            try:
                fdatasync(fd)
            except OSError as error:
                self._failure = error
                raise OSError(error.errno, error.strerror, self.path) from None

    def _check(self) -> None:
        if self._failure is not None:
            reason = f"an earlier sync failed: {self._failure.strerror}"
            raise OSError(self._failure.errno, reason, self.path)


class ScatteredFile(LinuxFile):
    """A regular file that takes small writes anywhere, as a facet does.

    Where readahead or a large write has left large folios in the page cache, ext4 walks every
    buffer of the folio for each 4 KiB written: 12 to 28 us measured, against 2 to 4 us with single
    pages. So what is cached of a stretch from before its first write is let go once, and this
    descriptor reads without readahead, which would bring large folios back. A stretch that was
    cached comes back as a whole with the first read there: page by page, readers would wait for the
    disk as often as it has pages."""

    __slots__ = ("_cache_work", "_missed", "_touched")

    def __init__(self, threads: DeviceThreads, path: str, fd: int, *, block_device: bool) -> None:
        super().__init__(threads, path, fd, block_device=block_device)
        self._touched: set[int] = set()
        self._missed: set[int] = set()
        """Stretches that were cached, and were let go."""
        self._cache_work: dict[Future[Any], None] = {}
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def pwrite(self, offset: int, data: Buffer) -> None:
        """As ``LinuxFile.pwrite``."""
        if len(data) < LARGE_BYTES and offset >> STRETCH_SHIFT not in self._touched:
            self._let_go(offset >> STRETCH_SHIFT)
        count = pwrite(self._fd, data, offset)
        if count != len(data):
            write_all(self._fd, offset + count, memoryview(data)[count:])

    def pwrite_places(self, block: Buffer, places: bytes, volume: int) -> None:
        """As ``LinuxFile.pwrite_places``."""
        stretches = batch.stretches(places, 1 << STRETCH_SHIFT)
        if not self._touched.issuperset(stretches):
            for stretch in set(stretches) - self._touched:
                self._let_go(stretch)
        pwrite_places(self._fd, block, places, volume)

    def try_pread(self, offset: int, length: int) -> bytes | None:
        """As ``LinuxFile.try_pread``."""
        data = super().try_pread(offset, length)
        if data is None and self._missed and (stretch := offset >> STRETCH_SHIFT) in self._missed:
            self._missed.remove(stretch)
            self._cache(bring_back, self._fd, stretch, self._in_use)
        return data

    def _let_go(self, stretch: int) -> None:
        self._touched.add(stretch)
        self._cache(self._let_go_now, self._fd, stretch)

    def close(self) -> None:
        """As ``LinuxFile.close``. What waits for the thread is not worth a stop that takes long, or
        another opening that finds the file in use."""
        super().close()
        for work in list(self._cache_work):
            work.cancel()

    def _cache(self, work: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
        future = self._submit(self._threads.cache, work, *args, **kwargs)
        self._cache_work[future] = None
        future.add_done_callback(lambda done: self._cache_work.pop(done, None))

    def _let_go_now(self, fd: int, stretch: int) -> None:
        if self._in_use() and let_go(fd, stretch):
            self._missed.add(stretch)

    def _in_use(self) -> bool:
        return not self._closed


class LinuxDisk:
    """``ports.Disk`` over this host's file systems; ``threads_max`` as for ``DiskThreads``."""

    def __init__(self, threads_max: int = THREADS_MAX) -> None:
        self.threads = DiskThreads(threads_max)
        self._directories: dict[str, GroupCommit] = {}

    def exists(self, path: str) -> bool:
        """Whether there is anything of that name."""
        return os.path.lexists(path)

    def open(
        self, path: str, *, create: bool = False, read_only: bool = False, scattered: bool = False
    ) -> LinuxFile:
        """Opens a regular file or block device (EINVAL for anything else).

        A block device is claimed, against mounts and other writers; so is a file, against every
        other opening for writing by this program (BlockingIOError).
        """
        assert not (create and read_only), "a new file is for writing"
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        elif not read_only and stat.S_ISBLK(os.stat(path).st_mode):
            flags |= os.O_EXCL
        try:
            fd = os.open(path, flags | os.O_NONBLOCK, 0o600)  # a FIFO must not stall us
        except OSError as error:
            if error.errno == errno.EBUSY and flags & os.O_EXCL:
                raise BlockingIOError(errno.EBUSY, "mounted, or in use", path) from None
            raise
        opened = os.fstat(fd)
        mode = opened.st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(fd)
            raise OSError(errno.EINVAL, "neither a regular file nor a block device", path)
        if not read_only and stat.S_ISREG(mode):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise BlockingIOError(errno.EAGAIN, "in use by another node", path) from None
        if scattered and stat.S_ISREG(mode):
            return ScatteredFile(self.threads.of(opened), path, fd, block_device=False)
        return LinuxFile(self.threads.of(opened), path, fd, block_device=stat.S_ISBLK(mode))

    def list(self, directory: str) -> list[str]:
        """The names in a directory, sorted."""
        return sorted(os.listdir(directory))

    def make_directory(self, path: str) -> None:
        """Makes a directory and its parents, mode 0700 and durable."""
        parent = os.path.dirname(path.rstrip("/")) or "/"
        if not os.path.isdir(parent):
            self.make_directory(parent)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
        else:
            _sync_directory(parent)

    def rename(self, old: str, new: str) -> None:
        """Renames, replacing what is there; durable after ``sync_directory``."""
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        """Removes a name; durable after ``sync_directory``."""
        os.unlink(path)

    async def remove(self, path: str) -> None:
        """``unlink`` in a thread: freeing a file of many extents takes tens of milliseconds."""
        await asyncio.wrap_future(self.threads.names.io.submit(os.unlink, path))

    async def sync_directory(self, path: str) -> None:
        """fsync of the directory, in a thread; one for all who ask while another one runs."""
        if path not in self._directories:
            self._directories[path] = GroupCommit(partial(self._sync_directory, path))
        await self._directories[path]()

    async def _sync_directory(self, path: str) -> None:
        await asyncio.wrap_future(self.threads.names.sync.submit(_sync_directory, path))

    def close(self) -> None:
        """Lets the threads end; waits for none of them."""
        self.threads.close()


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
