"""What a node makes of a disk: a copy of it is booted, alone, in a loop of its own.

No time goes by in the run meanwhile, and nothing in it changes.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

from nbdmirror.codec.record import MARK, Record
from nbdmirror.config import Config
from nbdmirror.engine.logloss import open_log
from nbdmirror.engine.node import Node
from nbdmirror.errors import NbdmirrorError
from nbdmirror.ports import Env
from tests.sim.clock import SimClock
from tests.sim.disk import SimDisk
from tests.sim.loop import Incarnation, SimLoop
from tests.sim.oracle import Moot, Violation
from tests.sim.snapshots import Found, read_all


class Nobody:
    """A network where nobody else is."""

    async def connect(self, address: str, protocol: Any) -> Any:
        raise OSError(f"no route to {address}")

    async def listen(self, address: str, protocol: Any) -> Nobody:
        return self

    def watch(self, transport: Any, gone: Any) -> Any:
        return self.close

    address = "nowhere"

    def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a node makes of a disk after a power loss."""

    initialised: bool
    consistent: bool
    epoch: int
    seq: int
    volumes: list[bytes | None]
    """None: no facet of it is in service."""
    held: tuple[int, list[bytes]] | None
    """Of a secondary that is held back: the record that it is at, and its volumes there."""
    pending: list[Record]
    """What its log holds for remotes, and for volumes without a facet."""
    node: Node
    snapshots: list[Found]

    def images(self) -> list[bytes]:
        """The volumes, which all have a facet."""
        found = [image for image in self.volumes if image is not None]
        assert len(found) == len(self.volumes)
        return found


def recover_alone(disk: SimDisk, config: Config, seed: str) -> Image:
    """Boots a node on a disk, with nobody around, lets it settle, and reads its volumes. One that
    does not start without what it has lost starts when that is back."""
    try:
        return _recover(disk, config, seed)
    except (NbdmirrorError, OSError) as error:
        if "could not be read for it" in str(error):  # what a restore was to bring back
            raise Moot(str(error)) from error
        if not disk.broken:
            raise Violation(f"a clone of {disk.node} does not start: {error}") from error
    disk.broken.clear()
    return recover_alone(disk, config, seed)


def _recover(disk: SimDisk, config: Config, seed: str) -> Image:
    outer = asyncio.get_running_loop()
    loop = SimLoop()
    life = Incarnation(f"clone of {disk.node}")
    try:
        main = loop.spawn(life, _boot(loop, disk, config, seed))
        image: Image = loop.run_until_complete(main)
    finally:
        life.kill()
        loop.close()
        asyncio._set_running_loop(outer)
    return image


async def _boot(loop: SimLoop, disk: SimDisk, config: Config, seed: str) -> Image:
    env = Env(disk, Nobody(), SimClock(loop, disk), random.Random(seed))
    node = Node(env, config)
    await node.start(nbd=False)
    held = _held(disk, node)
    if node.secondary is not None:
        await node.secondary.drain()
    assert node.failed is not None
    if node.failed.done():
        raise node.failed.result()
    state = node.store.state
    upstream = state["upstream"]
    return Image(
        initialised=state["uuid"] is not None,
        consistent=bool(upstream and upstream["consistent"]),
        epoch=state["epoch"],
        seq=node.log.next_seq - 1,
        volumes=[bytes(await v.read(0, v.size)) if v.in_service() else None for v in node.volumes],
        held=held,
        pending=records(disk.clone(seed), node),
        node=node,
        snapshots=await read_all(node),
    )


def _held(disk: SimDisk, node: Node) -> tuple[int, list[bytes]] | None:
    secondary = node.secondary
    if secondary is None or not secondary.applier.bounded:
        return None
    paths = [(volume.source().path, volume.size) for volume in node.volumes]
    return secondary.applied_seq, [disk.content(path)[:size] for path, size in paths]


def records(disk: SimDisk, node: Node) -> list[Record]:
    """All that the file of a node's log holds on a copy of its disk."""
    state = node.store.state
    log = open_log(disk, node.config, state)
    forks = [(int(epoch), int(end)) for epoch, end in state["forks"]]
    found = log.scan(forks, int(state["epoch"]))
    return [record for record in found if record.kind != MARK]
