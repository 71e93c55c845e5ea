"""The files of a node's snapshots: ``<directory>/<uuid>.<volume>`` for the layer of a snapshot of a
volume, with ``@own`` behind it for what was written into the snapshot itself (V9).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence

from nbdmirror.engine.layer import LayerFile, is_layer
from nbdmirror.engine.volume import Volume
from nbdmirror.ports import Disk

OWN = "@own"
"""Ends the name of the layer that is a snapshot's own; no volume's name has it."""
UNFINISHED = "~"
"""Ends the name of a file that is being made; no volume's name has it."""


class LayerFiles:
    """Makes, opens and removes them; which there ought to be, ``engine.snapshots`` knows."""

    def __init__(self, disk: Disk, directory: str, volumes: Sequence[Volume]) -> None:
        self.directory = directory
        self._disk = disk
        self._volumes = volumes

    def path(self, uuid: str, volume: int, *, own: bool = False) -> str:
        """Where the layer of a snapshot of a volume is, or what was written into the snapshot."""
        return f"{self.directory}/{uuid}.{self._volumes[volume].name}{OWN if own else ''}"

    def there(self, uuid: str, volume: int, *, own: bool = False) -> bool:
        """Whether a layer is on disk."""
        return self._disk.exists(self.path(uuid, volume, own=own))

    async def open(self, uuid: str, volume: int, *, own: bool = False) -> LayerFile:
        """Opens a layer; StateError, FormatError or OSError if it cannot be used."""
        place = self._volumes[volume]
        path = self.path(uuid, volume, own=own)
        return await LayerFile.open(self._disk, path, uuid, place.size, place.region_size)

    async def create(self, uuid: str, volume: int) -> LayerFile:
        """Makes an empty layer; its name is durable after ``sync_names``."""
        place = self._volumes[volume]
        path = self.path(uuid, volume)
        return await LayerFile.create(self._disk, path, uuid, place.size, place.region_size)

    async def create_own(self, uuid: str, volume: int) -> LayerFile:
        """Makes the layer of what is written into a snapshot; durable, with its name. Nothing else
        says that there is one: under its name it is whole (O18)."""
        place = self._volumes[volume]
        path = self.path(uuid, volume, own=True)
        self._unlink(path + UNFINISHED)  # of who was cancelled before
        size, region_size = place.size, place.region_size
        made = await LayerFile.create(self._disk, path + UNFINISHED, uuid, size, region_size)
        made.close()
        self._disk.rename(path + UNFINISHED, path)
        await self.sync_names()
        return await self.open(uuid, volume, own=True)

    async def sync_names(self) -> None:
        """Makes the names of layers durable."""
        await self._disk.sync_directory(self.directory)

    def tidy(self, known: Collection[str]) -> None:
        """Makes the directory, and removes layers of other snapshots than the ``known`` ones."""
        self._disk.make_directory(self.directory)
        for name in self._disk.list(self.directory):
            stray = name.partition(".")[0] not in known or name.endswith(UNFINISHED)
            if stray and is_layer(name):
                self._unlink(f"{self.directory}/{name}")

    def remove(self, uuid: str, volume: int) -> None:
        """Removes both layers of a snapshot that nobody has open."""
        for own in (False, True):
            if self.there(uuid, volume, own=own):
                self._unlink(self.path(uuid, volume, own=own))

    async def discard(self, uuid: str, volume: int) -> None:
        """The same for large ones, off the event loop."""
        for own in (False, True):
            if self.there(uuid, volume, own=own):
                with contextlib.suppress(OSError):  # a stray: the next start removes it
                    await self._disk.remove(self.path(uuid, volume, own=own))

    def _unlink(self, path: str) -> None:
        with contextlib.suppress(OSError):  # a stray: the next start removes it
            self._disk.unlink(path)
