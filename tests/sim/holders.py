"""Who holds the primary's volumes, and what is in them (M5, M11).

That is a local facet in service; where a volume has none, a remote that follows, with what the log
holds beyond it laid over. So an oracle that wants to know what a crash has left of a volume asks
its holder: the primary's own disk knows only a part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nbdmirror.codec.record import Record
from nbdmirror.core.identity import Decision
from nbdmirror.engine.node import Node
from tests.sim import cover
from tests.sim.clone import Image
from tests.sim.oracle import Violation, compare


@dataclass(frozen=True, slots=True)
class Held:
    """The volumes of a primary, and the remotes that some of them are read from."""

    volumes: list[bytes]
    leaders: dict[int, str]
    """By volume without a facet: the first remote that holds it."""


def held(
    primary: Node,
    local: Sequence[bytes | None],
    pending: Sequence[Record],
    remotes: Mapping[str, Image],
) -> Held:
    """``local``: what the facets in service hold; ``pending``: the log; ``remotes``: what each
    remote would come back with now. Violation if nobody holds a volume, or if two that do differ.
    """
    volumes: list[bytes] = []
    leaders: dict[int, str] = {}
    for index, mine in enumerate(local):
        if mine is not None:
            volumes.append(mine)
            continue
        found: bytes | None = None
        for name, image in remotes.items():
            agreed = _follows(primary, name, index, image)
            if agreed is None:
                continue
            theirs = _laid_over(image, index, pending, agreed.seq)
            if found is not None:
                compare([theirs], [found], f"volume {index} as {name} and another hold it (M11)")
            found = theirs
            leaders.setdefault(index, name)
        if found is None:
            raise Violation(f"nobody holds volume {index} (M11)")
        volumes.append(found)
    return Held(volumes, leaders)


def _follows(primary: Node, name: str, volume: int, image: Image) -> Decision | None:
    """What the primary and this remote would agree upon, if the primary reads the volume from it;
    None if it does not, or if the remote turns out to have lost something."""
    assert primary.primary is not None
    if not primary.primary.remote(name).follows(primary.volumes[volume]):
        return None
    agreed = cover.decision(primary, name, image.node)
    return agreed if agreed.rule in ("T3", "T7") else None


def _laid_over(image: Image, volume: int, pending: Sequence[Record], seq: int) -> bytes:
    data = bytearray(image.images()[volume])
    for record in pending:
        if record.volume == volume and record.seq >= seq:
            payload = bytes(record.length) if record.payload is None else record.payload
            data[record.offset : record.offset + record.length] = payload
    return bytes(data)
