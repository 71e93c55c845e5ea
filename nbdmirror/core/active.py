"""The active map: extents that may hold writes not yet safe everywhere (O1).

A write may reach a facet only once its extent stands durably in the map. Extents are few and
large, so a hot one costs nothing; their number is bounded, and the least recently written that is
safe makes room for a new one, in the same sector write.

An extent is safe once the log is durable past its last write: compared are seqs, never a boolean,
so a newer write keeps it in (O6). Knows nothing of files; ``engine.activemap`` writes the sectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest

from nbdmirror.codec.mappage import SLOTS

_EVICT_AT_ONCE = 64


def key_of(volume: int, extent: int) -> int:
    """The map's name for an extent of a volume."""
    return volume << 40 | extent


def volume_extent(key: int) -> tuple[int, int]:
    """The (volume, extent) that a key names."""
    return key >> 40, key & (1 << 40) - 1


class ActiveMap:
    """Which extents are in, where their slots are, and their last write's seq."""

    def __init__(self, slots_max: int) -> None:
        assert slots_max >= SLOTS
        self.sectors = -(-slots_max // SLOTS)
        self._slots = [0] * (self.sectors * SLOTS)
        self._place: dict[int, int] = {}
        # Ordered and quick to take any one from; the last is taken first.
        self._free = dict.fromkeys(range(len(self._slots) - 1, -1, -1))
        self.hot: dict[int, int] = {}
        """key -> seq of its last write, for the extents that are durably in."""

    @property
    def slots_max(self) -> int:
        """How many extents fit."""
        return len(self._slots)

    @property
    def free(self) -> int:
        """How many extents can be taken in without letting one go."""
        return len(self._free)

    def load(self, sector: int, slots: list[int]) -> None:
        """Takes over a sector as found on disk; its extents count as written just now (seq 0)."""
        for number, value in enumerate(slots):
            # An extent may stand twice: let go in one slot, taken in again in another.
            if value and value - 1 not in self.hot:
                place = sector * SLOTS + number
                self._slots[place] = value
                self._place[value - 1] = place
                del self._free[place]
                self.hot[value - 1] = 0

    def admit(self, keys: list[int], safe_seq: int, keep: Sequence[int] = ()) -> list[int] | None:
        """Gives cold extents their slots; returns the sectors to make durable before ``enter``.

        ``safe_seq``: writes up to here are safe, extents last written at or below may be evicted,
        but for those to ``keep``: the same request needs them. ``None`` if too few may: the log
        has to be synced first. ``keys`` must be cold and distinct.
        """
        assert len(keys) <= len(self._slots)
        if len(self._free) < len(keys):
            want = max(_EVICT_AT_ONCE, len(keys)) - len(self._free)
            kept = frozenset(keep)
            evictable = (
                (seq, key) for key, seq in self.hot.items() if seq <= safe_seq and key not in kept
            )
            for _, key in nsmallest(want, evictable):
                del self.hot[key]
                place = self._place.pop(key)
                self._slots[place] = 0
                self._free[place] = None
            if len(self._free) < len(keys):
                return None
        touched: dict[int, None] = {}
        for key in keys:
            assert key not in self._place
            place, _ = self._free.popitem()
            self._place[key] = place
            self._slots[place] = key + 1
            touched[place // SLOTS] = None
        return list(touched)

    def enter(self, keys: list[int]) -> None:
        """The sectors of these keys are durable: writes may go there."""
        for key in keys:
            self.hot[key] = 0

    def withdraw(self, keys: list[int]) -> None:
        """Making these keys durable failed; they are not in."""
        for key in keys:
            place = self._place.pop(key)
            self._slots[place] = 0
            self._free[place] = None

    def drop_safe(self, safe_seq: int) -> list[int]:
        """Lets go of every safe extent (clean stop); returns the sectors to write."""
        touched: dict[int, None] = {}
        for key in [k for k, seq in self.hot.items() if seq <= safe_seq]:
            del self.hot[key]
            place = self._place.pop(key)
            self._slots[place] = 0
            self._free[place] = None
            touched[place // SLOTS] = None
        return list(touched)

    def sector(self, number: int) -> list[int]:
        """The slots of a sector, as they go to disk."""
        return self._slots[number * SLOTS : (number + 1) * SLOTS]
