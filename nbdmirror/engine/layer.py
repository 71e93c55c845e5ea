"""A layer of a snapshot on disk: kept regions in one sparse file, durable by one sync (O21).

The file::

    0       4096    magic "NMLAYER1", size of the volume, size of a region, 16 bytes of uuid
    4096    ...     sectors of slots ("NLAY", see ``codec.mappage``); of a whole volume, sparse
    ...             each region at its own place; holes where nothing is kept

A region and its slot are written together and made durable by one sync, in whatever order the disk
likes; so the slot carries the region's checksum, and until it was written again without the mark
``TENTATIVE`` a restart believes it only if the content bears it out. A region whose slot is not
borne out was not durable, so the write that wanted it kept has not happened. What counts is what
the disk has: the page cache may show what a sync failed to write (O16). The checksum also finds
what rots later (X6).

What a person wrote into a snapshot (V9, writable) lies in a file of the same kind without
checksums, because it changes in place.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import struct
from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

from nbdmirror.codec import mappage
from nbdmirror.core import layers
from nbdmirror.core.layers import ABSENT, PLAIN, TENTATIVE, UNREADABLE, ZEROS
from nbdmirror.errors import FormatError, StateError
from nbdmirror.ports import Buffer, Disk, File

HEAD_SIZE = 4096
FULL = (errno.ENOSPC, errno.EDQUOT)
_HEAD = struct.Struct("<8sQQ16s")
_MAGIC = b"NMLAYER1"


def is_layer(name: str) -> bool:
    """Whether a file is named as a layer is. What else lies in their directory is somebody's."""
    uuid, dot, _ = name.partition(".")
    return bool(dot) and len(uuid) == 32 and not set(uuid) - set("0123456789abcdef")


class LayerFile:
    """An open layer. OSError from its methods is the caller's to judge."""

    def __init__(self, file: File, size: int, region_size: int) -> None:
        self.map = layers.Layer(-(-size // region_size))
        self.region_size = region_size
        self._file = file
        self._size = size
        sectors = self.map.sector_count * mappage.SECTOR_SIZE
        self._data_at = HEAD_SIZE + -(-sectors // 4096) * 4096
        self._tentative: dict[int, None] = {}
        """Sectors whose slots on disk are not final yet."""
        self._lock = asyncio.Lock()
        """Held while sectors are written that memory does not have yet."""

    @classmethod
    async def create(
        cls, disk: Disk, path: str, uuid: str, size: int, region_size: int
    ) -> LayerFile:
        """Makes an empty one; durable but for its name."""
        file = disk.open(path, create=True)
        self = cls(file, size, region_size)
        try:
            file.truncate(self._data_at + size)
            file.pwrite(0, _HEAD.pack(_MAGIC, size, region_size, bytes.fromhex(uuid)))
            await file.sync()
        except BaseException:
            file.close()
            raise
        return self

    @classmethod
    async def open(cls, disk: Disk, path: str, uuid: str, size: int, region_size: int) -> LayerFile:
        """Opens one and loads its slots, as the disk has them: on what a former process could not
        sync nothing relies, and what is written over it would not last (O16). O(sectors written).

        StateError or FormatError if it is not what it has to be: its snapshot is lost then."""
        if not disk.exists(path):
            raise StateError(f"the layer {path} is missing")
        file = disk.open(path)
        self = cls(file, size, region_size)
        try:
            await file.forget()
            if file.size() != self._data_at + size:
                raise FormatError(f"{path} was cut short")
            found = _HEAD.unpack(file.pread(0, _HEAD.size))
            if found != (_MAGIC, size, region_size, bytes.fromhex(uuid)):
                raise FormatError(f"{path} is not the layer of snapshot {uuid}")
            self._load()
        except BaseException:
            file.close()
            raise
        return self

    def _load(self) -> None:
        size = mappage.SECTOR_SIZE
        length = self.map.sector_count * size
        for start, count in self._file.data_ranges(HEAD_SIZE, length):
            data = memoryview(self._file.pread(start, count))
            for at in range(0, count // size * size, size):
                number = (start - HEAD_SIZE + at) // size
                if number < self.map.sector_count:
                    self._load_sector(number, data[at : at + size])

    def _load_sector(self, number: int, data: memoryview) -> None:
        try:
            slots = mappage.decode_sector(number, data, mappage.LAYER)
        except FormatError as error:
            raise FormatError(f"{self._file.path}: {error}") from error
        for index, slot in enumerate(slots):
            region = number * mappage.SLOTS + index
            if slot != ABSENT and region < self.map.kept.regions:
                self.map.set(region, slot)
                if slot & TENTATIVE:
                    self._tentative[number] = None

    async def prove(self) -> None:
        """At start: takes tentative slots for what the content says, durably, before any write
        may rely on them."""
        for number in list(self._tentative):
            for region, slot in list(self.map.regions_of(number)):
                if not slot & TENTATIVE:
                    continue
                slot &= ~TENTATIVE
                length = self._length(region)
                summed = slot > UNREADABLE
                data = await self._file.read(self._at(region), length) if summed else b""
                if not summed or layers.slot_of(xxh3_64_intdigest(data)) == slot:
                    self.map.set(region, slot)
                else:
                    self.map.set(region, ABSENT)
                    self.map.kept.unmark(region)
        if self._tentative:
            await self._file.sync()  # first: without their mark slots are not proved again
        await self.settle()

    # -- keeping -----------------------------------------------------------------------------

    async def keep(
        self, regions: Sequence[tuple[int, Buffer | None]], unreadable: Sequence[int] = ()
    ) -> None:
        """Keeps regions with their content (``None``: zeros), and that of some there is none;
        durable on return, by one sync. After an OSError none of them counts as kept, and none takes
        space."""
        async with self._lock:
            try:
                await self._keep(regions, unreadable)
            except OSError:
                kept = self.map.kept.is_marked
                await self.release((region, 1) for region, _ in regions if not kept(region))
                raise

    async def _keep(
        self, regions: Sequence[tuple[int, Buffer | None]], unreadable: Sequence[int]
    ) -> None:
        slots = dict.fromkeys(unreadable, UNREADABLE)
        for region, data in regions:
            if data is None:
                slots[region] = ZEROS
            else:
                slots[region] = layers.slot_of(xxh3_64_intdigest(data))
                self._file.pwrite(self._at(region), data)
        rows: dict[int, list[int]] = {}
        for region, slot in slots.items():
            number, index = divmod(region, mappage.SLOTS)
            if number not in rows:
                rows[number] = self.map.sector(number)
            rows[number][index] = slot | TENTATIVE
        for number, row in rows.items():
            self._write_sector(number, row)
        await self._file.sync()
        for region, slot in slots.items():
            self.map.set(region, slot)
        self._tentative.update(dict.fromkeys(rows))

    async def release(self, runs: Iterable[tuple[int, int]]) -> None:
        """Gives back the space of (first, count) regions that nobody reads here any more."""
        for first, count in runs:
            with contextlib.suppress(OSError):  # then it goes with the file
                length = min(count * self.region_size, self._size - first * self.region_size)
                await self._file.punch(self._at(first), length)

    async def settle(self) -> None:
        """Writes the slots without their mark, durably: nothing is left to prove."""
        async with self._lock:
            await self._settle()

    async def _settle(self) -> None:
        if self._tentative:
            sectors = list(self._tentative)
            for number in sectors:
                self._write_sector(number, self.map.sector(number))
            await self._file.sync()
            for number in sectors:
                del self._tentative[number]

    def _write_sector(self, number: int, slots: list[int]) -> None:
        data = mappage.encode_sector(number, slots, mappage.LAYER)
        self._file.pwrite(HEAD_SIZE + number * mappage.SECTOR_SIZE, data)

    # -- changing in place (what a person writes into a snapshot) --------------------------------

    def put(self, region: int, data: Buffer) -> None:
        """Takes a whole region that is not kept yet; durable after ``sync``."""
        self._file.pwrite(self._at(region), data)
        self._tentative[self.map.set(region, PLAIN)] = None

    def clear(self, region: int) -> None:
        """Takes zeros for a whole region; durable after ``sync``. What is left of it in the file is
        not read any more: ``release`` gives that back."""
        self._tentative[self.map.set(region, ZEROS)] = None

    def pwrite(self, region: int, start: int, data: Buffer) -> None:
        """Changes a part of a region that was ``put``."""
        self._file.pwrite(self._at(region) + start, data)

    async def sync(self) -> None:
        """Makes durable what was put and written: content first, then the slots that name it."""
        async with self._lock:
            # What is put meanwhile is not named by these rows.
            rows = {number: self.map.sector(number) for number in self._tentative}
            await self._file.sync()
            for number, row in rows.items():
                self._write_sector(number, row)
            if rows:
                await self._file.sync()
            for number, row in rows.items():
                if self.map.sector(number) == row:
                    self._tentative.pop(number, None)

    # -- reading -----------------------------------------------------------------------------

    async def read(self, region: int) -> Buffer:
        """A kept region, whole, checked; FormatError if it rotted."""
        slot = self.map.slot(region)
        assert slot != ABSENT
        length = self._length(region)
        if slot == ZEROS:
            return bytes(length)
        if slot == UNREADABLE:
            raise FormatError(f"{self._file.path}: region {region} could not be read for it")
        at = self._at(region)
        data = self._file.try_pread(at, length)
        if data is None:
            data = await self._file.read(at, length)
        if slot != PLAIN and layers.slot_of(xxh3_64_intdigest(data)) != slot:
            raise FormatError(f"{self._file.path}: region {region} does not match its checksum")
        return data

    def is_zeros(self, region: int) -> bool:
        """Whether a kept region is known to be nothing but zeros."""
        return self.map.slot(region) == ZEROS

    def _at(self, region: int) -> int:
        return self._data_at + region * self.region_size

    def _length(self, region: int) -> int:
        return min(self.region_size, self._size - region * self.region_size)

    @property
    def bytes_kept(self) -> int:
        """About what it takes on disk."""
        return self.map.kept.count * self.region_size

    async def discard(self) -> None:
        """Closes the file once nothing is being kept in it."""
        async with self._lock:
            self._file.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
