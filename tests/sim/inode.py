"""A simulated file's content twice: as the page cache has it, and as the disk has it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.sim.image import PAGE, Change, Image

CHANGES_MAX = 8192  # more than these unsynced: the kernel writes the older half back by itself


@dataclass(slots=True, eq=False)
class Inode:
    """A file's content, with or without a name."""

    serial: int
    cache: Image = field(default_factory=Image)
    durable: Image = field(default_factory=Image)
    unsynced: list[Change] = field(default_factory=list)
    written: int = 0  # changes ever; the unsynced ones are the last len(unsynced) of them
    block_device: bool = False
    apart: bool = False  # a failed sync lost changes that the cache still shows
    stuck: dict[int, None] = field(default_factory=dict)
    """Pages of which the cache shows what a failed sync lost, and which ext4 takes for allocated:
    what is written there is in the cache only, until that forgets them or they are cleared."""
    refused: int = 0  # changes that the disk did not take when they were written back
    untold: bool = False  # ... of the last of which no sync has told yet

    def put(self, change: Change) -> None:
        self.cache.put(change)
        self.unsynced.append(change)
        self.written += 1
        if self.stuck:
            self._unstick(change)
        if len(self.unsynced) > CHANGES_MAX:
            self.land(self.written - CHANGES_MAX // 2)

    def refuse(self) -> None:
        """A change was lost: each file that is open is told, once, at its next sync; and so is
        who opens it before anybody was."""
        self.refused += 1
        self.untold = True

    def take(self, mark: int) -> list[Change]:
        """The unsynced changes among the first ``mark`` ever; they are unsynced no more."""
        count = max(0, mark - (self.written - len(self.unsynced)))
        taken = self.unsynced[:count]
        del self.unsynced[:count]
        return taken

    def land(self, mark: int) -> None:
        """Makes the first ``mark`` changes durable."""
        if mark == self.written and not self.apart:
            if self.unsynced:
                self.unsynced = []
                self.durable = self.cache.copy()
            return
        for change in self.take(mark):
            self._land(change)
            self.durable.resize(change.size)

    def _land(self, change: Change) -> None:
        if not self.stuck or change.data is None:
            self.durable.put_content(change)
            return
        for index, part in change.pages():
            if index not in self.stuck:
                self.durable.put_content(part)

    def _unstick(self, change: Change) -> None:
        gone = [index for index in self.stuck if index * PAGE >= change.size]
        if change.data is None and change.length:
            gone += [
                index
                for index, part in change.pages()
                if part.length == PAGE or part.offset + part.length == change.size
            ]
        for index in gone:
            self.stuck.pop(index, None)

    def stick(self, changes: Sequence[Change], rng: random.Random) -> None:
        """Those changes are lost: some of the pages that the disk did not have before are stuck."""
        if self.block_device:
            return
        for change in changes:
            for index, _ in change.pages() if change.data is not None else ():
                if not self.durable.has(index) and rng.random() < 0.5:
                    self.stuck[index] = None

    def forget(self) -> None:
        """What can be written out is, and the cache is what the disk has."""
        self.land(self.written)
        self.cache = self.durable.copy()
        self.apart = False
        self.stuck.clear()

    def forget_range(self, offset: int, length: int) -> None:
        """The cache's pages within the range, and the one that it ends in, are the disk's, where
        nothing is left to write out."""
        dirty = {index for change in self.unsynced for index, _ in change.pages()}
        for index in range(-(-offset // PAGE), -(-(offset + length) // PAGE)):
            if index not in dirty:
                self.cache.take(index, self.durable)
                self.stuck.pop(index, None)

    def land_some(self, changes: Sequence[Change], rng: random.Random) -> None:
        """A drawn part of some changes reaches the durable image, sector by sector."""
        sizes = rng.randint(0, len(changes))
        for position, change in enumerate(changes):
            for piece in change.torn(rng):
                self._land(piece)
            if position < sizes:
                self.durable.resize(change.size)
        self.durable.trim()

    def cut(self, rng: random.Random) -> None:
        if self.unsynced:
            self.land_some(self.unsynced, rng)
            self.unsynced = []
        self.cache = self.durable.copy()
        self.apart = self.untold = False
        self.stuck.clear()

    def copy(self) -> Inode:
        return Inode(
            self.serial,
            self.cache.copy(),
            self.durable.copy(),
            list(self.unsynced),
            self.written,
            self.block_device,
            self.apart,
            dict(self.stuck),
            self.refused,
            self.untold,
        )
