"""The data change map of one volume for one remote: a bit per region that differs (V1).

Owns the bits in memory, by pages, so that a volume of 64 TiB costs what is marked and not what it
measures: a page that is not there stands for ``default`` in all its regions. Full synchronisation
is ``fill()``: the default turns to 1 and every page goes. Knows nothing of files;
``engine.maps`` makes durable the pages that the mutators name.

A region that a resync has read is *in flight* until the remote has it on disk; its bit stays set
meanwhile. ``finish`` clears it only if nothing marked it again after it was read (O6, O13).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from bitarray import bitarray

from nbdmirror.codec.mappage import BITMAP_BYTES, BITS

WIDE = 512
"""Windows of more regions than this, holes of a large volume, are kept as one, not by region."""


class _WideWindow:
    """Consecutive regions in flight under one token, and which of them no longer are."""

    __slots__ = ("count", "first", "taken_out")

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self.taken_out: bitarray | None = None

    def take_out(self, first: int, last: int) -> None:
        low, high = max(first - self.first, 0), min(last + 1 - self.first, self.count)
        if low < high:
            if self.taken_out is None:
                self.taken_out = bitarray(self.count, endian="little")
                self.taken_out.setall(False)
            self.taken_out[low:high] = True


class Dcm:
    """Bits for ``regions`` regions; mutators return the pages that must be written (O12)."""

    def __init__(self, regions: int) -> None:
        assert regions > 0
        self.regions = regions
        self.default = False
        self._pages: dict[int, bitarray] = {}
        self._numbers: list[int] = []
        """Of the pages that are there, ascending: a walk passes over those that are not."""
        self._in_flight: dict[int, int] = {}
        self._wide: dict[int, _WideWindow] = {}
        self.count = 0
        """Regions marked."""

    @property
    def page_count(self) -> int:
        """Pages that a map of this size has."""
        return -(-self.regions // BITS)

    def _page_regions(self, number: int) -> int:
        return min(BITS, self.regions - number * BITS)

    def _page(self, number: int) -> bitarray:
        page = self._pages.get(number)
        if page is None:
            page = bitarray(BITS, endian="little")
            page.setall(self.default)
            # Bits past the last region stay 0, so that counts and searches are right.
            page[self._page_regions(number) :] = False
            self._put_page(number, page)
        return page

    def _put_page(self, number: int, page: bitarray) -> None:
        if number not in self._pages:
            insort(self._numbers, number)
        self._pages[number] = page

    def is_marked(self, region: int) -> bool:
        """Whether the region's bit is set."""
        number, bit = divmod(region, BITS)
        page = self._pages.get(number)
        return self.default if page is None else bool(page[bit])

    def mark(self, first: int, last: int) -> list[int]:
        """Sets the bits of regions first..last; returns the pages that changed."""
        assert 0 <= first <= last < self.regions
        if last - first < len(self._in_flight):
            for region in range(first, last + 1):
                self._in_flight.pop(region, None)
        elif self._in_flight:
            for region in [r for r in self._in_flight if first <= r <= last]:
                del self._in_flight[region]
        self._take_out(first, last)
        changed = []
        for number in range(first // BITS, last // BITS + 1):
            if number not in self._pages and self.default:
                continue
            page = self._page(number)
            low = max(first - number * BITS, 0)
            high = min(last - number * BITS + 1, BITS)
            missing = high - low - page.count(True, low, high)
            if missing:
                page[low:high] = True
                self.count += missing
                changed.append(number)
        return changed

    def merge(self, other: Dcm) -> list[int]:
        """Sets every bit that ``other`` has, of as many regions; returns the pages that changed.

        ``other`` must have no default of 1."""
        assert other.regions == self.regions and not other.default
        for region in [r for r in self._in_flight if other.is_marked(r)]:
            del self._in_flight[region]
        if self._wide:
            for first, count in other.runs():
                self._take_out(first, first + count - 1)
        changed = []
        for number in other._numbers:
            if number not in self._pages and self.default:
                continue
            page = self._page(number)
            before = page.count()
            page |= other._pages[number]
            if page.count() > before:
                self.count += page.count() - before
                changed.append(number)
        return changed

    def unmark(self, region: int) -> int | None:
        """Clears one bit; returns the page that changed."""
        if not self.is_marked(region):
            return None
        number, bit = divmod(region, BITS)
        self._page(number)[bit] = False
        self.count -= 1
        return number

    def fill(self) -> None:
        """Sets every bit; the pages on disk are void, the default must be made durable."""
        self.default = True
        self._pages.clear()
        self._numbers.clear()
        self.abandon()
        self.count = self.regions

    def clear(self) -> None:
        """Clears every bit; the pages on disk are void, the default must be made durable."""
        self.default = False
        self._pages.clear()
        self._numbers.clear()
        self.abandon()
        self.count = 0

    def begin(self, first: int, count: int, token: int) -> None:
        """A resync is about to read these regions, and will name them by ``token``, which names
        one window at a time."""
        if count <= WIDE:
            if self._wide:
                self._take_out(first, first + count - 1)
            self._in_flight.update(dict.fromkeys(range(first, first + count), token))
            return
        for region in [r for r in self._in_flight if first <= r < first + count]:
            del self._in_flight[region]
        self._take_out(first, first + count - 1)
        self._wide[token] = _WideWindow(first, count)

    def _take_out(self, first: int, last: int) -> None:
        for window in self._wide.values():
            window.take_out(first, last)

    def _land(self, first: int, count: int, token: int) -> bitarray | None:
        """Takes a window out of flight; returns which of its regions are not to be cleared."""
        window = self._wide.get(token)
        if window is not None and (window.first, window.count) == (first, count):
            del self._wide[token]
            return window.taken_out
        flying, regions = self._in_flight, range(first, first + count)
        kept = bitarray([flying.get(region) != token for region in regions], endian="little")
        for at in kept.search(bitarray("0")):
            del flying[first + at]
        return kept if kept.any() else None

    def finish(self, first: int, count: int, token: int) -> list[int]:
        """The remote has the regions of that token on disk; returns the pages that changed."""
        kept = self._land(first, count, token)
        changed = []
        for number in range(first // BITS, (first + count - 1) // BITS + 1):
            if number not in self._pages and not self.default:
                continue
            page = self._page(number)
            low = max(first - number * BITS, 0)
            high = min(first + count - number * BITS, BITS)
            before = page.count(True, low, high)
            if kept is None:
                page[low:high] = False
            else:
                at = number * BITS + low - first
                page[low:high] &= kept[at : at + high - low]
            cleared = before - page.count(True, low, high)
            if cleared:
                self.count -= cleared
                changed.append(number)
        return changed

    def abandon(self) -> None:
        """The link is gone: what was in flight is simply marked again."""
        self._in_flight.clear()
        self._wide.clear()

    def runs(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """Marked stretches (first, count) from ``start`` on, in ascending order."""
        at = start
        while at < self.regions:
            first = self._next(at, True)
            if first is None:
                return
            end = self._next(first, False)
            end = self.regions if end is None else end
            yield first, end - first
            at = end

    def _next(self, start: int, value: bool) -> int | None:
        """The first region from ``start`` on whose bit is ``value``."""
        number, bit = divmod(start, BITS)
        while number * BITS < self.regions:
            page = self._pages.get(number)
            if page is not None:
                found = page.find(value, bit, self._page_regions(number))
                if found >= 0:
                    return number * BITS + found
                number += 1
            elif self.default == value:
                return number * BITS + bit
            else:
                # No walk over the pages that a large volume does not have (I7).
                at = bisect_left(self._numbers, number)
                if at == len(self._numbers):
                    return None
                number = self._numbers[at]
            bit = 0
        return None

    def page_bits(self, number: int) -> bytes:
        """The bits of one page as they go to disk."""
        return self._page(number).tobytes()

    def load_page(self, number: int, bits: bytes) -> None:
        """Takes over a page that was read back."""
        assert len(bits) == BITMAP_BYTES
        page = bitarray(endian="little")
        page.frombytes(bits)
        page[self._page_regions(number) :] = False
        self.count += page.count() - (self._page_regions(number) if self.default else 0)
        self._put_page(number, page)
