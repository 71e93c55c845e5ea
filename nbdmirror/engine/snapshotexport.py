"""Snapshots as clients attach them: ``VOLUME@NUMBER``, or ``VOLUME@UUID`` (its first digits do).

Read-only, or writable where a person said so (V9): then what is written goes to a layer of the
snapshot's own, whole regions at a time, and never to the volume.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Protocol

from nbdmirror.engine.batch import Batch
from nbdmirror.engine.chain import Chain
from nbdmirror.engine.facet import to_the_end
from nbdmirror.engine.layer import LayerFile
from nbdmirror.engine.snapshots import Entry, Snapshots
from nbdmirror.engine.volume import Change, Volume
from nbdmirror.errors import VolumeFailed
from nbdmirror.ports import Buffer

UUID_DIGITS_MIN = 6
TURN_REGIONS = 64
"""After so many regions of one request others have their turn."""


class Writer(Protocol):
    """What takes the changes of a client: a group, or a snapshot. See ``Group`` for the terms."""

    def write(
        self, volume: Volume, changes: Sequence[Change], *, durable: bool = False
    ) -> Coroutine[Any, Any, None] | None:
        """Writes these, in order."""

    def write_batch(
        self, volume: Volume, batch: Batch, *, durable: bool = False
    ) -> Coroutine[Any, Any, None] | None:
        """Writes a batch, in order."""

    async def clear(self, volume: Volume, change: Change, *, durable: bool = False) -> None:
        """TRIM and WRITE_ZEROES."""

    async def flush(self) -> None:
        """Every write that was replied to is durable."""


class SnapshotVolume(Volume):
    """A snapshot of a volume, to who reads it a volume; and the ``Writer`` of what is written."""

    def __init__(self, snapshots: Snapshots, entry: Entry, chain: Chain) -> None:
        base = chain.volume
        name = f"{base.name}@{label(entry)}"
        super().__init__(base.index, name, entry["uuid"], base.size, base.region_size, [])
        self.entry = entry
        self._snapshots = snapshots
        self._chain = chain
        self._lock = asyncio.Lock()

    def try_read(self, offset: int, length: int) -> Buffer | None:
        """Always ``None``: the layers are asked first."""
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes of a range; VolumeFailed if they cannot be had."""
        return await self._chain.read(self.uuid, offset, length)

    def allocation(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """(offset, length, hole) pieces that cover the range."""
        return _merged(self._chain.holes(self.uuid, offset, length))

    def pieces(self, offset: int, length: int, limit: int) -> list[tuple[int, int, bool]]:
        """See ``Volume``; ``limit`` bounds what is looked at, so what comes may be fewer."""
        found = self._chain.holes(self.uuid, offset, length)
        return _merged(itertools.islice(found, limit))

    # -- as a Writer ---------------------------------------------------------------------------

    def write(
        self, volume: Volume, changes: Sequence[Change], *, durable: bool = False
    ) -> Coroutine[Any, Any, None] | None:
        """See ``Writer``; never done at once."""
        return self._write(changes, durable)

    def write_batch(
        self, volume: Volume, batch: Batch, *, durable: bool = False
    ) -> Coroutine[Any, Any, None] | None:
        """See ``Writer``; never done at once."""
        return self._write(batch.changes(), durable)

    async def clear(self, volume: Volume, change: Change, *, durable: bool = False) -> None:
        """See ``Writer``."""
        await self._write([change], durable)

    async def flush(self) -> None:
        """See ``Writer``."""
        own = self._chain.members[self._chain.index(self.uuid)].own
        try:
            if own is not None:
                await self._snapshots.sync_own(self.uuid, own)
        except OSError as error:
            raise self._failed(error) from error

    async def _write(self, changes: Sequence[Change], durable: bool) -> None:
        async with self._lock:
            self._check_free()
            try:
                own = await self._own()
                for _, _, offset, length, payload in changes:
                    await self._change(own, offset, length, payload)
                if durable:
                    await self._snapshots.sync_own(self.uuid, own)
            except OSError as error:
                raise self._failed(error) from error

    async def _change(
        self, own: LayerFile, offset: int, length: int, payload: Buffer | None
    ) -> None:
        """Region by region; others have their turn in between: one request may clear 4 GiB."""
        size, cleared = self.region_size, []
        for region in range(offset // size, (offset + length - 1) // size + 1):
            self._check_free()  # that may have begun meanwhile
            low = max(offset, region * size)
            high = min(offset + length, (region + 1) * size)
            if payload is not None:
                data = memoryview(payload)[low - offset : high - offset]
                await self._put(own, region, low - region * size, data)
            elif high - low < min(size, self.size - region * size):
                await self._put(own, region, low - region * size, bytes(high - low))
            else:
                own.clear(region)
                cleared.append(region)
            if region % TURN_REGIONS == 0:
                await asyncio.sleep(0)
        if cleared:
            # To its end: it must not come over what is written next.
            space = own.release([(cleared[0], len(cleared))])
            await to_the_end(asyncio.ensure_future(space))

    def _check_free(self) -> None:
        """VolumeFailed if it is being restored: what that reads must not change. Of newer ones it
        reads only what they keep."""
        if self.uuid in self._snapshots.kept_for_restore[:1]:
            raise VolumeFailed(f"{self.name} is being restored from", number=errno.EPERM)

    async def _put(self, own: LayerFile, region: int, start: int, data: Buffer) -> None:
        if own.map.kept.is_marked(region) and not own.is_zeros(region):
            own.pwrite(region, start, data)
            return
        length = min(self.region_size, self.size - region * self.region_size)
        if len(data) < length:
            whole = bytearray(await self._chain.read_region(self.uuid, region, 0, length))
            self._check_free()  # that may have begun meanwhile
            whole[start : start + len(data)] = data
            data = whole
        own.put(region, data)

    async def _own(self) -> LayerFile:
        member = self._chain.members[self._chain.index(self.uuid)]
        if member.own is None:
            member.own = await self._snapshots.files.create_own(self.uuid, self.index)
        return member.own

    def _failed(self, error: OSError) -> VolumeFailed:
        return VolumeFailed(
            f"a write into snapshot {self.name} failed: {error.strerror or error}",
            number=error.errno or 5,
        )


class SnapshotExports:
    """The snapshots of a node as exports; one object for all clients of each."""

    def __init__(self, snapshots: Snapshots) -> None:
        self.snapshots = snapshots
        self._served: dict[tuple[str, int], SnapshotVolume] = {}

    def find(self, name: str) -> SnapshotVolume | None:
        """The snapshot of an export's name."""
        volume_name, _, spec = name.partition("@")
        for chain in self.snapshots.chains:
            if chain.volume.name == volume_name:
                entry = pick(self.snapshots, spec)
                if entry is not None and chain.volume.index in entry["volumes"]:
                    return self.serve(entry, chain.volume.index)
        return None

    def all(self) -> list[SnapshotVolume]:
        """Every volume of every snapshot that can be read."""
        shown = [entry for entry in self.snapshots.entries if self.snapshots.shown(entry)]
        return [self.serve(entry, index) for entry in shown for index in entry["volumes"]]

    @property
    def count_max(self) -> int:
        """There are no more than so many; told without a look at any of them."""
        return sum(len(entry["volumes"]) for entry in self.snapshots.entries)

    def serve(self, entry: Entry, index: int) -> SnapshotVolume:
        """A volume of a snapshot."""
        key = entry["uuid"], index
        if key not in self._served:
            chain = self.snapshots.chains[index]
            self._served[key] = SnapshotVolume(self.snapshots, entry, chain)
        return self._served[key]

    def clients(self, entry: Entry) -> int:
        """How many have it attached."""
        return sum(v.clients for (uuid, _), v in self._served.items() if uuid == entry["uuid"])

    def forget(self, entry: Entry) -> None:
        """It is gone."""
        for index in entry["volumes"]:
            self._served.pop((entry["uuid"], index), None)


def label(entry: Entry) -> str:
    """What people call it: its number, or the first digits of its uuid."""
    return str(entry["number"] or entry["uuid"][:8])


def pick(snapshots: Snapshots, spec: str) -> Entry | None:
    """The readable snapshot of a number or of the first digits of a uuid; ``None`` if there is
    none, or more than one of those digits."""
    shown = [entry for entry in snapshots.entries if snapshots.shown(entry)]
    # Compared as text: what strangers send is no number until it is one of ours.
    numbered = [entry for entry in shown if entry["number"] and str(entry["number"]) == spec]
    if numbered:
        return numbered[-1]
    if len(spec) < UUID_DIGITS_MIN:
        return None
    alike = [entry for entry in shown if entry["uuid"].startswith(spec)]
    return alike[0] if len(alike) == 1 else None


def _merged(pieces: Iterable[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """The same, with neighbours of one kind as one piece."""
    merged: list[tuple[int, int, bool]] = []
    for start, length, hole in pieces:
        if merged and merged[-1][2] == hole:
            merged[-1] = (merged[-1][0], merged[-1][1] + length, hole)
        else:
            merged.append((start, length, hole))
    return merged
