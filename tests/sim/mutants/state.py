"""Mutants of the superblock and of names on disk (O5, O11, O17, O18, O20)."""

from __future__ import annotations

import json
from typing import Any

from xxhash import xxh3_64_intdigest

from nbdmirror.codec import slots
from nbdmirror.engine.node import Node
from nbdmirror.engine.store import Store
from nbdmirror.errors import FormatError
from tests.sim.disk import SimDisk
from tests.sim.mutants.aims import RESTARTS, TORN_SAVES
from tests.sim.mutation import Assign, mutant, nothing


@mutant("O11 the superblock has one slot only")
def _(assign: Assign) -> None:
    original = Store._save

    async def save(self: Store) -> None:
        self._slot = 1 - self._slot
        await original(self)

    async def first_save(self: Store) -> None:
        await (original if self._counter == 0 else save)(self)

    assign(Store, "_save", first_save)


@mutant("O11 a slot that may be in the page cache only is relied on", RESTARTS)
def _(assign: Assign) -> None:
    assign(Store, "_settle", nothing)


@mutant("O5 the superblock is not synced")
def _(assign: Assign) -> None:
    original = Store._save

    async def save(self: Store) -> None:
        file = self._file

        class Unsynced:
            path = file.path
            pwrite = staticmethod(file.pwrite)
            sync = staticmethod(nothing)
            close = staticmethod(file.close)

        if self._counter > 0:
            setattr(self, "_file", Unsynced())  # noqa: B010
        try:
            await original(self)
        finally:
            self._file = file

    assign(Store, "_save", save)


@mutant("O17 a slot that holds the sectors of two saves is believed", TORN_SAVES)
def _(assign: Assign) -> None:
    """A save of which each field has sectors of its own, so that a torn one can be read at all."""

    def encode(counter: int, state: dict[str, Any]) -> bytes:
        fields = [json.dumps({key: state[key]})[1:-1] for key in sorted(state)]
        texts = ["{" + fields[0], *("," + field for field in fields[1:])]
        size = slots._TEXT_SIZE
        text = "".join(one.ljust(-(-len(one) // size) * size) for one in texts) + "}"
        slot = bytearray()
        for number in range(slots._sectors(len(text))):
            piece = text[number * size : (number + 1) * size].ljust(size, "\0").encode()
            sector = slots._HEAD.pack(slots._MAGIC, counter, len(text), number) + piece
            slot += sector + slots._SUM.pack(xxh3_64_intdigest(sector))
        return bytes(slot)

    def decode(slot: bytes) -> tuple[int, dict[str, Any]]:
        first = slots._sector(slot, 0)
        if first is None:
            raise FormatError("superblock slot was never written")
        found = [slots._sector(slot, number) for number in range(slots._sectors(first[1]))]
        pieces = [sector for sector in found if sector is not None]
        try:
            state = json.loads(b"".join(piece for _, _, piece in pieces)[: first[1]])
        except ValueError:  # of other lengths
            raise FormatError("superblock slot holds a save that was not finished") from None
        return max(counter for counter, _, _ in pieces), state

    assign(slots, "encode", encode)
    assign(slots, "decode", decode)


@mutant("O18 directories are not synced")
def _(assign: Assign) -> None:
    assign(SimDisk, "sync_directory", nothing)


@mutant("O20 records are logged before the new epoch is durable")
def _(assign: Assign) -> None:
    original = Node._begin_epoch

    def begin_epoch(self: Node, recovered: Any) -> None:
        original(self, recovered)
        store, save = self.store, self.store.save

        async def once() -> None:
            setattr(store, "save", save)  # noqa: B010

        setattr(store, "save", once)  # noqa: B010

    assign(Node, "_begin_epoch", begin_epoch)
