"""What the snapshots of a volume keep, and where each region of a snapshot is found (V9).

A volume's snapshots form a chain, oldest first. Each has a layer: the regions that the volume
changed between it and the next one, with their content from before. So a region of a snapshot is
in the first layer that keeps it, from its own on, and in the volume itself if none does; one write
copies once, however many snapshots there are; and what the volume changed since a snapshot is the
OR of the layers from its own on.

Decisions and memory only; ``engine.layer`` keeps a layer on disk, ``engine.chain`` acts.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence

from nbdmirror.codec.mappage import SLOTS
from nbdmirror.core.dcm import Dcm

ABSENT, ZEROS, PLAIN, UNREADABLE = 0, 1, 2, 3
"""Slots: not kept; kept, and nothing but zeros; kept without a checksum; the disk could not give
it when it was to be kept. Others are checksums."""
TENTATIVE = 1 << 63
"""In a slot on disk: written together with its region, so only its checksum proves the region."""
SUM_MASK = TENTATIVE - 1


def slot_of(checksum: int) -> int:
    """The slot of a region whose content has this 64-bit checksum."""
    return max(checksum & SUM_MASK, UNREADABLE + 1)


class Layer:
    """Which regions are kept, and the slot of each; sectors are the unit on disk."""

    def __init__(self, regions: int) -> None:
        self.kept = Dcm(regions)
        self._sectors: dict[int, array[int]] = {}

    @property
    def sector_count(self) -> int:
        """Sectors that the slots of all regions fill."""
        return -(-self.kept.regions // SLOTS)

    def slot(self, region: int) -> int:
        """The slot of a region, ``ABSENT`` if it is not kept."""
        number, index = divmod(region, SLOTS)
        sector = self._sectors.get(number)
        return ABSENT if sector is None else sector[index]

    def set(self, region: int, slot: int) -> int:
        """Sets a slot; returns the sector that changed. A slot is never taken back."""
        number, index = divmod(region, SLOTS)
        sector = self._sectors.get(number)
        if sector is None:
            sector = self._sectors[number] = array("Q", bytes(8 * SLOTS))
        sector[index] = slot
        if slot != ABSENT:
            self.kept.mark(region, region)
        return number

    def sector(self, number: int) -> list[int]:
        """The slots of a sector."""
        sector = self._sectors.get(number)
        return [ABSENT] * SLOTS if sector is None else list(sector)

    def regions_of(self, number: int) -> Iterator[tuple[int, int]]:
        """(region, slot) of those that a sector keeps."""
        sector = self._sectors.get(number)
        if sector is not None:
            for index, slot in enumerate(sector):
                if slot != ABSENT:
                    yield number * SLOTS + index, slot


def missing(newest: Layer, first: int, last: int) -> list[int]:
    """The regions of first..last that the newest snapshot still needs from the volume."""
    is_marked = newest.kept.is_marked
    return [region for region in range(first, last + 1) if not is_marked(region)]


def holder(chain: Sequence[Layer], index: int, region: int) -> int | None:
    """Which layer has the region of snapshot ``index``; ``None``: it is in the volume."""
    for at in range(index, len(chain)):
        if chain[at].kept.is_marked(region):
            return at
    return None


def next_kept(chain: Sequence[Layer], start: int) -> int | None:
    """The first region from ``start`` on that any of the layers keeps."""
    found = [first for layer in chain for first, _ in itertools.islice(layer.kept.runs(start), 1)]
    return min(found, default=None)


def changed(chain: Sequence[Layer], index: int, end: int | None = None) -> Dcm:
    """The regions that the volume changed from snapshot ``index`` to snapshot ``end``, or to now:
    the volume's map with reference to the snapshot (V9)."""
    union = Dcm(chain[index].kept.regions)
    for layer in chain[index:end]:
        union.merge(layer.kept)
    return union


def shared(older: Layer, deleted: Layer) -> Iterator[tuple[int, int]]:
    """(first, count) regions that both keep: nobody reads those of the later one, if it goes."""
    for first, count in deleted.kept.runs():
        both = [older.kept.is_marked(region) for region in range(first, first + count)]
        at = first
        for kept, group in itertools.groupby(both):
            length = len(list(group))
            if kept:
                yield at, length
            at += length


def orphans(older: Layer, deleted: Layer, start: int, count_max: int) -> list[int]:
    """Regions from ``start`` on that the snapshot before a deleted one still needs from it."""
    found: list[int] = []
    for first, count in deleted.kept.runs(start):
        for region in range(first, first + count):
            if not older.kept.is_marked(region):
                found.append(region)
                if len(found) == count_max:
                    return found
    return found
