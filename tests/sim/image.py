"""The bytes of a simulated file: sparse, made of immutable pages so that copies share them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

PAGE = 4096
SECTOR = 512
ZERO_PAGE = bytes(PAGE)


@dataclass(frozen=True, slots=True)
class Change:
    """One write (``data``), clearing (``data`` is None) or new length of a file.

    ``size`` is the file's length afterwards. A ``hole`` gives its pages back.
    """

    offset: int
    length: int
    data: bytes | None
    size: int
    hole: bool = False

    def torn(self, rng: random.Random) -> Iterator[Change]:
        """What of it reaches the disk before a power cut: all, nothing, or each sector drawn.

        Cleared ranges are torn by page: that is how filesystems clear.
        """
        whole = rng.randrange(4)
        if whole == 0 or self.length == 0:
            return
        if whole == 1:
            yield self
            return
        unit = SECTOR if self.data is not None else PAGE
        first = self.offset // unit
        count = (self.offset + self.length - 1) // unit - first + 1
        bits = rng.getrandbits(count)
        for index in range(count):
            if bits >> index & 1:
                yield self._part((first + index) * unit, (first + index + 1) * unit)

    def _part(self, start: int, end: int) -> Change:
        start = max(start, self.offset)
        end = min(end, self.offset + self.length)
        data = self.data and self.data[start - self.offset : end - self.offset]
        return Change(start, end - start, data, self.size, self.hole)


class Image:
    """Content and length; a page that is absent is a hole. Bytes past the end are zeros."""

    __slots__ = ("_pages", "size")

    def __init__(self) -> None:
        self._pages: dict[int, bytes] = {}
        self.size = 0

    def copy(self) -> Image:
        other = Image()
        other._pages = self._pages.copy()
        other.size = self.size
        return other

    def read(self, offset: int, length: int) -> bytes:
        index, start = divmod(offset, PAGE)
        pages = self._pages
        if start + length <= PAGE:
            return pages.get(index, ZERO_PAGE)[start : start + length]
        last = (offset + length - 1) // PAGE
        parts = [pages.get(i, ZERO_PAGE) for i in range(index, last + 1)]
        return b"".join(parts)[start : start + length]

    def write(self, offset: int, data: bytes) -> None:
        """Stores bytes; does not set the length (see ``put`` and ``trim``)."""
        pages = self._pages
        done = 0
        while done < len(data):
            index, start = divmod(offset + done, PAGE)
            count = min(PAGE - start, len(data) - done)
            piece = data[done : done + count]
            if count != PAGE:
                old = pages.get(index, ZERO_PAGE)
                piece = old[:start] + piece + old[start + count :]
            pages[index] = piece
            done += count

    def put(self, change: Change) -> None:
        """The bytes of a change, without its length."""
        if change.data is not None:
            self.write(change.offset, change.data)
        elif change.length:
            self._clear(change.offset, change.length, change.hole)

    def _clear(self, offset: int, length: int, hole: bool) -> None:
        end = offset + length
        while offset < end:
            index, start = divmod(offset, PAGE)
            count = min(PAGE - start, end - offset)
            if not hole and count == PAGE:
                self._pages[index] = ZERO_PAGE
            elif hole and (count == PAGE or (start == 0 and end >= self.size)):
                self._pages.pop(index, None)
            elif index in self._pages or not hole:
                self.write(offset, bytes(count))
            offset += count

    def resize(self, size: int) -> None:
        """Sets the length; what is cut off reads as zeros if the file grows again."""
        shorter = size < self.size
        self.size = size
        if shorter:
            self.trim()

    def trim(self) -> None:
        """Forgets what lies past the end."""
        last, used = divmod(self.size, PAGE)
        for index in [i for i in self._pages if i > last or (i == last and not used)]:
            del self._pages[index]
        if last in self._pages:
            self._pages[last] = self._pages[last][:used].ljust(PAGE, b"\0")

    def allocated(self) -> int:
        """The bytes that its pages take on the disk."""
        return len(self._pages) * PAGE

    def fitting(self, offset: int, length: int, free: int) -> int:
        """How many of the bytes can be written if ``free`` bytes may be allocated."""
        done = 0
        while done < length:
            index, start = divmod(offset + done, PAGE)
            if index not in self._pages:
                if free < PAGE:
                    break
                free -= PAGE
            done = min(length, done + PAGE - start)
        return done

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The pieces within the range, and before the end, that have pages."""
        end = min(offset + length, self.size)
        while offset < end:
            index = offset // PAGE
            stop = index
            while stop * PAGE < end and stop in self._pages:
                stop += 1
            if stop > index:
                yield offset, min(stop * PAGE, end) - offset
            offset = max(stop, index + 1) * PAGE
