"""The transaction queue: an ordered ring of records in one preallocated file, shared by all (V2).

The only writer of the log file. It appends whole batches with one write, commits for many with
one sync, reads back from memory when the reader is near and from the file when it is far (each
record verified, X6), and gives space back once a durable tail says that it is not needed (O5).
Who may release what is decided in ``engine.housekeeper``.

The file: 4 KiB of header (magic "NMLOG001", capacity), then the ring.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from nbdmirror.codec import record as codec
from nbdmirror.codec.record import Record
from nbdmirror.core.ring import Ring
from nbdmirror.engine import logscan
from nbdmirror.engine.groupcommit import GroupCommit
from nbdmirror.engine.spillfile import SpillFile
from nbdmirror.errors import DiskFailed, FormatError, StateError
from nbdmirror.ports import Buffer, Disk, File

RING_AT = 4096
RECENT_BYTES_MAX = 32 << 20
"""Records kept in memory for readers that are near the head: a quarter of a second of fast writes,
which is what a busy disk takes to make them durable before a secondary may apply them."""
PAGE = 4096
"""Appends are filled up with zeros to whole pages where there is room: a page that is not in the
page cache and is written in part is read from the disk first (130 us measured, against 20)."""
READ_BYTES = 1 << 20
"""What one read for a far reader takes at a time: a few of the longest records."""
_HEADER = struct.Struct("<8sQ")
MAGIC = b"NMLOG001"
_ZEROS = bytes(PAGE)


StandIn = Callable[[], Awaitable[int]]


@dataclass(slots=True)
class Chunk:
    """Consecutive records: their bytes, as stored and as sent, and where the next one lies."""

    first_seq: int
    last_seq: int
    parts: list[Buffer]
    size: int
    next_position: int
    records: list[Record] | None = None
    places: bytes | None = None
    """Where the payloads lie in the one part, if they are plain writes all (``codec.batch``)."""

    def parsed(self) -> list[Record]:
        """The records; parsed once."""
        if self.records is None:
            view = memoryview(b"".join(self.parts))
            self.records = list(codec.parse_all(view))
        return self.records


@dataclass(slots=True)
class Cursor:
    """A reader's place: the next seq to read, and its position when known."""

    seq: int
    position: int | None = None


class Log:
    """The open log of a node. Appends are immediate; durability is ``sync``'s business."""

    def __init__(self, file: File, capacity: int, tail_position: int, tail_seq: int) -> None:
        self._file: File | SpillFile = file
        self.ring = Ring(capacity, tail_position, tail_seq)
        self.payload_max = min(codec.PAYLOAD_MAX, capacity // 8 // 4096 * 4096)
        self.durable_seq = tail_seq - 1
        self._recent: dict[int, Chunk] = {}
        self._recent_seqs: deque[int] = deque()
        """Its keys, oldest first: a dict walks over all that was removed to find its first."""
        self._recent_bytes = 0
        self._commit = GroupCommit(self._sync_head)
        self.failed: DiskFailed | None = None
        self.on_failed: Callable[[DiskFailed], None] = lambda error: None
        """Called once, when the log has failed; whoever holds the node together sets it."""
        self.stand_in: StandIn | None = None
        """Of a log in memory: makes durable elsewhere what was appended, and says up to where
        (``engine.logloss``, ``engine.spill``)."""
        self.spilled: SpillFile | None = None
        """Of a log that is partly in memory: where which part is."""
        self._kept_seq = 0
        self.redone = True
        """After a crash the facets are brought up from it, so it is kept until they are synced."""
        self.frozen = False
        """Nothing fits: the log is being moved."""
        self.appended = asyncio.Event()
        """Set with every append; readers at the head clear it and wait."""

    @classmethod
    async def create(cls, disk: Disk, path: str, size: int) -> None:
        """Preallocates the file with written zeros (O18); OSError (ENOSPC) if it does not fit."""
        capacity = (size - RING_AT) // 4096 * 4096
        file = disk.open(path, create=True)
        try:
            await file.allocate(RING_AT + capacity)
            file.pwrite(0, _HEADER.pack(MAGIC, capacity))
            await file.sync()
        finally:
            file.close()

    @classmethod
    def open(
        cls, disk: Disk, path: str, tail_position: int, tail_seq: int, *, read_only: bool = False
    ) -> Log:
        """Opens with an empty content at the tail; ``recover`` finds what follows."""
        file, capacity = cls.open_file(disk, path, read_only=read_only)
        return cls(file, capacity, tail_position, tail_seq)

    @staticmethod
    def open_file(disk: Disk, path: str, *, read_only: bool = False) -> tuple[File, int]:
        """The file of a log, and its capacity; StateError if it is none."""
        if not disk.exists(path):
            hint = "restore it, or create the node anew"
            raise StateError(f"the log {path} is missing", hint=hint)
        file = disk.open(path, read_only=read_only)
        head = file.pread(0, min(_HEADER.size, file.size())).ljust(_HEADER.size, b"\0")
        magic, capacity = _HEADER.unpack(head)
        if magic != MAGIC or not 0 < capacity <= file.size() - RING_AT or capacity % 4096:
            file.close()
            raise StateError(f"{path} is not a log of this program, or was cut short")
        return file, capacity

    def go_on(self, file: File, capacity: int, stand_in: StandIn | None) -> None:
        """Goes on in another file, empty, with the next seq. Everything before is durable where
        it is needed, nobody reads, and the superblock says so already."""
        seq = self.ring.next_seq
        self._file.close()
        self._file, self.stand_in, self.spilled, self.redone = file, stand_in, None, True
        self.ring = Ring(capacity, 0, seq)
        self.payload_max = min(codec.PAYLOAD_MAX, capacity // 8 // 4096 * 4096)
        self.durable_seq = seq - 1
        self._recent.clear()
        self._recent_seqs.clear()
        self._recent_bytes = 0
        self.failed = None

    def spill(self, threshold: int, stand_in: StandIn) -> SpillFile:
        """From here on the newest ``threshold`` bytes are in memory (``engine.spill``)."""
        assert not isinstance(self._file, SpillFile)
        self._file = self.spilled = SpillFile(self._file, RING_AT, self.ring, threshold)
        self.stand_in, self._kept_seq = stand_in, self.durable_seq
        return self.spilled

    def write_through(self) -> None:
        """From here on each append goes to the file, as what is in memory does now; if the disk
        refuses, the log has failed (O16)."""
        assert self.spilled is not None
        self.spilled.through = True
        try:
            self.spilled.write_all()
        except OSError as error:
            self._fail("write", error)

    def unspill(self) -> None:
        """From here on everything is in the file, as it was made to be before (``keep``)."""
        assert self.spilled is not None and self.durable_seq <= self.kept_seq
        assert self.spilled.memory_bytes == 0
        self._file, self.spilled, self.stand_in = self.spilled.file, None, None

    # -- state -------------------------------------------------------------------------------

    @property
    def kept_seq(self) -> int:
        """Recovery finds every record up to here in the file, even after a power loss; or the tail
        that it begins at lies behind them."""
        return self.durable_seq if self.spilled is None else self._kept_seq

    @property
    def next_seq(self) -> int:
        """The seq of the next record."""
        return self.ring.next_seq

    @property
    def capacity(self) -> int:
        """Bytes of the ring."""
        return self.ring.capacity

    def bytes_between(self, seq: int) -> int:
        """About how many bytes of log lie from ``seq`` to the head (to one index step)."""
        if not self.ring.tail_seq <= seq < self.ring.next_seq:
            return 0
        chunk = self._recent.get(seq)
        if chunk is not None:
            return self.ring.head - chunk.next_position + chunk.size
        return self.ring.head - self.ring.locate(seq)[1]

    def fits(self, size: int, largest: int) -> bool:
        """Whether records of ``size`` bytes in all, none above ``largest``, can be appended now."""
        rest = self.ring.capacity - self.ring.head % self.ring.capacity
        return size + (largest if size > rest else 0) <= self.ring.room() and not self.frozen

    # -- appending ---------------------------------------------------------------------------

    def append(
        self,
        parts: list[Buffer],
        size: int,
        count: int,
        *,
        records: list[Record] | None = None,
        places: bytes | None = None,
    ) -> None:
        """Appends ``count`` encoded records (``parts`` all their bytes, ``size`` of them,
        ``records`` them parsed, if at hand, ``places`` as of a ``Chunk``) that continue at
        ``next_seq``. Room must have been checked with ``fits``.

        Raises DiskFailed; the log is then failed for good (O16)."""
        if self.failed is not None:
            raise self.failed
        ring = self.ring
        first, place = ring.next_seq, ring.place
        rest = ring.capacity - ring.head % ring.capacity
        try:
            if size <= rest:
                pad = -(ring.head + size) % PAGE
                whole = [*parts, _ZEROS[:pad]] if size + pad <= ring.room() else parts
                self._file.pwritev(RING_AT + ring.head % ring.capacity, whole)
                ring.advance(first, count, size)
            else:
                self._append_wrapping(parts)
        except OSError as error:
            ring.take_back(place)  # all or none: what it has in part is in no facet
            raise self._fail("write", error) from error
        last = first + count - 1
        self._remember(Chunk(first, last, parts, size, ring.head, records, places))
        self.appended.set()

    def _append_wrapping(self, parts: list[Buffer]) -> None:
        """Appends record by record, with a fill where the ring ends."""
        ring = self.ring
        data = memoryview(b"".join(parts))
        at = 0
        while at < len(data):
            size = codec.stored_size(*logscan.peek(data[at:]))
            gap = ring.gap(size)
            if gap:
                # Only its header is needed: what lies behind it is never looked at.
                (epoch,) = struct.unpack_from("<I", data, at + 8)
                filler = codec.fill(epoch, ring.next_seq, gap)
                self._file.pwrite(RING_AT + ring.head % ring.capacity, filler)
                ring.head += gap
            self._file.pwrite(RING_AT + ring.head % ring.capacity, data[at : at + size])
            ring.advance(ring.next_seq, 1, size)
            at += size

    def _remember(self, chunk: Chunk) -> None:
        self._recent[chunk.first_seq] = chunk
        self._recent_seqs.append(chunk.first_seq)
        self._recent_bytes += chunk.size
        while self._recent_bytes > RECENT_BYTES_MAX:
            oldest = self._recent.pop(self._recent_seqs.popleft(), None)
            self._recent_bytes -= oldest.size if oldest is not None else 0

    # -- durability --------------------------------------------------------------------------

    async def sync(self, seq: int) -> None:
        """Returns when every record up to ``seq`` is durable; DiskFailed if that cannot be."""
        while self.durable_seq < seq:
            if self.failed is not None:
                raise self.failed
            await self._commit()

    async def _sync_head(self) -> None:
        ring = self.ring
        upto = ring.next_seq - 1
        if self.failed is not None:
            raise self.failed
        if upto <= self.durable_seq:
            return
        file = self._file
        try:
            if self.stand_in is not None:
                upto = min(upto, await self.stand_in())
            else:
                await file.sync()
        except OSError as error:
            if file is not self._file:
                return  # of the file that the log was in before
            raise self._fail("sync", error) from error
        if self.ring is ring:  # not reset meanwhile: ``upto`` would be of a former stream
            self.durable_seq = max(self.durable_seq, upto)

    async def keep(self) -> None:
        """Returns when what was appended is durable in the file itself, if the log has one;
        DiskFailed if that cannot be."""
        upto, file = self.next_seq - 1, self.spilled
        if file is None:
            if self.stand_in is None:
                await self.sync(upto)
            return
        if self.failed is not None:
            raise self.failed
        try:
            await file.write_out()
            await file.sync()
        except OSError as error:
            if file is self.spilled:
                raise self._fail("sync", error) from error
        if file is self.spilled:
            self._kept_seq = max(self._kept_seq, upto)

    def _fail(self, what: str, error: OSError) -> DiskFailed:
        self.failed = DiskFailed(
            f"{what} of the log {self._file.path} failed: {error.strerror or error}",
            number=error.errno or 5,
            hint="the log's disk is not trusted any more; replace it and restart the node",
        )
        self.appended.set()
        self.on_failed(self.failed)
        return self.failed

    # -- reading back ------------------------------------------------------------------------

    def near(self, seq: int) -> Chunk | None:
        """The chunk in memory that starts with ``seq``, if there is one."""
        return self._recent.get(seq)

    async def read(self, cursor: Cursor, size_max: int = READ_BYTES) -> Chunk:
        """The next records from the cursor, which must be within tail and head; from memory or
        from the file. Advances the cursor. FormatError names a record that rotted in the log."""
        assert self.ring.tail_seq <= cursor.seq < self.next_seq
        chunk = self._recent.get(cursor.seq)
        if chunk is None:
            chunk = await self._read_far(cursor, size_max)
        cursor.seq, cursor.position = chunk.last_seq + 1, chunk.next_position
        return chunk

    async def _read_far(self, cursor: Cursor, size_max: int) -> Chunk:
        if cursor.position is None:
            await self._seek(cursor)
        position = cursor.position
        assert position is not None
        ring = self.ring
        at = position % ring.capacity
        length = min(size_max, ring.capacity - at, ring.head - position)
        view = await self._read_file(at, length, cursor.seq)
        chunk = self._gather(view, cursor.seq, position)
        if chunk.first_seq <= chunk.last_seq:
            return chunk
        if chunk.next_position > position:  # nothing but a fill
            return await self._read_far(Cursor(cursor.seq, chunk.next_position), size_max)
        kind, length = logscan.peek(view)
        size = codec.stored_size(kind, length)
        if size <= size_max:
            raise FormatError(f"log {self._file.path}: record {cursor.seq} cannot be read back")
        return await self._read_far(cursor, size)

    def _gather(self, view: memoryview, seq: int, position: int) -> Chunk:
        """The whole records at the start of ``view``; stops where memory takes over."""
        records: list[Record] = []
        at = 0
        first = seq
        while at + codec.HEADER_SIZE <= len(view):
            kind, length = logscan.peek(view[at:])
            size = codec.stored_size(kind, length)
            if kind == codec.FILL:
                self._verify(view, at, seq)
                if not records:
                    return Chunk(seq, seq - 1, [], 0, position + size)
                break
            if at + size > len(view):
                break
            records.append(self._verify(view, at, seq))
            seq, at = seq + 1, at + size
            if seq in self._recent:
                break
        return Chunk(first, seq - 1, [view[:at]], at, position + at, records)

    def _verify(self, view: memoryview, at: int, seq: int) -> Record:
        try:
            record = codec.parse(view, at)
        except FormatError as error:
            raise FormatError(f"log {self._file.path}, record {seq}: {error}") from error
        if record.seq != seq:
            raise FormatError(f"log {self._file.path}: found record {record.seq}, wanted {seq}")
        return record

    async def _read_file(self, at: int, length: int, seq: int) -> memoryview:
        try:
            return memoryview(await self._file.read(RING_AT + at, length))
        except OSError as error:
            why = error.strerror or error
            raise FormatError(f"log {self._file.path}, record {seq}: read failed: {why}") from error

    async def _seek(self, cursor: Cursor) -> None:
        """Finds the position of ``cursor.seq`` from the index, over headers only."""
        ring = self.ring
        seq, position = ring.locate(cursor.seq)
        while seq < cursor.seq:
            view = await self._read_file(position % ring.capacity, codec.HEADER_SIZE, seq)
            if seq < ring.tail_seq <= cursor.seq:  # released meanwhile, and perhaps written over
                return await self._seek(cursor)
            # A length that rotted would end in a tail at which recovery finds nothing.
            found, size = codec.parse_header(view, 0)
            if found.seq != seq:
                raise FormatError(f"log {self._file.path}: found record {found.seq}, wanted {seq}")
            position += size
            seq += found.kind != codec.FILL
        cursor.position = position

    async def position_of(self, seq: int) -> int:
        """Where the record ``seq`` lies, or will lie."""
        if seq == self.next_seq:
            return self.ring.head
        cursor = Cursor(seq)
        await self._seek(cursor)
        assert cursor.position is not None
        return cursor.position

    # -- release and reset -------------------------------------------------------------------

    def release(self, seq: int, position: int) -> None:
        """Records before ``seq`` are not needed; their space is free after ``confirm_tail``."""
        self.ring.release(seq, position)

    def confirm_tail(self, position: int) -> None:
        """The superblock with this tail is durable: the space before it may be used again."""
        assert self.ring.durable_tail <= position <= self.ring.tail
        self.ring.durable_tail = position
        if self.spilled is not None:
            assert position == self.ring.tail
            self.spilled.drop(position)
            self._kept_seq = max(self._kept_seq, self.ring.tail_seq - 1)

    def reset(self, seq: int) -> None:
        """Empties the log, to go on with ``seq``: a secondary starts a new stream. The superblock
        must be saved with the new tail before anything is appended."""
        capacity, head = self.ring.capacity, self.ring.head
        self.ring = Ring(capacity, head, seq)
        self.durable_seq = seq - 1
        self._recent.clear()
        self._recent_seqs.clear()
        self._recent_bytes = 0

    # -- recovery ----------------------------------------------------------------------------

    def scan(self, forks: list[tuple[int, int]], epoch_max: int) -> Iterator[Record]:
        """Finds the valid records from the tail on, moving the head behind each (O10).

        Stops at the first whose checksum fails, whose seq is not the next, whose epoch goes back,
        is above ``epoch_max``, or belongs to an epoch that ended before it (``forks``)."""
        return logscan.scan(self._file, RING_AT, self.ring, forks, epoch_max)

    async def rewrite(self, seq: int) -> None:
        """Writes the records from ``seq`` to the head again, as they are; DiskFailed if the disk
        refuses. What a failed sync marked clean is dirty afterwards (O16)."""
        ring = self.ring
        if seq >= ring.next_seq:
            return
        position = await self.position_of(seq)
        while position < ring.head:
            at = position % ring.capacity
            length = min(1 << 20, ring.capacity - at, ring.head - position)
            try:
                await self._file.write(RING_AT + at, await self._file.read(RING_AT + at, length))
            except OSError as error:
                raise self._fail("rewrite", error) from error
            position += length

    def seq_behind(self, forks: list[tuple[int, int]]) -> int:
        """After ``scan``: the seq of a record near behind the head that proves that the log once
        went on there, so that it did not end but was damaged; 0 if there is none."""
        return logscan.seq_behind(self._file, RING_AT, self.ring, forks)

    def unfinished(self, forks: list[tuple[int, int]]) -> logscan.Unfinished | None:
        """After ``scan``: what a killed process may have been about to append."""
        return logscan.unfinished(self._file, RING_AT, self.ring, forks)

    async def forget_behind(self) -> None:
        """After ``scan``: whatever later records lie behind the head prove nothing to a scan to
        come; durable on return. DiskFailed if the disk refuses."""
        try:
            found = [at for at, _ in logscan.behind(self._file, RING_AT, self.ring)]
            if logscan.remains(self._file, RING_AT, self.ring):
                found.append(self.ring.head)
            for position in found:
                offset = RING_AT + position % self.ring.capacity
                await self._file.write(offset, bytes(codec.HEADER_SIZE))
            await self._file.sync()
        except OSError as error:
            raise self._fail("write", error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
