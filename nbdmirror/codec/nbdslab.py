"""Where received bytes lie: slabs that the transport fills and that parsed payloads point into.

Owns the memory between the socket and the engine, so that a payload is never copied: views into
a slab live for as long as the log's tail and the senders need them (see ``slabs``). It never
looks at the bytes; its parser (``nbdserver``) moves ``start`` and sets ``need``.
"""

from __future__ import annotations

import mmap

from nbdmirror.codec.slabs import SlabPool
from nbdmirror.config import KIB

SLAB_BYTES = 260 * KIB
"""One request of 256 KiB with its header, and a bit of the next."""
SPACE_MIN = 16 * KIB
"""With less room than this behind the last request a fresh slab is begun."""
SMALL_SLAB_BYTES = 8 * KIB
SMALL_SPACE_MIN = KIB
_POOL = SlabPool(SLAB_BYTES)


class Slab:
    """The bytes ``view[start:end]`` are received and not yet parsed.

    Bounded: one slab, or one buffer as large as the item that is being received needs. Small
    until ``enlarge``: a client that has not said what it wants costs little."""

    __slots__ = ("_bytes", "_space_min", "end", "need", "skip", "start", "view")

    def __init__(self) -> None:
        self._bytes = SMALL_SLAB_BYTES
        self._space_min = SMALL_SPACE_MIN
        self.view = memoryview(bytearray(self._bytes))
        self.start = 0
        self.end = 0
        self.need = 0
        """Bytes from ``start`` on of the item being received; 0 while that is not known."""
        self.skip = 0
        """Bytes still to come that are dropped unseen."""

    def enlarge(self) -> None:
        """From the next slab on they are of full size."""
        self._bytes = SLAB_BYTES
        self._space_min = SPACE_MIN

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self.start + (self.need or self._space_min) > len(self.view):
            self._renew()
        assert self.end < len(self.view)
        return self.view[self.end :]

    def shrink(self) -> None:
        """Lets go of a buffer that was made for a long item, once that has been taken."""
        if self.start == self.end and len(self.view) > SLAB_BYTES and not self.need:
            self.view = memoryview(bytearray(SMALL_SLAB_BYTES))
            self.start = self.end = 0

    def received(self, length: int) -> None:
        """``length`` bytes were written into what ``space`` returned."""
        assert 0 <= length <= len(self.view) - self.end
        if not self.skip:
            self.end += length
            return
        assert self.start == self.end
        dropped = min(self.skip, length)
        self.skip -= dropped
        if length > dropped:  # else the same room takes the next bytes
            self.start += dropped
            self.end += length

    def discard(self, length: int) -> None:
        """Drops the next ``length`` bytes, of which some may still have to come."""
        here = self.end - self.start
        if length <= here:
            self.start += length
        else:
            self.skip = length - here
            self.end = self.start

    def _renew(self) -> None:
        """A fresh slab; the beginning of an incomplete item moves there."""
        size = max(self._bytes, self.need)
        fresh: memoryview
        if size < SLAB_BYTES:
            fresh = memoryview(bytearray(size))
        elif size == SLAB_BYTES:
            fresh = _POOL.take()
        else:  # its pages cost memory only once the client has really sent them
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            fresh = memoryview(mmap.mmap(-1, size, flags=flags))
        here = self.end - self.start
        fresh[:here] = self.view[self.start : self.end]
        self.view, self.start, self.end = fresh, 0, here
