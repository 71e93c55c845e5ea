"""An open simulated file: the operations of ``ports.File``, each with its possible faults."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from nbdmirror.codec.batch import pieces
from nbdmirror.codec.hashing import digests
from nbdmirror.ports import Buffer
from tests.sim.faults import Fault, Kind
from tests.sim.image import PAGE, SECTOR, Change
from tests.sim.inode import Inode
from tests.sim.loop import INCARNATION, WORLD, NodeDead

if TYPE_CHECKING:
    from tests.sim.disk import SimDisk

T = TypeVar("T")


class SimFile:
    """``ports.File`` over a simulated inode; belongs to the life that opened it."""

    def __init__(self, disk: SimDisk, path: str, inode: Inode, read_only: bool) -> None:
        self.path = path
        self.block_device = inode.block_device
        self._disk = disk
        self._inode = inode
        self._read_only = read_only
        self._life = INCARNATION.get()
        self._boot = disk.boots
        self._failure: OSError | None = None
        self._told = inode.refused - inode.untold
        self._open = True
        self._under_way = 0
        """Calls in threads: they go on when the file is closed, and so does its claim."""

    def size(self) -> int:
        self._check()
        return self._inode.cache.size

    def identity(self) -> str:
        self._check()
        return "" if self.block_device else str(self._inode.serial)

    def pread(self, offset: int, length: int) -> bytes:
        return self._read_now(self._admit("pread"), offset, length)

    def try_pread(self, offset: int, length: int) -> bytes | None:
        fault = self._admit("try_pread")
        miss = self._disk.timing.miss
        if miss and self._disk.random.random() < miss:
            self._disk.fired["try_pread miss"] += 1
            return None
        return self._read_now(fault, offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        fault = self._admit("read")
        early = self._read_early(offset, length) if fault is None else b""

        def work() -> bytes:
            data = self._read_now(fault, offset, length)
            return early + data[len(early) :] if early else data

        return await self._later(self._disk.timing.read, fault, work)

    def _read_early(self, offset: int, length: int) -> bytes:
        """How much the thread reads at once: what is written meanwhile it has seen in part, not at
        all, or all of it."""
        draw = self._disk.random.random()
        if draw < 0.5 or self._inode.cache.size < offset + length:
            return b""
        if draw < 0.75:
            length = _whole(SECTOR, offset, int((draw - 0.5) * 4 * length))
        return self._inode.cache.read(offset, length)

    async def hashes(self, offset: int, length: int, step: int, key: bytes) -> bytes:
        return digests(await self.read(offset, length), step, key)

    def pwrite(self, offset: int, data: Buffer) -> None:
        self._write_now(self._admit("pwrite"), offset, bytes(data))

    def pwritev(self, offset: int, parts: Sequence[Buffer]) -> None:
        self._write_now(self._admit("pwritev"), offset, b"".join(parts))

    def pwrite_places(self, block: Buffer, places: bytes, volume: int) -> None:
        for offset, data in pieces(block, places, volume):
            self.pwrite(offset, data)

    async def write(self, offset: int, data: Buffer) -> None:
        fault = self._admit("write")
        if fault is None and data and self._disk.random.random() < 0.5:
            # A kill may find it half done: between two pages, for within one the kernel looks at
            # nothing. Sectors are harder.
            length = _whole(SECTOR, offset, self._disk.random.randrange(len(data)))
            self._write_now(None, offset, bytes(data[:length]))
        # The caller's buffer is read when the time has come: it must not change meanwhile.
        await self._later(
            self._disk.timing.write, fault, lambda: self._write_now(fault, offset, bytes(data))
        )

    async def sync(self) -> None:
        self._raise_failure()
        fault = self._admit("sync")
        mark = self._inode.written
        await self._later(self._disk.timing.sync, fault, lambda: self._sync_now(fault, mark))

    async def forget(self) -> None:
        fault = self._admit("forget")

        def work() -> None:
            inode, disk = self._inode, self._disk
            if disk.lying:
                return
            if fault is not None and fault.kind is not Kind.STALL:
                inode.land_some(inode.take(inode.written), disk.random)
            inode.forget()
            self._told, inode.untold = inode.refused, False

        await self._later(self._disk.timing.sync, fault, work)

    async def forget_range(self, offset: int, length: int) -> None:
        fault = self._admit("forget_range")
        if not self._disk.lying:
            await self._later(
                self._disk.timing.read, fault, lambda: self._inode.forget_range(offset, length)
            )

    async def punch(self, offset: int, length: int) -> None:
        await self._clear("punch", offset, length, hole=True)

    async def zero(self, offset: int, length: int) -> None:
        await self._clear("zero", offset, length, hole=False)

    async def allocate(self, length: int) -> None:
        fault = self._admit("allocate")
        room = self._disk.check_room(self._inode, 0, length)
        if fault is not None and fault.kind in (Kind.ERROR, Kind.SHORT):
            room = min(room, self._disk.random.randint(0, length))
        self._fill(self._disk.random.randint(0, room))  # a kill may find it half done

        def work() -> None:
            self._fill(room)
            mark = self._inode.written
            if fault is not None and fault.kind in (Kind.ERROR, Kind.SHORT):
                raise fault.error(self.path)
            if room < length:
                raise _full(self.path)
            self._sync_now(fault, mark)

        await self._later(self._disk.timing.sync, fault, work)

    def _fill(self, length: int) -> None:
        self._inode.put(Change(0, length, None, max(self._inode.cache.size, length)))

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        self._check()
        if self.block_device:
            yield offset, length
            return
        yield from self._inode.cache.data_ranges(offset, length)
        size, end = self._inode.cache.size, offset + length
        if end > size:
            yield max(offset, size), end - max(offset, size)

    def truncate(self, length: int) -> None:
        fault = self._admit("truncate")
        if fault is not None:
            raise fault.error(self.path)
        if self.block_device or self._read_only:
            raise OSError(errno.EINVAL, "simulated: its length cannot be set", self.path)
        self._inode.put(Change(0, 0, None, length))

    def close(self) -> None:
        self._open = False

    def holds(self) -> bool:
        """Whether it is open in a node that lives, or a thread of that is not done with it."""
        living = self._life.alive and self._life is not WORLD
        return bool(self._open or self._under_way) and living and self._boot == self._disk.boots

    # What all of them share.

    def _check(self) -> None:
        life = INCARNATION.get()
        if not (life.alive and self._life.alive and self._boot == self._disk.boots):
            raise NodeDead(self._life.node)
        if not self._open:
            raise OSError(errno.EBADF, "simulated: the file is closed", self.path)

    async def _later(
        self, bounds: tuple[float, float], fault: Fault | None, work: Callable[[], T]
    ) -> T:
        """As the disk's: in a thread, to which a closed file is open until it has done."""

        def last() -> T:
            try:
                return work()
            finally:
                self._under_way -= 1

        self._under_way += 1
        return await self._disk.later(bounds, fault, last)

    def _admit(self, operation: str) -> Fault | None:
        self._check()
        return self._disk.count(operation, self.path)

    def _read_now(self, fault: Fault | None, offset: int, length: int) -> bytes:
        if length and (end := self._inode.cache.size) < offset + length:
            raise OSError(errno.EIO, f"simulated: it ends at {end}", self.path)
        data = self._inode.cache.read(offset, length)
        if fault is None or fault.kind is Kind.STALL:
            return data
        if fault.kind is not Kind.FLIP:
            raise fault.error(self.path)
        if not data:
            return data
        bit = self._disk.random.randrange(8 * length)
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        return bytes(wrong)

    def _write_now(self, fault: Fault | None, offset: int, data: bytes) -> None:
        if self._read_only:
            raise OSError(errno.EBADF, "simulated: opened for reading", self.path)
        if not data:
            return
        failure: OSError | None = None
        if fault is not None and fault.kind in (Kind.DROP, Kind.STRAY, Kind.REFUSED):
            if fault.kind is Kind.REFUSED:
                self._inode.refuse()
            if fault.kind is not Kind.STRAY:
                return
            # Within the file: the write that is met may be longer than the one that was expected.
            offset = max(0, min(offset + fault.shift, self._inode.cache.size - len(data)))
        elif fault is not None and fault.kind is not Kind.STALL:
            failure = fault.error(self.path)
            if fault.kind is not Kind.SHORT:
                raise failure
            end = offset + self._disk.random.randrange(len(data))
            data = data[: max(0, end // SECTOR * SECTOR - offset)]
        if self._disk.capacity is not None or self.block_device:
            room = self._disk.check_room(self._inode, offset, len(data))
            if room < len(data):
                failure = _full(self.path)
                data = data[:room]
        if data:
            size = max(self._inode.cache.size, offset + len(data))
            self._inode.put(Change(offset, len(data), data, size))
        if failure is not None:
            if fault is not None and fault.then is not None:
                fault.then()
                self._check()
            raise failure

    async def _clear(self, operation: str, offset: int, length: int, *, hole: bool) -> None:
        fault = self._admit(operation)

        def clear(count: int) -> None:
            size = self._inode.cache.size
            if count and offset + length > size:
                raise OSError(errno.EIO, f"simulated: it ends at {size}", self.path)
            if count:
                self._inode.put(Change(offset, count, None, size, hole))

        def work() -> None:
            if fault is not None and fault.kind is not Kind.STALL:
                raise fault.error(self.path)
            clear(length)

        if fault is None and length and self._disk.random.random() < 0.5:
            clear(_whole(PAGE, offset, self._disk.random.randrange(length)))  # as of ``write``
        await self._later(self._disk.timing.write, fault, work)

    def _sync_now(self, fault: Fault | None, mark: int) -> None:
        """The end of a sync: the first ``mark`` changes are durable, or the fault says what is."""
        self._raise_earlier()
        disk, inode = self._disk, self._inode
        if disk.lying:
            disk.fired["sync lie"] += 1
            return
        if fault is None or fault.kind is Kind.STALL:
            inode.land(mark)
            if self._told == inode.refused:
                return
            fault = Fault(Kind.ERROR)
        if fault.kind is Kind.LIE:
            return
        self._told, inode.untold = inode.refused, False
        self._failure = fault.error(self.path)
        if fault.kind is Kind.LOSE:
            lost = inode.take(mark)
            inode.apart = disk.random.random() >= 0.5
            if inode.apart:
                inode.stick(lost, disk.random)
            inode.land_some(lost, disk.random)
            if not inode.apart:  # ext4 and XFS keep the new bytes in the cache,
                inode.cache = inode.durable.copy()  # Btrfs goes back to what is on the disk
                for change in inode.unsynced:
                    inode.cache.put(change)
        raise self._failure

    def _raise_failure(self) -> None:
        self._check()
        self._raise_earlier()

    def _raise_earlier(self) -> None:
        if self._failure is not None:
            number = self._failure.errno
            raise OSError(number, "simulated: an earlier sync failed", self.path)


def _full(path: str) -> OSError:
    return OSError(errno.ENOSPC, "simulated: no space left on the disk", path)


def _whole(unit: int, offset: int, length: int) -> int:
    """So many of the bytes, but that the range ends with a whole sector or page."""
    return max(0, (offset + length) // unit * unit - offset)
