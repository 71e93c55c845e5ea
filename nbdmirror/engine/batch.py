"""What one receive, or one long request, does to a volume: the unit that the data path works on.

Two kinds with one shape. ``Received``: plain writes still in the buffer that they came in; all
that is done for each of them is done for all in one call (``codec.batch``). ``Changes``: changes
of any kind and length, one by one, whose payloads are never copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from nbdmirror.codec import batch as codec_batch
from nbdmirror.codec import record as codec
from nbdmirror.engine.volume import Change
from nbdmirror.ports import Buffer, File


class Records:
    """The records of a batch, encoded: ``parts`` are all their bytes, ``size`` of them."""

    __slots__ = ("changes", "count", "parts", "places", "size", "volume")

    def __init__(
        self,
        volume: int,
        parts: list[Buffer],
        size: int,
        count: int,
        *,
        places: bytes | None = None,
        changes: Sequence[Change] = (),
    ) -> None:
        """``places``: where the payloads lie in the one part, or None: they are in ``changes``."""
        self.volume = volume
        self.parts = parts
        self.size = size
        self.count = count
        self.places = places
        self.changes = changes

    def land(self, file: File) -> None:
        """Writes the payloads to their places in a facet's file; OSError if it refuses one."""
        if self.places is not None:
            file.pwrite_places(self.parts[0], self.places, self.volume)
            return
        pwrite = file.pwrite
        for _, _, offset, _, payload in self.changes:
            assert payload is not None
            pwrite(offset, payload)


class Batch(Protocol):
    """See above; offsets and lengths in bytes, within the volume."""

    @property
    def size_max(self) -> int:
        """Bytes of log that its records take at the most."""

    @property
    def longest(self) -> int:
        """Bytes of the longest change."""

    def ranges(self) -> Iterable[tuple[int, int]]:
        """(offset, length) of each change."""

    def changes(self) -> Sequence[Change]:
        """The changes one by one."""

    def stretches(self, size: int) -> Iterable[int]:
        """The numbers of the stretches of ``size`` bytes that are touched; some more than once."""

    def encode(self, epoch: int, volume: int, seq: int, time_ns: int) -> Records:
        """The records, the first with ``seq``; checksums are computed here and nowhere else."""


class Received:
    """Plain writes as they were received."""

    def __init__(self, writes: codec_batch.Writes) -> None:
        self._writes = writes
        self._stretches: tuple[int, list[int]] = (0, [])
        self.ranges = writes.ranges
        self.longest = writes.longest
        self.size_max = writes.size + len(writes) * 2 * codec.HEADER_SIZE

    def changes(self) -> list[Change]:
        """See ``Batch``."""
        return [
            Change(codec.WRITE, 0, request.offset, request.length, request.payload)
            for request in self._writes.requests()
        ]

    def stretches(self, size: int) -> list[int]:
        """See ``Batch``."""
        if self._stretches[0] != size:
            self._stretches = size, codec_batch.stretches(self._writes.places, size)
        return self._stretches[1]

    def encode(self, epoch: int, volume: int, seq: int, time_ns: int) -> Records:
        """See ``Batch``."""
        writes = self._writes
        block, places = codec_batch.encode_writes(
            writes.view, writes.places, epoch, volume, seq, time_ns
        )
        return Records(volume, [block], len(block), len(writes), places=places)


class Changes:
    """Changes one by one."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes
        self.longest = max((change.length for change in changes), default=0)
        self.size_max = sum(codec.stored_size(change.kind, change.length) for change in changes)

    def ranges(self) -> Iterable[tuple[int, int]]:
        """See ``Batch``."""
        return [(offset, length) for _, _, offset, length, _ in self._changes]

    def changes(self) -> Sequence[Change]:
        """See ``Batch``."""
        return self._changes

    def stretches(self, size: int) -> list[int]:
        """See ``Batch``."""
        return [
            stretch
            for _, _, offset, length, _ in self._changes
            for stretch in range(offset // size, (offset + length - 1) // size + 1)
        ]

    def encode(self, epoch: int, volume: int, seq: int, time_ns: int) -> Records:
        """See ``Batch``."""
        parts: list[Buffer] = []
        for number, (kind, flags, offset, length, payload) in enumerate(self._changes, seq):
            where = epoch, volume, number, offset, length, time_ns
            parts.append(codec.encode_header(kind, flags, *where, payload))
            if payload is not None:
                parts.append(payload)
                if length % codec.ALIGNMENT:
                    parts.append(codec.padding(length))
        size = self.size_max
        return Records(volume, parts, size, len(self._changes), changes=self._changes)
