"""A local facet: one copy of a volume's data in a file or on a block device of this host.

Owns the file and the three states of M6; knows nothing of logs and remotes. An I/O error that is
final for the file marks the facet failed; what follows from that is the group's decision.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from enum import Enum
from typing import Any

from nbdmirror.codec.record import MARK, NO_HOLE, ZERO, Record
from nbdmirror.errors import ConfigError, DiskFailed, StateError
from nbdmirror.ports import Buffer, Disk, File


class FacetState(Enum):
    """Whether a copy may be trusted (M6); only the first is read."""

    SYNCHRONISED = "synchronised"
    BEING_SYNCHRONISED = "being-synchronised"
    NOT_SYNCHRONISED = "not-synchronised"


class LocalFacet:
    """An open facet; offsets and lengths in bytes, checked by the caller."""

    def __init__(self, file: File | None, path: str, size: int, state: FacetState) -> None:
        """``file`` is None for one that cannot be opened; its state must say so."""
        self.path = path
        self.size = size
        self.state = state
        self.errors = 0
        self.read_errors = 0
        """Reads that failed since it was opened."""
        self.failed: DiskFailed | None = None
        self.failures = 0
        """How often it failed for good."""
        self.lost_seq = 0
        """It may have lost any record after this one when it last did."""
        self.unnoted = False
        """It failed, and that is not durable yet: no write may be acknowledged (M12)."""
        self.writable = state is FacetState.SYNCHRONISED
        """Whether it takes every write: in service, or being synchronised."""
        self.kept_seq: int | None = None
        """Out of service: what it lacks is in the log after this seq; ``None``: nothing of the
        log is needed for it."""
        self.written_seq = 0
        """The last record that was applied."""
        self.synced_seq = 0
        """Every record up to here is durable in this facet (O5)."""
        self.pending: dict[int, None] = {}
        """Records being applied off the loop: a sync does not cover them."""
        self._beside = self._beside_synced = 0
        """How often something was written beside the log, and how often that a sync covers."""
        self._streams = 0
        """Of records, that there were: a sync says nothing of one that began after it."""
        self._under_way: dict[asyncio.Task[None], None] = {}
        """What threads are at: ranges that will read otherwise."""
        self.outstanding = 0
        """Reads that wait for the disk."""
        self.next_offset = -1
        """Where the last read ended: a sequential stream goes on here."""
        self._file = file
        if file is not None:
            self.attach(file)

    def attach(self, file: File) -> None:
        """Goes on with this open file; what failed before was another one's."""
        self._file = file
        self.unnoted = False
        self._pwrite = file.pwrite
        self.try_pread = file.try_pread
        self.failed = None
        self.read_errors = 0

    @property
    def file(self) -> File:
        """The open file; only of a facet that is written to or read."""
        assert self._file is not None, f"the facet {self.path} is not open"
        return self._file

    @property
    def is_open(self) -> bool:
        """Whether its file is open."""
        return self._file is not None

    @classmethod
    def open(cls, disk: Disk, path: str, size: int, state: FacetState) -> LocalFacet:
        """Opens an existing file or device that must hold ``size`` bytes; StateError if not."""
        return cls(open_facet(disk, path, size), path, size, state)

    @property
    def in_service(self) -> bool:
        """Whether it takes writes and serves reads."""
        return self.state is FacetState.SYNCHRONISED and self.failed is None

    @property
    def stint(self) -> tuple[File | None, int]:
        """Another one each time that it has left service and come back."""
        return self._file, self.failures

    @property
    def dirty(self) -> bool:
        """Whether it takes writes, and a sync has not covered all of them."""
        return self.writable and (self.written_seq > self.synced_seq or bool(self.pending))

    @property
    def unsynced(self) -> bool:
        """As ``dirty``, and what a copy, a restore or a mend wrote counts too: no log redoes that,
        and whoever would have synced it may be gone."""
        return self.dirty or (self.writable and self._beside > self._beside_synced)

    def leave(self) -> None:
        """Takes no more writes; from this step on the log is kept for what it lacks."""
        if self.writable:
            self.writable = False
            self.kept_seq = self.synced_seq

    def restart(self, seq: int) -> None:
        """All that was written is durable, and the records that follow are counted from ``seq``,
        though that may be less than what they were."""
        self.written_seq = self.synced_seq = seq - 1
        self._streams += 1

    def fail(self, what: str, error: OSError) -> DiskFailed:
        """Takes the facet out for good (O16); returns what to raise or report."""
        self.errors += 1
        if self.failed is None:
            self.failed = DiskFailed(
                f"{what} of facet {self.path} failed: {error.strerror or error}",
                number=error.errno or 5,
                hint="replace its disk, then restart the node",
            )
            self.unnoted = self.state is not FacetState.NOT_SYNCHRONISED
            self.failures += 1
            self.lost_seq = self.synced_seq
        self.leave()
        return self.failed

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes of a range; OSError if the disk cannot give them."""
        data = self.try_pread(offset, length)
        if data is None:
            self.outstanding += 1
            try:
                data = await self.file.read(offset, length)
            finally:
                self.outstanding -= 1
        self.next_offset = offset + length
        return data

    async def clear(self, seq: int, offset: int, length: int, *, keep_space: bool) -> None:
        """Record ``seq``: the range reads as zeros; gives space back unless ``keep_space``."""
        self.pending[seq] = None
        try:
            if keep_space:
                await self._off_loop(self.file.zero(offset, length))
            else:
                await self.punch(offset, length)
        finally:
            self.written_seq = max(self.written_seq, seq)
            del self.pending[seq]

    async def punch(self, offset: int, length: int) -> None:
        """The range reads as zeros and gives its space back; OSError if the disk refuses."""
        await self._off_loop(self.file.punch(offset, length))

    async def copy(self, offset: int, data: Buffer) -> None:
        """Writes what another facet holds, in a thread; OSError if the disk refuses. Who is
        cancelled waits for it: what is written there next must not be under it (O13, F1)."""
        await self._off_loop(self.file.write(offset, data))

    async def _off_loop(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._under_way[task] = None
        task.add_done_callback(self._landed)
        await to_the_end(task)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._under_way.pop(task, None)
        self.changed_beside()  # not sooner: a sync that began before does not cover it

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Writes beside the log; OSError if the disk refuses."""
        self.changed_beside()
        self._pwrite(offset, data)

    def changed_beside(self) -> None:
        """Something was written beside the log, perhaps by somebody else."""
        self._beside += 1

    async def forget(self) -> None:
        """What is read from now on is what the disk has, whatever a failed sync left in the page
        cache, and what is written gets there (O16). Who calls it has what was promised elsewhere,
        or knows that it lacks it."""
        await self.file.forget()

    async def forget_range(self, offset: int, length: int) -> None:
        """The same for a range that the caller has read, and writes again."""
        await self.file.forget_range(offset, length)

    def write(self, seq: int, offset: int, payload: Buffer) -> None:
        """Carries the data of record ``seq`` into the facet; OSError if the disk refuses."""
        self._pwrite(offset, payload)
        if seq > self.written_seq:
            self.written_seq = seq

    def write_places(self, seq: int, block: Buffer, places: bytes, volume: int) -> None:
        """Carries records up to ``seq`` into the facet (``ports.File.pwrite_places``)."""
        self.file.pwrite_places(block, places, volume)
        if seq > self.written_seq:
            self.written_seq = seq

    async def apply(self, record: Record) -> None:
        """Carries a log record into the facet; OSError if the disk refuses."""
        if record.kind == MARK:
            self.written_seq = max(self.written_seq, record.seq)
        elif record.payload is not None:
            self.write(record.seq, record.offset, record.payload)
        else:
            keep_space = record.kind == ZERO and bool(record.flags & NO_HOLE)
            await self.clear(record.seq, record.offset, record.length, keep_space=keep_space)

    def floor(self, applied_seq: int) -> int:
        """The log up to here is not needed for this facet, all up to ``applied_seq`` being in."""
        if not self.writable:
            return applied_seq if self.kept_seq is None else self.kept_seq
        return self.synced_seq if self.dirty else applied_seq

    async def sync(self) -> None:
        """Makes durable what was written before; raises DiskFailed and fails the facet (O16)."""
        if self.failed is not None:
            raise self.failed
        upto = min([self.written_seq, *(seq - 1 for seq in self.pending)])
        file, stream, beside = self._file, self._streams, self._beside
        if file is None:
            # It left while its turn was waited for, after the others'.
            raise DiskFailed(f"sync of facet {self.path} failed: it was closed")
        try:
            await file.sync()
        except OSError as error:
            if file is self._file:
                raise self.fail("sync", error) from error
            raise DiskFailed(f"sync of facet {self.path} failed: it was closed") from error
        if self.failed is not None:
            raise self.failed  # a write that came beside: nobody is to trust it for this sync
        if file is self._file and stream == self._streams:
            self.synced_seq = max(self.synced_seq, upto)
            self._beside_synced = max(self._beside_synced, beside)

    def close(self) -> None:
        """Closes the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None


async def make_facet(disk: Disk, path: str, size: int, *, grow: bool) -> bool:
    """A facet's file, durable under its name and of ``size`` bytes at least; returns whether it
    was made. One that holds something is made larger only with ``grow``. ConfigError if it is a
    smaller device; OSError."""
    created = not disk.exists(path)
    file = disk.open(path, create=created)
    try:
        if file.size() < size and (grow or not file.size()):
            if file.block_device:
                raise ConfigError(
                    f"the device {path} has {file.size()} bytes, the volume {size}",
                    hint="make the volume smaller, or use a larger device",
                )
            file.truncate(size)
        elif not file.block_device:
            file.truncate(file.size())
        # Also what exists: an earlier attempt may have made it and failed then (O18), and the sync
        # that failed may have lost its size, which is set anew (O16).
        await file.sync()
    finally:
        file.close()
    await disk.sync_directory(path.rpartition("/")[0] or "/")
    return created


def open_facet(disk: Disk, path: str, size: int) -> File:
    """Opens a file or device that must hold ``size`` bytes; StateError says why it cannot be."""
    if not disk.exists(path):
        raise StateError(f"the facet {path} is missing", hint="restore it, or create the node anew")
    file = disk.open(path, scattered=True)
    if file.size() < size:
        found = file.size()
        file.close()
        raise StateError(
            f"the facet {path} has {found} bytes, the volume {size}",
            hint="a facet must not be smaller than its volume",
        )
    return file


async def to_the_end(task: asyncio.Task[None]) -> None:
    """Awaits what the disk goes on doing though the caller is cancelled: the cancellation waits,
    or a write that follows would be overtaken."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:  # before an error: who retries would go on, and its end be waited for
        raise cancelled from (None if task.cancelled() else task.exception())
    task.result()
