"""Batches of plain writes: what is done for each of a hundred thousand requests a second.

A plain write is an NBD WRITE without flags, or a write record. A receive full of them goes through
the primary in four steps, each one call for all of them, and through the secondary in one:

    take_writes     requests in a receive buffer -> where their payloads lie, and their replies
    stretches       the extents that they touch
    encode_writes   their records, one behind the other: what log, remotes and facets are given
    check_writes    records that came from a primary -> where their payloads lie, all verified

Whatever is not plain or not right ends a batch, and the code for single requests and records
(``nbdserver``, ``record``) takes over, which also knows how to say what is wrong.

A place says where a piece of a buffer belongs in a volume::

    offset  size  field
    0       8     offset   bytes into the volume
    8       8     at       bytes into the buffer
    16      4     length   bytes, at least 1
    20      4     volume   index of the volume within its group; 0 in a receive buffer

There is a compiled form (``_batch.c``) and a plain one (``batchpure``); NBDMIRROR_PURE=1 in the
environment asks for the plain one. Every function:

take_writes(view, start, end, length_max, export_size) -> (stop, places, replies, longest)
    The plain writes from ``start`` on that are whole before ``end``, not longer than ``length_max``
    and within the export; ``stop`` is where the first other thing begins. ``replies`` are their
    successes, 16 bytes each, simple as structured replies allow them to be; ``longest`` is the
    longest payload.
encode_writes(view, places, epoch, volume, seq, time_ns) -> (block, places)
    Their records (``codec.record``) with ascending seqs, and the places of their payloads in there.
stretches(places, size) -> [number, ...]
    Which stretches of ``size`` bytes the places touch, in their order; none twice in a row.
check_writes(view, next_seq, epoch_min, epoch_max, sizes) -> (start, places, largest, epoch) or None
    Of records that are all plain writes, whole, verified and within volumes of these ``sizes``
    (8 bytes each), of epochs up to ``epoch_max``, with seqs that go on at ``next_seq``, and epochs
    that go on from ``epoch_min`` and never back (O10): where the first new one begins (O8), the
    places in ``view[start:]``, the largest one's stored size, and the last one's epoch. None if
    there is anything else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nbdmirror.codec import batchpure, nbd
from nbdmirror.codec.batchpure import PLACE
from nbdmirror.codec.nbd import Request
from nbdmirror.ports import Buffer

__all__ = [
    "COMPILED",
    "LENGTH_MAX",
    "PLACE_SIZE",
    "Writes",
    "check_writes",
    "encode_writes",
    "pieces",
    "ranges",
    "singly",
    "stretches",
    "take_writes",
    "volumes_of",
]

PLACE_SIZE = PLACE.size
LENGTH_MAX = 32 << 10
"""Longer writes are not copied into a batch: their records are made of parts."""

if TYPE_CHECKING:
    from nbdmirror.codec.batchpure import check_writes, encode_writes, stretches, take_writes
else:
    compiled = batchpure
    if not os.environ.get("NBDMIRROR_PURE"):
        try:
            from nbdmirror.codec import _batch as compiled
        except ImportError:  # built where there was no compiler
            compiled = batchpure
    take_writes = compiled.take_writes
    encode_writes = compiled.encode_writes
    stretches = compiled.stretches
    check_writes = compiled.check_writes

COMPILED = take_writes is not batchpure.take_writes
"""Whether the compiled form is in use."""


class Writes:
    """The plain writes of one receive, still in the buffer that they came in."""

    __slots__ = ("longest", "places", "replies", "size", "view")

    type = -1
    """Where requests are told apart by their type: none of NBD's."""

    def __init__(
        self, view: memoryview, places: bytes, replies: bytes, size: int, longest: int
    ) -> None:
        """``size``: bytes of all payloads, ``longest`` of the longest."""
        self.view = view
        self.places = places
        self.replies = replies
        self.size = size
        self.longest = longest

    def __len__(self) -> int:
        return len(self.places) // PLACE_SIZE

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of each."""
        for offset, _, length, _ in PLACE.iter_unpack(self.places):
            yield offset, length

    def requests(self) -> list[Request]:
        """The same one by one, for whatever treats requests singly."""
        view = self.view
        cookies = (cookie for _, _, cookie in nbd.SIMPLE_REPLY.iter_unpack(self.replies))
        return [
            Request(nbd.WRITE, 0, cookie, offset, length, view[at : at + length])
            for (offset, at, length, _), cookie in zip(
                PLACE.iter_unpack(self.places), cookies, strict=True
            )
        ]


def singly(requests: Iterable[Request | Writes]) -> Iterator[Request]:
    """Requests one by one, plain writes too."""
    for request in requests:
        if isinstance(request, Writes):
            yield from request.requests()
        else:
            yield request


def volumes_of(places: bytes) -> list[int]:
    """The volumes that these are in, ascending."""
    return sorted({volume for _, _, _, volume in PLACE.iter_unpack(places)})


def ranges(places: bytes, volume: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the places in one volume."""
    for offset, _, length, index in PLACE.iter_unpack(places):
        if index == volume:
            yield offset, length


def pieces(block: Buffer, places: bytes, volume: int) -> Iterator[tuple[int, memoryview]]:
    """(offset, data) of the places in one volume."""
    view = memoryview(block)
    for offset, at, length, index in PLACE.iter_unpack(places):
        if index == volume:
            yield offset, view[at : at + length]
