"""A host's disk with a page cache, a durable image, and every way to fail between the two.

Fault model. A write is in the cache at once and durable after a ``sync`` that began later has
returned. At a power cut every sector (512 bytes) of every unsynced write lands or does not, each
for itself, in the order of the writes, so versions in between are possible; of the file's length
some prefix of the changes lands. A write may also be lost, or land elsewhere in the file, though
the disk said that it was made (``faults.Kind``): whoever reads it back later finds what was there
before, as if the cache had dropped the page meanwhile.

Names made, renamed or removed are durable after ``sync_directory``; until then each lands or does
not. A killed process loses nothing of this: the cache belongs to the kernel. Faults come from
``SimDisk.faults``, asked once per operation, and are counted in ``SimDisk.fired``: a sweep that
never fired a fault has not tested it.

Handles of a host that lost power, or of a node that was killed, raise NodeDead.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.sim.faults import LOOKS, READS, Fault, Injector, Kind, Timing
from tests.sim.file import SimFile
from tests.sim.image import Change
from tests.sim.inode import Inode
from tests.sim.loop import INCARNATION, NodeDead, SimLoop

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class NameChange:
    """Names of one directory that become durable together: a creation, renaming or removal."""

    directory: str
    names: dict[str, Inode | None]


class SimDisk:
    """``ports.Disk`` of one host; outlives its nodes' lives.

    ``capacity`` (bytes, None: endless) is what the files' pages may take together. With ``lying``
    every sync and sync_directory succeeds and makes nothing durable.
    """

    def __init__(
        self,
        node: str,
        seed: object,
        *,
        timing: Timing | None = None,
        capacity: int | None = None,
        lying: bool = False,
    ) -> None:
        self.node = node
        self.random = random.Random(f"{seed}:disk:{node}")
        self.timing = timing or Timing()
        self.capacity = capacity
        self.lying = lying
        self.boots = 1
        self.faults: Injector | None = None
        self.broken: set[str] = set()
        """Files on disks of its that are lost: whatever is done to them fails."""
        self.fired: Counter[str] = Counter()
        self.operations = 0
        self.reads = 0
        self._stalled_until = 0.0
        self._serial = 0
        self._directories = {"/": None}
        self._names: dict[str, Inode] = {}
        self._durable_names: dict[str, Inode] = {}
        self._unsynced_names: list[NameChange] = []
        self.exclusive = False
        """A file that is open for writing cannot be opened so once more, as it is on a host."""
        self._writers: dict[int, SimFile] = {}
        """Who opened a file for writing last, by inode."""

    # What the world does to it.

    def power_cut(self, rng: random.Random | None = None) -> None:
        """The host loses power and boots: see the module for what is left. Handles are dead."""
        rng = rng or self.random
        self.boots += 1
        self.fired["power cut"] += 1
        for change in self._unsynced_names:
            if rng.random() < 0.5:
                _rename_all(self._durable_names, change)
            else:
                self.fired["name lost"] += 1
        self._unsynced_names = []
        self._names = dict(self._durable_names)
        for inode in self._inodes():
            self.fired["write unsynced at power cut"] += len(inode.unsynced)
            inode.cut(rng)

    def clone(self, seed: object) -> SimDisk:
        """A copy of the disk as it is now, cache and all: cut its power, recover on it, check."""
        other = SimDisk(self.node, seed, timing=self.timing, capacity=self.capacity)
        other.lying = self.lying
        other.boots = self.boots
        other.broken = set(self.broken)
        other._serial = self._serial
        other._directories = dict(self._directories)
        inodes = self._inodes()
        copies = {inode.serial: inode.copy() for inode in inodes}
        other._names = {path: copies[inode.serial] for path, inode in self._names.items()}
        other._durable_names = {
            path: copies[inode.serial] for path, inode in self._durable_names.items()
        }
        other._unsynced_names = [
            NameChange(
                change.directory,
                {path: inode and copies[inode.serial] for path, inode in change.names.items()},
            )
            for change in self._unsynced_names
        ]
        return other

    def flip(self, path: str, offset: int, mask: int = 1) -> None:
        """Rots a byte at rest, in the cache and on the disk."""
        inode = self._names[path]
        for image in (inode.cache, inode.durable):
            image.write(offset, bytes((image.read(offset, 1)[0] ^ mask,)))
        self.fired["rot"] += 1

    def scribble(self, path: str, offset: int, data: bytes) -> None:
        """Somebody else of the same host writes into a file, and does not sync it."""
        inode = self._names[path]
        size = max(inode.cache.size, offset + len(data))
        inode.put(Change(offset, len(data), data, size))

    def stall(self, seconds: float) -> None:
        """No awaited operation ends before that many seconds from now are over."""
        self._stalled_until = max(self._stalled_until, _loop().time() + seconds)
        self.fired["disk stall"] += 1

    def add_directory(self, path: str) -> None:
        """Where a disk is mounted; its name is durable."""
        self._directories[path] = None

    def add_block_device(self, path: str, size: int) -> None:
        """A device of fixed size; its name is durable and it is full of zeros."""
        self._directories[_parent(path)] = None
        inode = self._new_inode()
        inode.block_device = True
        inode.cache.resize(size)
        inode.durable.resize(size)
        self._names[path] = self._durable_names[path] = inode

    def content(self, path: str) -> bytes:
        """What a reader would see now: for oracles."""
        image = self._names[path].cache
        return image.read(0, image.size)

    def durable_content(self, path: str) -> bytes:
        """What is safe of a file, whatever its name is: for oracles."""
        image = self._names[path].durable
        return image.read(0, image.size)

    # ports.Disk

    def exists(self, path: str) -> bool:
        INCARNATION.get().check()
        return path in self._names or path in self._directories

    def open(
        self, path: str, *, create: bool = False, read_only: bool = False, scattered: bool = False
    ) -> SimFile:
        INCARNATION.get().check()
        assert os.path.isabs(path) and not (create and read_only)
        if create:
            if self.exists(path):
                raise FileExistsError(errno.EEXIST, "simulated: the file exists", path)
            if _parent(path) not in self._directories:
                raise _missing(path)
            self._admit_names("create", path)
            self._change_names(_parent(path), {path: self._new_inode()})
        if path in self._directories:
            raise OSError(errno.EISDIR, "simulated: a directory", path)
        if path not in self._names:
            raise _missing(path)
        if not create:
            self._admit_names("open", path)
        inode = self._names[path]
        if self.exclusive and not read_only:
            self._claim(inode, path)
        file = SimFile(self, path, inode, read_only)
        if not read_only:
            self._writers[inode.serial] = file
        return file

    def _claim(self, inode: Inode, path: str) -> None:
        """As every opening for writing does against all others."""
        holder = self._writers.get(inode.serial)
        if holder is not None and holder.holds():
            number = errno.EBUSY if inode.block_device else errno.EAGAIN
            raise BlockingIOError(number, "simulated: in use by another node", path)

    def list(self, directory: str) -> list[str]:
        INCARNATION.get().check()
        if directory not in self._directories:
            raise _missing(directory)
        self._admit_names("list", directory)
        paths = [*self._names, *self._directories]
        return sorted(
            os.path.basename(path) for path in paths if path != "/" and _parent(path) == directory
        )

    def make_directory(self, path: str) -> None:
        INCARNATION.get().check()
        if path not in self._directories and path not in self._names:
            self._admit_names("make_directory", path)
        while path not in self._directories:
            if path in self._names:
                raise FileExistsError(errno.EEXIST, "simulated: a file of that name", path)
            self._directories[path] = None
            path = _parent(path)

    def rename(self, old: str, new: str) -> None:
        INCARNATION.get().check()
        assert _parent(old) == _parent(new), "files are renamed within their directory"
        if old not in self._names:
            raise _missing(old)
        self._admit_names("rename", old)
        if old != new:
            self._change_names(_parent(old), {old: None, new: self._names[old]})

    def unlink(self, path: str) -> None:
        INCARNATION.get().check()
        if path not in self._names:
            raise _missing(path)
        self._admit_names("unlink", path)
        self._change_names(_parent(path), {path: None})

    async def remove(self, path: str) -> None:
        INCARNATION.get().check()
        await self.later((0.0, 0.01), None, lambda: self.unlink(path))

    async def sync_directory(self, path: str) -> None:
        INCARNATION.get().check()
        if path not in self._directories:
            raise _missing(path)
        fault = self.admit("sync_directory", path)
        changes = [change for change in self._unsynced_names if change.directory == path]

        def work() -> None:
            if fault is not None and fault.kind is Kind.ERROR:
                raise fault.error(path)
            if self.lying or (fault is not None and fault.kind is Kind.LIE):
                self.fired["sync_directory lie"] += self.lying
                return
            for change in changes:
                if change in self._unsynced_names:
                    _rename_all(self._durable_names, change)
                    self._unsynced_names.remove(change)

        await self.later(self.timing.sync, fault, work)

    def shows_lost(self, path: str) -> bool:
        """Whether the cache goes on to show what a failed sync of that file lost."""
        return self._names[path].apart

    # For SimFile.

    def admit(self, operation: str, path: str) -> Fault | None:
        """Counts an operation of a living node and asks for its fault."""
        INCARNATION.get().check()
        return self.count(operation, path)

    def count(self, operation: str, path: str) -> Fault | None:
        """As ``admit``, once it is known that the node lives; NodeDead if the asking killed it."""
        if operation in (*READS, *LOOKS):
            self.reads += 1
            nth = self.reads
        else:
            self.operations += 1
            nth = self.operations
        boots = self.boots
        fault = self._fault(operation, path, nth)
        INCARNATION.get().check()
        if self.boots != boots:
            raise NodeDead(self.node)
        if fault is not None:
            assert fault.suits(operation), f"{operation} cannot fail by {fault.kind}"
            self.fired[f"{operation} {fault.label()}"] += 1
        return fault

    def _fault(self, operation: str, path: str, nth: int) -> Fault | None:
        if path in self.broken:
            return Fault(Kind.ERROR)
        return None if self.faults is None else self.faults(operation, path, nth)

    async def later(
        self, bounds: tuple[float, float], fault: Fault | None, work: Callable[[], T]
    ) -> T:
        """Does the work when a drawn time is over; also if the caller is cancelled meanwhile."""
        loop = _loop()
        delay = bounds[0] + (bounds[1] - bounds[0]) * self.random.random()
        if fault is not None:
            delay += fault.seconds
        if self._stalled_until:
            delay = max(delay, self._stalled_until - loop.time())
        future: asyncio.Future[T] = loop.create_future()
        loop.call_later(delay, _finish, future, work)
        return await future

    def check_room(self, inode: Inode, offset: int, length: int) -> int:
        """How many of the bytes fit on the disk."""
        if inode.block_device:
            return max(0, min(length, inode.cache.size - offset))
        if self.capacity is None:
            return length
        free = self.capacity - sum(other.cache.allocated() for other in self._names.values())
        return inode.cache.fitting(offset, length, free)

    def _inodes(self) -> Sequence[Inode]:
        found = {inode.serial: inode for inode in self._durable_names.values()}
        found.update((inode.serial, inode) for inode in self._names.values())
        for change in self._unsynced_names:
            found.update((inode.serial, inode) for inode in change.names.values() if inode)
        return [found[serial] for serial in sorted(found)]

    def _new_inode(self) -> Inode:
        self._serial += 1
        return Inode(self._serial)

    def _admit_names(self, operation: str, path: str) -> None:
        fault = self.admit(operation, path)
        if fault is not None:
            raise fault.error(path)

    def _change_names(self, directory: str, names: dict[str, Inode | None]) -> None:
        change = NameChange(directory, names)
        _rename_all(self._names, change)
        self._unsynced_names.append(change)


def _finish(future: asyncio.Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except OSError as error:
        if not future.done():
            future.set_exception(error)
    else:
        if not future.done():
            future.set_result(result)


def _loop() -> SimLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimLoop), "the simulated disk lives in simulated time"
    return loop


def _rename_all(names: dict[str, Inode], change: NameChange) -> None:
    for path, inode in change.names.items():
        if inode is None:
            names.pop(path, None)
        else:
            names[path] = inode


def _parent(path: str) -> str:
    return os.path.dirname(path.rstrip("/")) or "/"


def _missing(path: str) -> OSError:
    return FileNotFoundError(errno.ENOENT, "simulated: no such file or directory", path)
