"""What can go wrong with a simulated disk, one operation at a time."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a fault does to the operation it is given to."""

    ERROR = "error"  # fails, no effect (a failed sync: the pages stay dirty)
    SHORT = "short"  # a write: some sectors of it are in the cache, then it fails
    LOSE = "lose"  # a sync: fails, and the pages are clean afterwards though they never landed
    LIE = "lie"  # a sync: succeeds, nothing is durable
    FLIP = "flip"  # a read: one bit of the answer is wrong
    DROP = "drop"  # a write: succeeds, and nothing of it is there when it is read back
    REFUSED = "refused"  # a write: succeeds, is undone once it is to be written back; a sync fails
    STRAY = "stray"  # a write: succeeds, and lies ``shift`` bytes from where it should
    STALL = "stall"  # an awaited operation: takes ``seconds`` longer


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; ``number`` is the errno of those that fail, ``seconds`` what an awaited operation
    takes longer."""

    kind: Kind
    number: int = errno.EIO
    seconds: float = 0.0
    shift: int = 0
    then: Callable[[], None] | None = None
    """Called when a write has failed, in its middle: what a kill leaves of it."""

    def error(self, path: str) -> OSError:
        return OSError(self.number, f"simulated: {os.strerror(self.number)}", path)

    def label(self) -> str:
        if self.kind in (Kind.ERROR, Kind.SHORT, Kind.LOSE):
            return f"{self.kind.value} {errno.errorcode[self.number]}"
        return str(self.kind.value)

    def suits(self, operation: str) -> bool:
        """Whether that operation can fail that way; another pairing is a mistake in a test."""
        match self.kind:
            case Kind.ERROR:
                return True
            case Kind.SHORT:
                return operation in ("pwrite", "pwritev", "write", "allocate")
            case Kind.DROP | Kind.STRAY | Kind.REFUSED:
                return operation in WRITES
            case Kind.LOSE:
                return operation == "sync"
            case Kind.LIE:
                return operation in ("sync", "sync_directory")
            case Kind.FLIP:
                return operation in READS
            case Kind.STALL:
                return operation in AWAITED


Injector = Callable[[str, str, int], Fault | None]
"""(operation, path, nth) -> fault. ``nth`` counts, from 1, the operations of the disk that change
something, so that a sweep can hit each; for reads it counts reads. May itself cut the power."""

WRITES = ("pwrite", "pwritev", "write")
READS = ("pread", "try_pread", "read")
LOOKS = ("open", "list")
"""At what is there: they change nothing, and take no space."""
AWAITED = (
    "read",
    "write",
    "sync",
    "forget",
    "forget_range",
    "punch",
    "zero",
    "allocate",
    "sync_directory",
)


class Miswrites:
    """An injector: of the writes from now on to files whose path begins so, ``count`` from the
    ``nth`` on have a fault."""

    def __init__(self, path: str, fault: Fault, nth: int = 1, count: int = 1) -> None:
        self._path, self._fault = path, fault
        self._nth, self._count = nth, count
        self._seen = 0

    @property
    def last(self) -> bool:
        """Whether the last write had it."""
        return self._nth <= self._seen < self._nth + self._count

    @property
    def struck(self) -> int:
        """How many had it."""
        return max(0, min(self._seen - self._nth + 1, self._count))

    def __call__(self, operation: str, path: str, nth: int) -> Fault | None:
        if operation not in WRITES or not path.startswith(self._path):
            return None
        self._seen += 1
        return self._fault if self.last else None


@dataclass(slots=True)
class Timing:
    """Seconds that awaited operations take, drawn evenly between two bounds; and cache misses."""

    sync: tuple[float, float] = (0.000_1, 0.004)
    read: tuple[float, float] = (0.000_05, 0.001)
    write: tuple[float, float] = (0.000_01, 0.000_5)
    miss: float = 0.0  # how likely try_pread says None


class AllLost(random.Random):
    """The draws of a power cut after which nothing unsynced is left."""

    def random(self) -> float:
        return 0.99

    def randint(self, a: int, b: int) -> int:
        return a

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return 0 if stop is None else start


class AllKept(random.Random):
    """The draws of a power cut before which everything had reached the disk by itself."""

    def random(self) -> float:
        return 0.0

    def randint(self, a: int, b: int) -> int:
        return b

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return 1 if stop is None else start


def once(operation: str, prefix: str, fault: Fault) -> Injector:
    """The first operation of that kind on a file below ``prefix`` fails."""
    left = [fault]

    def inject(name: str, path: str, nth: int) -> Fault | None:
        if left and name == operation and path.startswith(prefix):
            return left.pop()
        return None

    return inject
