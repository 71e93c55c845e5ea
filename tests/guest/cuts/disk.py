"""A guest's disk that outlives it, and what a power cut leaves on it.

Owns the image, and since the last switch-on a copy of it and the trace of its writes and flushes.
Used by ``machine``. The replay is that of ``faults.blocktrace``.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from enum import Enum
from pathlib import Path

from tests.faults.blocktrace import Replay, copy, read_trace
from tests.guest.guest import Disk

NEVER = 1 << 62
KEEP_ALL, KEEP_NONE = 0, 1
"""The seeds with which a replay keeps all unflushed writes, or none."""


class Fate(Enum):
    """What becomes of the writes that no flush covered."""

    KEPT = "kept"
    LOST = "lost"
    MIXED = "mixed"


class CutDisk:
    """An image of ``size`` bytes. ``lies_from``: behind this position of the trace the disk has
    flushed nothing when it says so."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.lies_from = NEVER
        self._base = path.with_name(f"{path.name}.base")
        self._trace = path.with_name(f"{path.name}.trace")
        with path.open("wb") as file:
            file.truncate(size)

    def format(self) -> None:
        """Makes an ext4 on it."""
        options = "lazy_itable_init=0,lazy_journal_init=0"
        make = ["mkfs.ext4", "-q", "-F", "-E", options, "-J", "size=4", str(self.path)]
        subprocess.run(make, check=True)

    def switch_on(self) -> Disk:
        """A new life begins: of what was written before, all is flushed."""
        copy(self.path, self._base)
        self._trace.write_bytes(b"")
        return Disk(self.path, trace=self._trace)

    def clock(self) -> int:
        """The position in the trace now."""
        return self._trace.stat().st_size

    def cut(self, at: int, seed: int) -> int:
        """What is left of the image when the power went at this position of the trace; returns how
        many writes were unflushed then. The guest is gone already."""
        entries = [
            replace(entry, flush=entry.flush and entry.end <= self.lies_from)
            for entry in read_trace(self._trace, at)
        ]
        replay = Replay(self._base, entries, self.path)
        return replay.cut(len(entries), seed)
