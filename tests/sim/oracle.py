"""What may be read, and when: the reference model that every byte in a simulated run is held to.

``Content`` is what a client may conclude from its own requests, cell by cell: after a crash a cell
holds the newest value that was made durable, or a newer one. ``History`` is the group after each
seq, as the primary logged it, with a new line of history for each power loss: what a consistent
secondary must equal (I1). Neither looks into the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

ID_BYTES = 8
RESTARTED = "after the restart"


class Violation(Exception):
    """The product broke a promise."""


class Moot(Exception):
    """What is left of a run cannot be judged: disks have lost what nobody else had, and said so."""


class Defect(Violation):
    """The product says itself that its code failed: no wrong result was seen yet."""


class Write:
    """A client's write or clearing: when it was issued, ended, and what it was told.

    Times are counts of the oracle's own events. ``ended`` is None while it is in flight."""

    __slots__ = ("acked", "durable", "ended", "issued", "value")

    def __init__(self, value: int, issued: int) -> None:
        self.value = value
        self.issued = issued
        self.ended: int | None = None
        self.acked = False
        self.durable = False


def pattern(value: int, length: int) -> bytes:
    """The bytes of a write: every 8 of them name it; 0 is a clearing."""
    return value.to_bytes(ID_BYTES, "little") * (length // ID_BYTES)


class Content:
    """The values that each cell of each volume may hold."""

    def __init__(self, sizes: Sequence[int], cell: int) -> None:
        self.cell = cell
        self.now = 0
        self._last_value = 0
        ground = Write(0, 0)
        ground.ended, ground.acked, ground.durable = 0, True, True
        self._cells = [[[ground] for _ in range(size // cell)] for size in sizes]
        self._newest = [bytearray(size) for size in sizes]
        """What each volume holds if the newest write of each cell is what is there."""
        self._flying: dict[Write, None] = {}
        self._reading: dict[int, None] = {}
        self._volatile: list[Write] = []
        self._unknown: dict[int, int] = {}
        """By volume of which nobody can say yet what a crash has left: the time of that crash."""

    def value(self) -> int:
        """A value that was never written."""
        self._last_value += 1
        return self._last_value

    def begin(self, volume: int, offset: int, length: int, value: int) -> Write:
        """A client issues a write (value 0: a clearing) of whole cells."""
        self.now += 1
        write = Write(value, self.now)
        self._flying[write] = None
        cells = self._cells[volume]
        self._newest[volume][offset : offset + length] = pattern(value, length)
        for index in range(offset // self.cell, (offset + length) // self.cell):
            history = cells[index]
            if len(history) > 4 and volume not in self._unknown:
                # What a read that is under way may still find stays.
                oldest = min(self._reading, default=self.now)
                settled = (w.issued for w in history if w.durable and w.ended < oldest)  # type: ignore[operator]
                floor = max(settled, default=0)
                history[:] = [w for w in history if w.ended is None or w.ended >= floor]
            history.append(write)
        return write

    def end(self, write: Write, *, acked: bool, durable: bool = False) -> None:
        """The client was answered (``acked``: success; ``durable``: with FUA)."""
        if write.ended is not None:
            return  # the node died first
        self.now += 1
        del self._flying[write]
        write.ended, write.acked, write.durable = self.now, acked, acked and durable
        if acked and not durable:
            self._volatile.append(write)

    @contextmanager
    def reading(self) -> Iterator[int]:
        """A client reads meanwhile; what is given is to be passed to ``check``."""
        self.now += 1
        since = self.now
        self._reading[since] = None
        try:
            yield since
        finally:
            del self._reading[since]

    def flush_issued(self) -> int:
        """A client issues a flush; pass what is returned to ``flushed`` when it succeeds."""
        self.now += 1
        return self.now

    def flushed(self, issued: int) -> None:
        """It has succeeded: every write answered before it was issued is durable."""
        rest = []
        for write in self._volatile:
            assert write.ended is not None
            if write.ended < issued:
                write.durable = True
            else:
                rest.append(write)
        self._volatile = rest

    def forget_volatile(self) -> None:
        """The log's disk lost what was not durable: no answer to a write counts, but for those."""
        for write in self._volatile:
            write.acked = False
        self._volatile = []

    def died(self) -> None:
        """The node is gone: what was in flight will not be answered."""
        self.now += 1
        for write in self._flying:
            write.ended = self.now
        self._flying.clear()

    def check(
        self, volume: int, offset: int, data: bytes, *, since: int, crashed: bool, what: str
    ) -> None:
        """Violation unless every cell of ``data`` holds a value that it may.

        ``since``: when the read was issued. ``crashed``: after a power loss only what was durable
        counts, else all that was acknowledged before ``since``."""
        # The newest write of a cell is always allowed: there is none that overwrote it.
        wanted = self._newest[volume][offset : offset + len(data)]
        if data == wanted:
            return
        cell = self.cell
        first = offset // cell
        cells = self._cells[volume]
        for index in range(len(data) // cell):
            piece = data[index * cell : (index + 1) * cell]
            if piece == wanted[index * cell : (index + 1) * cell]:
                continue
            found = int.from_bytes(piece[:ID_BYTES], "little")
            history = cells[first + index]
            if piece != pattern(found, cell):
                raise Violation(f"{what}: volume {volume}, cell {first + index} is torn")
            if crashed:
                floor = max((w.issued for w in history if w.durable), default=0)
            else:
                floor = max(
                    (w.issued for w in history if w.acked and w.ended and w.ended < since),
                    default=0,
                )
            if not any(w.value == found and (w.ended is None or w.ended >= floor) for w in history):
                raise Violation(
                    f"{what}: volume {volume}, cell {first + index} holds write {found}; "
                    f"it had {[(w.value, w.issued, w.ended, w.acked, w.durable) for w in history]},"
                    f" those ended before {floor} are overwritten"
                )

    def recovered(self, images: Sequence[bytes | None], *, power: bool) -> None:
        """Checks the volumes after a restart; what they hold is what the future starts from. None:
        that is not known yet of a volume (``settle``)."""
        for volume, image in enumerate(images):
            if image is not None:
                self.check(volume, 0, image, since=self.now, crashed=power, what=RESTARTED)
        self.now += 2
        if power:
            self.forget_volatile()
        for volume, image in enumerate(images):
            if image is not None:
                self._settle(volume, image, durable=power)
            else:
                self._unknown.setdefault(volume, self.now)

    def _settle(self, volume: int, image: bytes, *, durable: bool) -> None:
        settled: dict[int, Write] = {}
        self._newest[volume][:] = image
        for history, value in zip(self._cells[volume], self._values(image), strict=True):
            if len(history) == 1:
                continue
            write = settled.get(value)
            if write is None:
                write = settled[value] = self._settled(value, self.now, durable=durable)
            if durable:
                history[:] = [write]
            else:
                history.append(write)
        if not durable:
            self._volatile.extend(settled.values())

    def _settled(self, value: int, ended: int, *, durable: bool) -> Write:
        write = Write(value, ended - 1)
        write.ended, write.acked, write.durable = ended, True, durable
        return write

    def _values(self, image: bytes) -> Iterator[int]:
        for at in range(0, len(image), self.cell):
            yield int.from_bytes(image[at : at + ID_BYTES], "little")

    def settle(self, volume: int, image: bytes) -> None:
        """It has come to light what the crash had left of a volume: what was written since comes
        on top."""
        then, cells = self._unknown.pop(volume), self._cells[volume]
        later = [[w for w in history if w.issued > then] for history in cells]
        for history in cells:
            history[:] = [w for w in history if w.issued <= then]
        self._newest[volume][:] = self._newest_of(volume)
        self.check(volume, 0, image, since=then, crashed=True, what=RESTARTED)
        for history, value, rest in zip(cells, self._values(image), later, strict=True):
            history[:] = [self._settled(value, then, durable=True), *rest]
        self._newest[volume][:] = self._newest_of(volume)

    def _newest_of(self, volume: int) -> bytes:
        return b"".join(pattern(history[-1].value, self.cell) for history in self._cells[volume])


@dataclass(frozen=True, slots=True)
class Entry:
    """A record, as far as an image is concerned; ``payload`` None clears."""

    volume: int
    offset: int
    length: int
    payload: bytes | None


@dataclass(slots=True)
class Line:
    """One line of history: an image after ``base_seq``, and the records that follow."""

    base: list[bytes]
    base_seq: int
    first_epoch: int
    entries: list[Entry] = field(default_factory=list)
    _images: list[bytearray] = field(default_factory=list)
    _at: int = -1

    @property
    def head(self) -> int:
        """The seq of its last record."""
        return self.base_seq + len(self.entries)

    def image(self, seq: int) -> list[bytearray]:
        """All volumes after ``seq``; do not keep."""
        assert self.base_seq <= seq <= self.head
        if self._at < 0 or seq < self._at:
            self._images = [bytearray(data) for data in self.base]
            self._at = self.base_seq
        for entry in self.entries[self._at - self.base_seq : seq - self.base_seq]:
            data = bytes(entry.length) if entry.payload is None else entry.payload
            self._images[entry.volume][entry.offset : entry.offset + entry.length] = data
        self._at = seq
        return self._images

    def rebase(self, volume: int, image: bytes) -> None:
        """A volume was something else where it begins."""
        self.base[volume] = image
        self._at = -1


class History:
    """The group after each seq."""

    def __init__(self, images: list[bytes]) -> None:
        self.lines = [Line(images, 0, 0)]
        self.attempted: Sequence[Entry] = ()
        """What was last handed to the log, which may have failed after some of it."""

    @property
    def head(self) -> int:
        """The seq of the primary's last record."""
        return self.lines[-1].head

    def found(self, end_seq: int) -> None:
        """The primary recovered up to ``end_seq``: of the last records that failed to be logged,
        some may be in the log nevertheless."""
        extra = end_seq - self.head
        if 0 < extra <= len(self.attempted):
            self.lines[-1].entries.extend(self.attempted[:extra])

    def append(self, seq: int, entries: Sequence[Entry]) -> None:
        """The primary logs records, the first being ``seq``."""
        line = self.lines[-1]
        if seq != line.head + 1:
            raise Violation(f"record {seq} is appended behind {line.head}")
        line.entries.extend(entries)

    def fork(self, epoch: int, end_seq: int, images: list[bytes]) -> None:
        """The primary recovered from a power loss: it goes on from ``end_seq`` in ``epoch``."""
        if not self.lines[-1].base_seq <= end_seq <= self.head:
            raise Violation(f"recovered up to record {end_seq}, the head was {self.head}")
        self.lines.append(Line(images, end_seq, epoch))

    def restored(self, seq: int, images: dict[int, bytes]) -> None:
        """Volumes were restored at the record ``seq``, beside the log: they hold ``images``."""
        line = self.lines[-1]
        found = [bytes(data) for data in line.image(seq)]
        for volume, data in images.items():
            found[volume] = data
        later = line.entries[seq - line.base_seq :]
        del line.entries[seq - line.base_seq :]
        self.lines.append(Line(found, seq, line.first_epoch, later))

    def back_to(self, seq: int) -> None:
        """The marks after ``seq`` are lost: what they said was changed beside the log is not."""
        while self.lines[-1].base_seq > seq and len(self.lines) > 1:
            self.lines.pop()

    def settle(self, volume: int, image: bytes, number: int) -> None:
        """It has come to light what a volume held where line ``number`` begins."""
        for line, former in zip(self.lines[number:], [None, *self.lines[number:-1]], strict=True):
            if former is not None:
                image = bytes(former.image(line.base_seq)[volume])
            line.rebase(volume, image)

    def image(self, epoch: int, seq: int) -> list[bytearray]:
        """The group after ``seq`` as a node knows it that has followed up to ``epoch``."""
        lines = [line for line in self.lines if line.first_epoch <= epoch]
        while seq < lines[-1].base_seq:
            lines.pop()
        line = lines[-1]
        if seq > line.head:
            raise Violation(f"record {seq} in epoch {epoch}: that history ends at {line.head}")
        return line.image(seq)


def compare(found: Sequence[bytes], wanted: Sequence[bytes | bytearray], what: str) -> None:
    """Violation naming the first difference between two sets of volumes."""
    for volume, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if one == other:
            continue
        at = next(i for i in range(0, len(one), 32) if one[i : i + 32] != other[i : i + 32])
        values = [int.from_bytes(data[at : at + ID_BYTES], "little") for data in (one, other)]
        raise Violation(
            f"{what}: volume {volume} differs at {at}: write {values[0]} instead of {values[1]}"
        )
