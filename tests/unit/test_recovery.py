"""Recovery of a secondary whose disk lost in one boot what a process had relied on (O10, O16)."""

from __future__ import annotations

import asyncio
import random

import pytest

from nbdmirror.codec import record as codec
from nbdmirror.codec.record import HEADER_SIZE
from nbdmirror.config import AdminConfig, Config, LogConfig, NbdConfig, VolumeConfig
from nbdmirror.engine.create import create
from nbdmirror.engine.log import RING_AT
from nbdmirror.engine.node import Node
from nbdmirror.ports import Env
from tests.sim.clock import SimClock
from tests.sim.clone import Nobody
from tests.sim.disk import SimDisk
from tests.sim.faults import Fault, Injector, Kind
from tests.sim.loop import Incarnation, SimLoop
from tests.unit.world import make_disk, run

BLOCK = 4096
LOG = "/state/log"
FACET = "/facets/v"


class Host:
    """A secondary, one life after the other on one disk, within one boot."""

    def __init__(self, seed: int) -> None:
        self.disk = make_disk(seed)
        self.config = Config(
            path="/etc/n.toml",
            group="g",
            node="b",
            state_dir="/state",
            nbd=NbdConfig(),
            admin=AdminConfig(socket=""),
            log=LogConfig(size=1 << 20, hot_extents=61),
            volumes=(VolumeConfig("v", 16 * BLOCK, (FACET,), BLOCK),),
        )
        self.lives = 0
        self.life = Incarnation("b")

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self.life = Incarnation("b")
        await loop.spawn(self.life, self._start(loop))

    async def _start(self, loop: SimLoop) -> None:
        self.lives += 1
        env = Env(self.disk, Nobody(), SimClock(loop, self.disk), random.Random(self.lives))
        if self.lives == 1:
            await create(env, self.config, "secondary")
        self.node = Node(env, self.config)
        self.damage: list[str] = []
        self.node.events.listen(lambda event: self.damage.append(str(event["kind"])))
        await self.node.start(nbd=False)

    async def do(self, work: object) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        await loop.spawn(self.life, work)  # type: ignore[arg-type]

    def kill(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        loop.cut(self.life)

    async def take(self, fill: int, *, commit: bool) -> None:
        """A record comes in: block ``fill`` is filled with it."""
        log = self.node.log
        payload = bytes([fill]) * BLOCK
        record = codec.Record(
            codec.WRITE,
            0,
            self.node.store.state["epoch"],
            0,
            log.next_seq,
            fill * BLOCK,
            BLOCK,
            0,
            payload,
        )
        log.append(codec.encode(record), codec.stored_size(codec.WRITE, BLOCK), 1)
        if commit:
            assert self.node.secondary is not None
            await self.node.secondary.drain()

    def fills(self, disk: SimDisk) -> list[int]:
        return list(disk.content(FACET)[: 16 * BLOCK : BLOCK])


def lose(path: str) -> Injector:
    """The next sync of a file fails, and what it should have brought to the disk is gone."""
    left = [Fault(Kind.LOSE)]

    def inject(operation: str, where: str, nth: int) -> Fault | None:
        return left.pop() if left and operation == "sync" and where == path else None

    return inject


@pytest.mark.parametrize("seed", range(8))
def test_a_secondary_that_loses_syncs_of_log_and_facet_in_one_boot_redoes(seed: int) -> None:
    """The log fails with a hole in what came last; the next life gets some of that again, and its
    facet fails: what is left of the first behind the log's end is no damage, and nothing that was
    acknowledged is missing afterwards (O4, O16, V7)."""

    async def main() -> None:
        host = Host(seed)
        await host.start()
        for fill in (1, 2):
            await host.do(host.take(fill, commit=True))
        for fill in (3, 4, 5):
            await host.do(host.take(fill, commit=False))
        positions: list[int] = []
        await host.do(_position(host.node, positions))
        host.disk.faults = lose(LOG)
        await asyncio.sleep(1.0)
        assert host.node.log.failed is not None
        await host.do(host.node.stop())
        host.kill()
        host.disk.faults = None
        _break(host.disk, positions[0])  # whatever else of the three is there, the first is not
        await host.start()
        assert host.node.log.next_seq == 3
        host.disk.faults = lose(FACET)
        await host.do(_failing(host.take(3, commit=True)))
        assert host.node.failed is not None and host.node.failed.done()
        host.kill()
        host.disk.faults = None
        await host.start()
        assert host.node.log.next_seq == 4
        assert "log-damaged" not in host.damage
        assert host.fills(host.disk)[:6] == [0, 1, 2, 3, 0, 0]
        host.disk.power_cut()
        await host.start()
        assert host.fills(host.disk)[:6] == [0, 1, 2, 3, 0, 0]

    run(main())


async def _position(node: Node, found: list[int]) -> None:
    found.append(await node.log.position_of(3))


async def _failing(work: object) -> None:
    with pytest.raises(Exception, match="sync of facet"):
        await work  # type: ignore[misc]


def _break(disk: SimDisk, position: int) -> None:
    for at in range(HEADER_SIZE):
        disk.flip(LOG, RING_AT + position + at)
