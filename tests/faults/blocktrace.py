"""A disk that keeps a trace of every write and flush, and images of what a power cut leaves of it.

Owns: a file system on a loop device over qemu-storage-daemon's ``blklogwrites``, the format of
that trace, replay. A node has several files and directories, so the whole file system lies on the
traced disk: one trace then orders all, the file system's own journal included. Used by
``test_power``.

A cut keeps every write before the last flush, and of the writes after it any, each whole, torn at
a sector, or not at all, in any combination.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.faults.inject import StorageDaemon, unmount
from tests.integration.process import wait_until

SECTOR = 512
FLUSH, DISCARD = 1, 4
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_MAGIC = 0x6A736677736872


@dataclass(frozen=True, slots=True)
class Entry:
    """One write (``data``), or a flush (``data`` empty); ``end`` is where it ends in the trace."""

    offset: int
    data: memoryview
    flush: bool
    end: int


class TracedDisk:
    """An ext4 file system, mounted at ``mountpoint``; a context manager. ``clock`` is the length
    of the trace so far; ``entries`` what it holds."""

    def __init__(self, directory: Path, mountpoint: Path, size: int) -> None:
        self.mountpoint = mountpoint
        self.base = directory / "base.raw"
        """The disk before the first entry of the trace."""
        self._disk = directory / "disk.raw"
        self._trace = directory / "trace"
        directory.mkdir()
        mountpoint.mkdir(exist_ok=True)
        with self._disk.open("wb") as file:
            file.truncate(size)
        options = "lazy_itable_init=0,lazy_journal_init=0"
        make = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", options, "-J", "size=4"]
        subprocess.run([*make, str(self._disk)], check=True)
        copy(self._disk, self.base)
        self._trace.touch()
        self._daemon = StorageDaemon(
            directory / "export",
            self._disk,
            [
                f"driver=file,node-name=trace,filename={self._trace}",
                "driver=blklogwrites,node-name=top,file=image,log=trace,log-sector-size=512",
            ],
        )
        self._mounted = mount(self._daemon.path, mountpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def clock(self) -> int:
        """The position in the trace now."""
        return self._trace.stat().st_size

    def sync(self) -> None:
        """Makes durable what the test itself wrote: directories, configurations."""
        subprocess.run(["sync", "-f", str(self.mountpoint)], check=True)

    def close(self) -> None:
        """Unmounts; what is written from here on is in the trace behind every earlier clock."""
        if self._mounted:
            unmount(self.mountpoint)
            detach(self._mounted)
            self._mounted = ""
            self._daemon.process.stop()

    def entries(self, upto: int) -> list[Entry]:
        """The trace up to a position; valid after ``close``."""
        return read_trace(self._trace, upto)


def read_trace(trace: Path, upto: int) -> list[Entry]:
    """The entries of a trace up to a position in it."""
    data = memoryview(trace.read_bytes())
    if len(data) <= SECTOR:
        return []
    magic, _, _, sector_size = _SUPER.unpack_from(data)
    # The head is written with the first flush.
    assert (magic, sector_size) in ((_MAGIC, SECTOR), (0, 0))
    found, at = [], SECTOR
    while at + SECTOR <= upto:
        sector, count, flags, _ = _ENTRY.unpack_from(data, at)
        at += SECTOR
        length = 0 if flags & DISCARD else count * SECTOR
        assert not flags & DISCARD, "replay of discards is not known"
        found.append(
            Entry(sector * SECTOR, data[at : at + length], bool(flags & FLUSH), at + length)
        )
        at += length
    return found


class Replay:
    """Makes the images of cuts, in ascending order: each costs only what lies between."""

    def __init__(self, base: Path, entries: list[Entry], image: Path) -> None:
        self._entries = entries
        self._flushed = image.with_suffix(".flushed")
        self._image = image
        self._done = 0
        copy(base, self._flushed)

    def cut(self, count: int, seed: int) -> int:
        """The image after a cut behind ``count`` entries; returns how many writes were unflushed.

        Seed 0 keeps them all, seed 1 none; any other draws what became of each."""
        flushes = [n for n in range(count) if self._entries[n].flush]
        durable = flushes[-1] + 1 if flushes else 0
        assert durable >= self._done, "cuts go forward"
        with self._flushed.open("r+b") as file:
            for entry in self._entries[self._done : durable]:
                _write(file.fileno(), entry.offset, entry.data)
        self._done = durable
        copy(self._flushed, self._image)
        pending = self._entries[durable:count]
        rng = random.Random(seed)
        with self._image.open("r+b") as file:
            for entry in pending if seed != 1 else []:
                for offset, data in [(entry.offset, entry.data)] if not seed else _lot(rng, entry):
                    _write(file.fileno(), offset, data)
        return len(pending)


def _lot(rng: random.Random, entry: Entry) -> Iterator[tuple[int, memoryview]]:
    """What is left of one unflushed write."""
    fate = rng.choice(("whole", "whole", "gone", "gone", "torn"))
    if fate == "whole":
        yield entry.offset, entry.data
    elif fate == "torn":
        for at in range(0, len(entry.data), SECTOR):
            if rng.random() < 0.5:
                yield entry.offset + at, entry.data[at : at + SECTOR]


def _write(fd: int, offset: int, data: memoryview) -> None:
    if data:
        assert os.pwrite(fd, data, offset) == len(data)


def copy(source: Path, target: Path) -> None:
    """A sparse copy."""
    subprocess.run(["cp", "--sparse=always", str(source), str(target)], check=True)


def copy_tree(source: Path, target: Path) -> None:
    """Replaces ``target`` by a copy of ``source``."""
    if target.exists():
        shutil.rmtree(target)
    subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True)


def mount(image: Path, mountpoint: Path) -> str:
    """Mounts an image's ext4 through a loop device, whose name is returned."""
    loop = subprocess.run(
        ["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["mount", "-t", "ext4", loop, str(mountpoint)], check=True)
    except BaseException:
        detach(loop)
        raise
    return loop


def detach(loop: str) -> None:
    """Gives a loop device back, once nothing uses it."""

    def tried() -> bool:
        done = subprocess.run(["losetup", "-d", loop], capture_output=True, check=False)
        return done.returncode == 0

    wait_until(f"{loop} is free", tried)


@contextmanager
def mounted(image: Path, mountpoint: Path) -> Iterator[None]:
    """An image's file system for a while, recovered by its own journal."""
    loop = mount(image, mountpoint)
    try:
        yield
    finally:
        unmount(mountpoint)
        detach(loop)
