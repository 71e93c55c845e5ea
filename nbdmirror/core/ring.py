"""Where records lie in the log's ring, and which part of it is free.

Positions grow for ever; a position's place in the file is ``position % capacity``. A record never
wraps: what does not fit before the end of the ring goes to its start, and a fill takes up the
rest. Space is used again only when a *durable* tail says so (O5), so there are two tails.
"""

from __future__ import annotations

from bisect import bisect_right

from nbdmirror.codec.record import HEADER_SIZE

INDEX_STEP = 64 * 1024
"""One entry of the seq index for so many bytes of log: 1 GiB of log costs 16 thousand entries."""


class Ring:
    """Head, tails, and a sparse index from seq to position."""

    def __init__(self, capacity: int, position: int, seq: int) -> None:
        assert capacity % HEADER_SIZE == 0
        self.capacity = capacity
        self.head = position
        self.next_seq = seq
        self.epoch = 0
        """Of the last record that was found, or came: none of an earlier one may follow (O10)."""
        self.tail = position
        self.tail_seq = seq
        self.durable_tail = position
        self._index_seqs = [seq]
        self._index_positions = [position]

    @property
    def used(self) -> int:
        """Bytes that hold records still needed."""
        return self.head - self.tail

    def room(self) -> int:
        """Bytes that may be written, a possible fill already taken off."""
        free = self.capacity - (self.head - self.durable_tail)
        return free - HEADER_SIZE

    def gap(self, size: int) -> int:
        """Bytes to fill before a record of ``size`` bytes can be placed at the head."""
        rest = self.capacity - self.head % self.capacity
        return rest if size > rest else 0

    def advance(self, seq: int, records: int, size: int) -> None:
        """``records`` records, the first being ``seq``, now take ``size`` bytes at the head."""
        assert seq == self.next_seq
        if self.head - self._index_positions[-1] >= INDEX_STEP:
            self._index_seqs.append(seq)
            self._index_positions.append(self.head)
        self.head += size
        self.next_seq = seq + records
        assert self.head - self.durable_tail <= self.capacity

    @property
    def place(self) -> tuple[int, int, int]:
        """Where the head is, to come back to."""
        return self.head, self.next_seq, len(self._index_seqs)

    def take_back(self, place: tuple[int, int, int]) -> None:
        """What was appended since then never was; nothing was released since."""
        self.head, self.next_seq, indexed = place
        del self._index_seqs[indexed:], self._index_positions[indexed:]

    def locate(self, seq: int) -> tuple[int, int]:
        """(seq, position) of an indexed record at or before ``seq``: start reading there."""
        assert self.tail_seq <= seq <= self.next_seq
        at = bisect_right(self._index_seqs, seq) - 1
        return self._index_seqs[at], self._index_positions[at]

    def release(self, seq: int, position: int) -> None:
        """Records before ``seq``, which lies at ``position``, are needed no more."""
        assert self.tail_seq <= seq <= self.next_seq and self.tail <= position <= self.head
        self.tail, self.tail_seq = position, seq
        keep = bisect_right(self._index_seqs, seq) - 1
        if keep > 0:
            del self._index_seqs[:keep]
            del self._index_positions[:keep]
        if self._index_seqs[0] < seq:
            self._index_seqs[0], self._index_positions[0] = seq, position
