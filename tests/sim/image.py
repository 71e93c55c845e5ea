"""The bytes of a simulated file: sparse, made of pages that copies share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

PAGE = 4096
SECTOR = 512
ZERO_PAGE = bytes(PAGE)


@dataclass(slots=True)
class Change:
    """One write (``data``), clearing (``data`` is None) or new length of a file; never changed.

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

    def pages(self) -> Iterator[tuple[int, Change]]:
        """(page, the part in it) of what it writes or clears."""
        for index in range(self.offset // PAGE, -(-(self.offset + self.length) // PAGE)):
            yield index, self._part(index * PAGE, (index + 1) * PAGE)

    def _part(self, start: int, end: int) -> Change:
        start = max(start, self.offset)
        end = min(end, self.offset + self.length)
        data = self.data and self.data[start - self.offset : end - self.offset]
        return Change(start, end - start, data, self.size, self.hole)


class Image:
    """Content and length; a page that is absent is a hole. Bytes past the end are zeros.

    Copies share pages. A page that only one image has is a bytearray in ``_own`` too, and is
    written in place; all others are never changed.
    """

    __slots__ = ("_own", "_pages", "size")

    def __init__(self) -> None:
        self._pages: dict[int, bytes | bytearray] = {}
        self._own: dict[int, bytearray] = {}
        self.size = 0

    def copy(self) -> Image:
        other = Image()
        other._pages = self._pages.copy()
        other.size = self.size
        self._own.clear()
        return other

    def read(self, offset: int, length: int) -> bytes:
        index, start = divmod(offset, PAGE)
        pages = self._pages
        if start + length <= PAGE:
            return bytes(pages.get(index, ZERO_PAGE)[start : start + length])
        last = (offset + length - 1) // PAGE
        data = b"".join([pages.get(i, ZERO_PAGE) for i in range(index, last + 1)])
        return data if len(data) == length else data[start : start + length]

    def write(self, offset: int, data: bytes) -> None:
        """Stores bytes; does not set the length (see ``put`` and ``trim``)."""
        index, start = divmod(offset, PAGE)
        length = len(data)
        if start + length <= PAGE:
            self._write_page(index, start, data)
            return
        self._write_page(index, start, data[: PAGE - start])
        for at in range(PAGE - start, length, PAGE):
            index += 1
            self._write_page(index, 0, data[at : at + PAGE])

    def _write_page(self, index: int, start: int, piece: bytes) -> None:
        if len(piece) == PAGE:
            self._own.pop(index, None)
            self._pages[index] = piece
            return
        page = self._own.get(index)
        if page is None:
            page = bytearray(self._pages.get(index, ZERO_PAGE))
            self._own[index] = self._pages[index] = page
        page[start : start + len(piece)] = piece

    def put(self, change: Change) -> None:
        """A change, with the length that it leaves."""
        self.put_content(change)
        if change.size != self.size:
            self.resize(change.size)

    def put_content(self, change: Change) -> None:
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
                self._write_page(index, 0, ZERO_PAGE)
            elif hole and (count == PAGE or (start == 0 and end >= self.size)):
                self._drop(index)
            elif index in self._pages or not hole:
                self._write_page(index, start, bytes(count))
            offset += count

    def _drop(self, index: int) -> None:
        self._pages.pop(index, None)
        self._own.pop(index, None)

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
            self._drop(index)
        if last in self._pages:
            self._write_page(last, used, bytes(PAGE - used))

    def has(self, index: int) -> bool:
        """Whether that page is no hole."""
        return index in self._pages

    def take(self, index: int, other: Image) -> None:
        """A page becomes what it is in another image."""
        self._own.pop(index, None)
        if other.has(index):
            self._pages[index] = bytes(other._pages[index])
        else:
            self._pages.pop(index, None)

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
