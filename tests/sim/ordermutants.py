"""Mutants of the orderings that concern what is made, staged and agreed upon (see ``mutants``).

Every ordering of reliability.md has a mutant, but for two. O3 (only durable records are shipped)
belongs to its protocol W: here every record lies in an extent that is durably active, so a primary
may ship what it has not synced. O20 is about roles; its part that there is, the new epoch, is here.
"""

from __future__ import annotations

import json
from typing import Any

from nbdmirror.codec import record as codec
from nbdmirror.codec import slots
from nbdmirror.engine.node import Node
from nbdmirror.engine.receiver import Receiver
from nbdmirror.engine.session import Session
from nbdmirror.errors import FormatError
from tests.sim.disk import SimDisk
from tests.sim.faults import Timing
from tests.sim.mutation import Assign, aimed, mutant, nothing


@mutant("O9 records reach the secondary's facet as they arrive")
def _(assign: Assign) -> None:
    checked = Receiver._checked

    def at_once(self: Receiver, view: memoryview, next_seq: int) -> Any:
        for record in codec.parse_all(view):
            if record.seq >= next_seq and record.payload is not None and record.kind != codec.MARK:
                for facet in self.secondary.volumes[record.volume].facets:
                    facet.pwrite(record.offset, record.payload)
        return checked(self, view, next_seq)

    assign(Receiver, "_checked", at_once)


@mutant(
    "O14 the remote is told of a resync before its map is durable",
    aimed(
        faults={"full resync": 1.0, "cut": 1.0, "reset": 1.0},
        fault_gap=0.3,
        moments=0.5,
        moments_of=("handshake", "connected"),
        timing=Timing(sync=(0.001, 0.05)),
        clients=4,
        operations=200,
        pause=0.1,
        last_facet=False,
    ),
)
def _(assign: Assign) -> None:
    original = Session._start

    async def start(self: Session, decision: Any) -> None:
        setattr(self.remote, "sync_maps", nothing)  # noqa: B010
        try:
            await original(self, decision)
        finally:
            del self.remote.__dict__["sync_maps"]

    assign(Session, "_start", start)


@mutant("O17 a slot that holds the sectors of two saves is believed")
def _(assign: Assign) -> None:
    def decode(slot: bytes) -> tuple[int, dict[str, Any]]:
        first = slots._sector(slot, 0)
        if first is None:
            raise FormatError("superblock slot was never written")
        counter, length, _ = first
        pieces = [slots._sector(slot, number) for number in range(slots._sectors(length))]
        text = b"".join(piece[2] if piece else b"" for piece in pieces)[:length]
        state: dict[str, Any] = json.loads(text)
        return counter, state

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
