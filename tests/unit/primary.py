"""A primary alone on a simulated disk, for tests of what it does with its snapshots."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable

from nbdmirror.codec import record as codec
from nbdmirror.config import (
    AdminConfig,
    Config,
    LogConfig,
    NbdConfig,
    SnapshotConfig,
    VolumeConfig,
)
from nbdmirror.engine.create import create
from nbdmirror.engine.group import Group
from nbdmirror.engine.node import Node
from nbdmirror.engine.snapshotexport import SnapshotVolume
from nbdmirror.engine.volume import Change
from nbdmirror.ports import Env
from tests.sim.clock import SimClock
from tests.sim.clone import Nobody
from tests.sim.disk import SimDisk
from tests.sim.faults import Fault
from tests.unit.world import make_disk, run

REGION = 4096
REGIONS = 16


class Primary:
    """A primary without remotes on a disk of its own; two volumes."""

    def __init__(self, disk: SimDisk, snapshots: SnapshotConfig) -> None:
        self.disk = disk
        self.config = Config(
            path="/etc/n.toml",
            group="g",
            node="a",
            state_dir="/state",
            nbd=NbdConfig(("unix:/nbd",)),
            admin=AdminConfig(socket=""),
            log=LogConfig(size=1 << 20, hot_extents=61),
            volumes=tuple(
                VolumeConfig(name, REGIONS * REGION, (f"/facets/{name}",), REGION)
                for name in ("v", "w")
            ),
            snapshots=snapshots,
        )
        self.lives = 0

    async def start(self) -> None:
        self.lives += 1
        clock = SimClock(asyncio.get_running_loop(), self.disk)  # type: ignore[arg-type]
        env = Env(self.disk, Nobody(), clock, random.Random(self.lives))
        if self.lives == 1:
            await create(env, self.config, "primary")
        self.node = Node(env, self.config)
        await self.node.start(nbd=False)

    async def restart(self, *, cut: bool) -> None:
        if cut:
            self.disk.power_cut()
            # Nothing of the process is left: what it waited for must not come to it.
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        else:
            await self.node.stop()
        await self.start()

    @property
    def group(self) -> Group:
        assert self.node.primary is not None
        return self.node.primary.group

    async def write(self, region: int, fill: int, volume: int = 0, length: int = REGION) -> None:
        change = Change(codec.WRITE, 0, region * REGION, length, bytes([fill]) * length)
        rest = self.group.write(self.node.volumes[volume], [change])
        if rest is not None:
            await rest

    async def take(self, volume: str | None = "v", protected: bool = False) -> str:
        made = await self.node.people.create(volume, protected)
        return str(made["number"])

    def served(self, name: str) -> SnapshotVolume:
        assert self.node.exports is not None
        found = self.node.exports.volume(name)
        assert isinstance(found, SnapshotVolume)
        return found

    async def fills(self, name: str) -> list[int]:
        """The first byte of each region of a snapshot."""
        data = await self.served(name).read(0, REGIONS * REGION)
        return [data[region * REGION] for region in range(REGIONS)]

    async def volume_fills(self) -> list[int]:
        """The first byte of each region of the first volume, as a client reads it."""
        data = await self.node.volumes[0].read(0, REGIONS * REGION)
        return [data[region * REGION] for region in range(REGIONS)]

    def states(self) -> list[str]:
        return [found["state"] for found in self.node.people.list()]

    async def revived(self, seed: object) -> Primary:
        """What starts from its disk after a power cut; ``seed`` draws what that loses."""
        heir = Primary(self.disk.clone(seed), self.config.snapshots)
        heir.lives = 5
        heir.disk.power_cut()
        await heir.start()
        return heir


def primary(
    test: Callable[[Primary], Awaitable[None]], snapshots: SnapshotConfig | None = None
) -> None:
    async def main() -> None:
        world = Primary(make_disk(), snapshots or SnapshotConfig())
        await world.start()
        await test(world)
        if world.node.failed is not None and not world.node.failed.done():
            await world.node.stop()

    run(main())


class _Cut(BaseException):
    """The power went at this operation."""


async def cut_at_each(
    points: Iterable[int],
    prepare: Callable[[Primary], Awaitable[None]],
    work: Callable[[Primary], Awaitable[None]],
    check: Callable[[Primary, int, bool], Awaitable[None]],
    *,
    seconds: float = 0.0,
) -> None:
    """For each of ``points``, a node that is prepared loses its power at that operation of the disk
    within ``work``, or within so many seconds of what that leaves behind. ``check`` is given the
    node that lost it, to revive; which point that was; and whether the work was done by then."""
    for nth in points:
        world = Primary(make_disk(nth), SnapshotConfig())
        await world.start()
        await prepare(world)
        world.disk.faults = _power_goes_at(nth)
        done = False
        try:
            await work(world)
            done = True
            if seconds:
                await asyncio.sleep(seconds)
        except (_Cut, asyncio.CancelledError):  # whoever was struck
            pass
        world.disk.faults = None
        await check(world, nth, done)


def _power_goes_at(nth: int) -> Callable[[str, str, int], Fault | None]:
    left = nth

    def die(operation: str, path: str, _: int) -> Fault | None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Cut
        return None

    return die
