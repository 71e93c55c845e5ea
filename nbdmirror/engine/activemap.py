"""The active map on disk: an extent stands there durably before a write may land in it (O1)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from nbdmirror.codec import mappage
from nbdmirror.config import LogConfig
from nbdmirror.core.active import ActiveMap
from nbdmirror.engine.facet import to_the_end
from nbdmirror.errors import DiskFailed, FormatError
from nbdmirror.ports import Disk, File

FILE_NAME = "active"
ALONG_MAX = mappage.SLOTS
"""Extents that come along with one that is wanted: what one more sector holds."""


class ActiveMapFile:
    """The active map of a group with its file; ``hot`` is what the data path looks at."""

    def __init__(self, file: File, slots_max: int, extent_size: int) -> None:
        self._file = file
        self.safe_seq: Callable[[], int] = lambda: 0
        """Writes up to here are safe: in the durable log and in every durable DCM."""
        self.make_safe: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Makes every write so far safe; both are set by the group."""
        self.map = ActiveMap(slots_max)
        self.extent_size = extent_size
        self.hot = self.map.hot
        self._lock = asyncio.Lock()
        self._wanted: dict[int, None] = {}
        """What is waited for: one sync serves all who wait."""
        self.damaged: str | None = None
        """Why the map could not be read: then every extent may differ."""

    @classmethod
    async def create(cls, disk: Disk, directory: str, slots_max: int) -> None:
        """Makes the file, preallocated (O18)."""
        file = disk.open(f"{directory}/{FILE_NAME}", create=True)
        try:
            await file.allocate(ActiveMap(slots_max).sectors * mappage.SECTOR_SIZE)
        finally:
            file.close()

    @classmethod
    def open(cls, disk: Disk, directory: str, config: LogConfig, settled: int) -> ActiveMapFile:
        """Opens and loads; damage is remembered in ``damaged``, not raised. ``settled``: so many
        sectors were written, durably: one that is not there was lost (fault 16)."""
        file = disk.open(f"{directory}/{FILE_NAME}")
        self = cls(file, config.hot_extents, config.extent_size)
        stored = file.size() // mappage.SECTOR_SIZE
        for number in range(max(stored, settled)):
            try:
                slots = self._read(number, settled) if number < stored else None
            except FormatError as error:
                self.damaged = f"{file.path}: {error}"
                continue
            if slots is None:
                self.damaged = f"{file.path} was cut short"
            elif number < self.map.sectors:
                self.map.load(number, slots)
            elif any(slots):
                # The limit was lowered: what does not fit cannot be kept, so all is in doubt.
                self.damaged = f"{file.path} was larger before"
        return self

    def _read(self, number: int, settled: int) -> list[int]:
        data = self._file.pread(number * mappage.SECTOR_SIZE, mappage.SECTOR_SIZE)
        if number < settled and not any(data):
            raise FormatError(f"map page {number} is gone")
        return mappage.decode_sector(number, data)

    async def activate(self, keys: list[int], along: Iterable[int] = ()) -> None:
        """Returns when all ``keys`` are durably in the map. DiskFailed if they cannot be.

        One sync serves all who wait, and takes in some of ``along`` where there is room: extents
        that are likely to be next. They are compared after a power loss, and first to go."""
        self._wanted.update(dict.fromkeys(key for key in keys if key not in self.hot))
        async with self._lock:
            cold = [key for key in dict.fromkeys(keys) if key not in self.hot]
            if cold:
                # In the same sync, as far as they do not crowd each other out: others' keys. Those
                # of this request that are in already stay too.
                more = [k for k in self._wanted if k not in self.hot and k not in cold]
                cold += more[: max(0, self.map.slots_max // 2 - len(keys))]
                spare = min(ALONG_MAX, self.map.free - len(cold))
                likely = [k for k in along if k not in self.hot and k not in cold]
                cold += likely[: max(0, spare)]
            while cold:
                batch = cold[: self.map.slots_max]
                sectors = self.map.admit(batch, self.safe_seq(), keys)
                if sectors is None:
                    assert self.make_safe is not None
                    # To its end: a remote half forced out holds the log, and nobody goes on.
                    await to_the_end(asyncio.ensure_future(self.make_safe()))
                    continue
                try:
                    await self._write(sectors)
                except BaseException:  # a cancellation too: the slots must not stay half taken
                    self.map.withdraw(batch)
                    raise
                self.map.enter(batch)
                for key in batch:
                    self._wanted.pop(key, None)
                cold = cold[len(batch) :]

    async def _write(self, sectors: list[int]) -> None:
        try:
            for number in sectors:
                data = mappage.encode_sector(number, self.map.sector(number))
                self._file.pwrite(number * mappage.SECTOR_SIZE, data)
            await self._file.sync()
        except OSError as error:
            raise DiskFailed(
                f"the active map {self._file.path} cannot be written: {error.strerror or error}",
                number=error.errno or 5,
                hint="replace the disk of state_dir, then restart the node",
            ) from error

    async def settle(self) -> None:
        """At start, before the first write: makes durable what a former process of the same boot
        may have left in the page cache; until then a loaded extent does not count as in (O1)."""
        async with self._lock:
            await self._write(list(range(self.map.sectors)))

    async def drop_safe(self) -> None:
        """Lets go of every extent that is safe: at a clean stop, of all."""
        async with self._lock:
            await self._write(self.map.drop_safe(self.safe_seq()))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
