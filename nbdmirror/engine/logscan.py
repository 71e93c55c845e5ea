"""Finding the end of a log, from what its file holds: for recovery, before anything is appended.

A record counts if it follows from the one before (O10); the first that does not is the end. Within
one boot an end may be damage: then what remains of a record lies there, or whole ones lie behind.
Called by ``engine.log`` with its own file and ring, and moves the ring's head.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from nbdmirror.codec import record as codec
from nbdmirror.codec.record import Record
from nbdmirror.core.ring import Ring
from nbdmirror.errors import FormatError

SEARCH_BYTES = 2 * codec.PAYLOAD_MAX + (64 << 10)
"""Where the log ends for recovery, so much behind is looked at for a sign that it went on."""
WINDOW_BYTES = 4 << 20

Forks = list[tuple[int, int]]


class Unfinished(NamedTuple):
    """A record of which the log has the header, and not all of the payload: a kill in the middle of
    the append leaves that (fault 1), and so does damage."""

    record: Record
    header: bytes

    def was(self, payload: bytes) -> bool:
        """Whether this is what it carried."""
        size = codec.stored_size(self.record.kind, self.record.length)
        try:
            codec.parse(memoryview((self.header + payload).ljust(size, b"\0")), 0)
        except FormatError:
            return False
        return True


class Readable(Protocol):
    """What is asked of the file."""

    def pread(self, offset: int, length: int) -> bytes:
        """See ``ports.File``."""


def scan(file: Readable, base: int, ring: Ring, forks: Forks, epoch_max: int) -> Iterator[Record]:
    """See ``Log.scan``; the ring begins at ``base`` in the file."""
    end = ring.head
    for record in follow(file, base, ring, forks, epoch_max):
        if record.kind != codec.FILL:
            end = ring.head
            yield record
    # A fill with nothing behind it is dropped: its epoch may end here, and the next scan would
    # not pass it to what is appended now.
    ring.head = end


def follow(file: Readable, base: int, ring: Ring, forks: Forks, epoch_max: int) -> Iterator[Record]:
    """Every valid record from the tail on, fills too."""
    view, begin = memoryview(b""), 0
    while ring.head - ring.tail <= ring.capacity:
        at = ring.head % ring.capacity
        if not begin <= at < begin + len(view):
            view, begin = window(file, base, ring, at), at
        try:
            record = codec.parse(view, at - begin)
        except FormatError:
            if begin == at:
                return
            view, begin = window(file, base, ring, at), at
            continue
        if record.seq != ring.next_seq or not ring.epoch <= record.epoch <= epoch_max:
            return
        if _ended(record, forks):
            return
        ring.epoch = record.epoch
        size = codec.stored_size(record.kind, record.length)
        if ring.head + size - ring.tail > ring.capacity:
            return
        if record.kind == codec.FILL:
            ring.head += size
        else:
            ring.advance(record.seq, 1, size)
        yield record


def window(file: Readable, base: int, ring: Ring, at: int) -> memoryview:
    """A piece of the ring that is read at once."""
    return memoryview(file.pread(base + at, min(WINDOW_BYTES, ring.capacity - at)))


def seq_behind(file: Readable, base: int, ring: Ring, forks: Forks) -> int:
    """See ``Log.seq_behind``. The head itself counts: there the last record of all may be damaged,
    with nothing behind it."""
    found = (record for _, record in behind(file, base, ring))
    seq = next((record.seq for record in found if not _ended(record, forks)), 0)
    return seq or (ring.next_seq if remains(file, base, ring) else 0)


def unfinished(file: Readable, base: int, ring: Ring, forks: Forks) -> Unfinished | None:
    """The next record, if its header is whole, its payload is not, and nothing lies behind it."""
    found = [one for one in behind(file, base, ring) if not _ended(one[1], forks)]
    if len(found) != 1 or found[0][1].seq != ring.next_seq:
        return None
    position, record = found[0]
    at = position % ring.capacity
    size = codec.stored_size(record.kind, record.length)
    if at + size > ring.capacity:
        return None
    one = Unfinished(record, file.pread(base + at, codec.HEADER_SIZE))
    return None if one.was(file.pread(base + at, size)[codec.HEADER_SIZE :]) else one


def remains(file: Readable, base: int, ring: Ring) -> bool:
    """Whether what damage left of the next record's header lies at the head."""
    data = file.pread(base + ring.head % ring.capacity, codec.HEADER_SIZE)
    return codec.was_header(data, ring.next_seq)


def behind(file: Readable, base: int, ring: Ring) -> Iterator[tuple[int, Record]]:
    """(position, record) of the headers of later records behind the head, as long as one follows
    near enough to the last."""
    at, end = ring.head, ring.tail + ring.capacity
    limit = min(end, at + SEARCH_BYTES)
    while at < limit:
        place = at % ring.capacity
        length = min(WINDOW_BYTES, limit - at, ring.capacity - place)
        for offset, record in codec.find_headers(file.pread(base + place, length)):
            if record.seq >= ring.next_seq and record.kind != codec.FILL:
                limit = min(end, at + offset + SEARCH_BYTES)
                yield at + offset, record
        at += length


def _ended(record: Record, forks: Forks) -> bool:
    """Whether its epoch had ended before it."""
    return any(record.seq > end and record.epoch <= old for old, end in forks)


def peek(view: memoryview) -> tuple[int, int]:
    """(kind, length) from a header, unverified: enough to know how much to read."""
    (kind,) = struct.unpack_from("<B", view, 5)
    (length,) = struct.unpack_from("<Q", view, 32)
    return kind, length
