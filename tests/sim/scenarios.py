"""The scripts of the sweeps: what clients and people do, the same at every point.

One client, one request at a time, on a small pair of nodes whose log wraps after a few writes and
whose active map has fewer slots than there are extents. A script goes on whatever fails: a request
may get an error, a node may be down for a while. ``arm`` says from where on operations count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from nbdmirror.codec import record as codec
from nbdmirror.engine.batch import Changes
from nbdmirror.engine.node import Node
from nbdmirror.engine.volume import Change
from nbdmirror.errors import NbdmirrorError
from tests.sim.faults import Timing
from tests.sim.host import Host
from tests.sim.options import KIB, SMALL, Options
from tests.sim.oracle import Violation, Write, pattern
from tests.sim.workload import as_received
from tests.sim.world import Gone, World, clearing

POLL_S = 0.01
SYNC_SECONDS = 30.0
"""A script waits so long for a remote that the fault may keep from ever being in sync."""
BLOCK = 8
"""Cells of 4 KiB: as much as one record of this log can hold."""

OPTIONS = Options(
    sizes=(96 * KIB, 32 * KIB),
    cell=512,
    region=4 * KIB,
    extent=1 * KIB,
    facets=1,
    remotes=1,
    log_size=44 * KIB,
    remote_log_size=44 * KIB,
    on_full="dcm",
    compression="off",
    window=16 * KIB,
    timing=Timing(sync=(0.000_1, 0.002)),
    constants={
        **SMALL,
        "engine.log.RECENT_BYTES_MAX": 16 * KIB,
        "engine.log.READ_BYTES": 8 * KIB,
        "engine.copier.COPY_BYTES": 8 * KIB,
        "engine.copier.YIELDING_BYTES": 8 * KIB,
        "engine.housekeeper.INTERVAL_SECONDS": 0.3,
    },
    shuffle=False,
    clients=1,
    operations=0,
    write_cells=BLOCK,
    hot_cells=0,
    pause=0.0,
    fua=0.0,
    flush=0.0,
    clear=0.0,
    faults={},
    fault_gap=0.0,
)


class Script:
    """What a scenario can do; every answer is told to the oracle."""

    def __init__(self, world: World, arm: Callable[[], None]) -> None:
        self.world = world
        self.arm = arm
        self.last: list[tuple[int, int, int]] = []
        """(volume, offset, length) of the last request's writes: a failed append may have
        brought some of them into the log."""
        self.payloads: list[bytes] = []
        self.head = 0
        """The head of the history when it was issued."""
        self.succeeded = 0

    # -- the client ------------------------------------------------------------------------------

    async def primary(self) -> Node:
        """The primary's node, once it serves."""
        while self.world.a.node is None:
            await asyncio.sleep(POLL_S)
        return self.world.a.node

    async def _attempt(self, node: Node, work: Coroutine[Any, Any, Any], *, changes: bool) -> bool:
        """Whether it succeeded. After a failed sync or append of the log none may (O16)."""
        assert node.primary is not None
        doomed = node.log.failed or node.primary.group.failed
        self.world.requests += 1
        try:
            await self.world.in_life(self.world.a, work)
        except (Gone, NbdmirrorError) as error:  # which the export turns into an errno
            self.world.trace("client", f"failed: {error}")
            return False
        finally:
            self.world.requests -= 1
        if doomed is not None and changes:
            raise Violation(f"a success was replied after: {doomed.message} (O16)")
        self.succeeded += 1
        return True

    async def write(
        self, volume: int, *cells: int, count: int = 1, fua: bool = False, pause: float = 0.002
    ) -> None:
        """Writes ``count`` cells at each of ``cells``, in one batch."""
        node = await self.primary()
        assert node.primary is not None
        group, content, cell = node.primary.group, self.world.content, self.world.options.cell
        changes: list[Change] = []
        writes: list[Write] = []
        for first in cells:
            value = content.value()
            writes.append(content.begin(volume, first * cell, count * cell, value))
            payload = pattern(value, count * cell)
            changes.append(Change(codec.WRITE, 0, first * cell, count * cell, memoryview(payload)))
        self._requested(volume, changes)
        self.world.trace("client", f"write {volume} {cells} {count}{' FUA' if fua else ''}")

        async def work() -> None:
            batch = Changes(changes) if fua else as_received(changes)
            rest = group.write_batch(node.volumes[volume], batch, durable=fua)
            if rest is not None:
                await rest

        acked = await self._attempt(node, work(), changes=True)
        for write in writes:
            content.end(write, acked=acked, durable=fua)
        await asyncio.sleep(pause)

    async def clear(self, volume: int, first: int, count: int, how: str) -> None:
        """TRIM or WRITE_ZEROES of cells; ``how`` as in ``world.clearing``."""
        node = await self.primary()
        assert node.primary is not None
        cell = self.world.options.cell
        kind, flags = clearing(how)
        change = Change(kind, flags, first * cell, count * cell, None)
        write = self.world.content.begin(volume, change.offset, change.length, 0)
        self._requested(volume, [change])
        self.world.trace("client", f"{how} {volume} {first} {count}")
        work = node.primary.group.clear(node.volumes[volume], change)
        self.world.content.end(write, acked=await self._attempt(node, work, changes=True))

    def _requested(self, volume: int, changes: Sequence[Change]) -> None:
        self.last = [(volume, change.offset, change.length) for change in changes]
        self.head = self.world.history.head
        self.payloads = [bytes(change.payload or b"") for change in changes]

    async def flush(self) -> None:
        """Every write replied to is durable, if this succeeds."""
        node = await self.primary()
        assert node.primary is not None
        issued = self.world.content.flush_issued()
        self.world.trace("client", f"flush {issued}")
        if await self._attempt(node, node.primary.group.flush(), changes=True):
            self.world.content.flushed(issued)

    async def read(self, volume: int, first: int, count: int) -> None:
        """A read must show what was written."""
        node = await self.primary()
        cell = self.world.options.cell
        found: list[bytes] = []

        async def work() -> None:
            data = node.volumes[volume].try_read(first * cell, count * cell)
            if data is None:
                data = await node.volumes[volume].read(first * cell, count * cell)
            found.append(bytes(data))

        with self.world.content.reading() as since:
            if await self._attempt(node, work(), changes=False):
                self.world.content.check(
                    volume, first * cell, found[0], since=since, crashed=False, what="a read"
                )

    # -- people and the world --------------------------------------------------------------------

    async def in_sync(self) -> None:
        """Waits for the remote, as long as a fault may let it."""
        node = await self.primary()
        await self._command(node.wait("in-sync", None, SYNC_SECONDS))

    async def _command(self, work: Coroutine[Any, Any, Any], host: Host | None = None) -> None:
        try:
            await self.world.in_life(host or self.world.a, work)
        except (Gone, NbdmirrorError) as error:
            self.world.trace("person", f"failed: {error}")

    async def full_resync(self) -> None:
        """Everything is compared."""
        node = await self.primary()
        await self._command(node.resync("b", True))

    async def pause(self, *, on: bool) -> None:
        """Replication is paused, or goes on."""
        node = await self.primary()
        await self._command(node.pause("b") if on else node.resume("b"))

    async def freeze(self, *, on: bool) -> None:
        """The facets of the secondary are held back, or follow again (V8)."""
        host = self.world.remotes[0]
        await self.up(host)
        if host.node is not None:
            await self._command(host.node.apply(on), host)

    async def snapshot(self) -> str:
        """Takes one of the whole group; its uuid, empty if that failed."""
        node = await self.primary()
        made: list[str] = []

        async def work() -> None:
            made.append((await node.people.create(None, False))["uuid"])

        await self._command(work())
        for uuid in made:
            self.world.album.promise(uuid)
        return made[0] if made else ""

    async def restore(self, uuid: str) -> None:
        """The whole group becomes what it was."""
        if not uuid:
            return
        node = await self.primary()
        writes = self.world.album.writes(uuid, range(len(node.volumes)))
        done: list[bool] = []

        async def work() -> None:
            await node.people.restore(uuid, None, True, True, False)
            done.append(True)

        await self._command(work())
        for write in writes:
            self.world.content.end(write, acked=bool(done), durable=True)

    async def delete(self, uuid: str) -> None:
        """Deletes a snapshot, if it is not in use."""
        if uuid:
            node = await self.primary()
            self.world.album.release(uuid)
            await self._command(node.people.delete(uuid, False))

    def link(self, *, up: bool) -> None:
        """The only link."""
        if up:
            self.world.net.heal_all()
        else:
            self.world.net.cut("a", "b")
            self.world.net.reset("a", "b")

    async def stop(self, host: Host) -> None:
        """SIGTERM; somebody starts it again."""
        if host.node is not None:
            await self.world.stop(host)

    def kill(self, host: Host) -> None:
        """SIGKILL."""
        if host.alive:
            self.world.kill(host)

    def power_cut(self, *hosts: Host) -> None:
        """The hosts lose power at the same time."""
        for host in hosts:
            if host.alive:
                self.world.power_cut(host)

    async def up(self, host: Host) -> None:
        """Waits until it serves again."""
        while host.node is None:
            await asyncio.sleep(POLL_S)

    async def starting(self, host: Host) -> None:
        """Waits until it recovers."""
        while not host.starting and host.node is None:
            await asyncio.sleep(0.000_1)


# -- the scenarios -----------------------------------------------------------------------------


async def _load(s: Script) -> None:
    """Some of each, part of it flushed."""
    await s.write(0, 0, 20, count=2)
    await s.write(1, 3)
    await s.flush()
    await s.write(0, 1, count=6)
    await s.clear(0, 16, 8, "trim")
    await s.write(0, 18, count=2)


async def write(s: Script) -> None:
    """Cold and hot extents, batches, FUA, flush, clearing, a full active map, a ring that wraps."""
    s.arm()
    await s.write(0, 0, 30, count=2)
    await s.write(0, 0)
    await s.write(0, 1, 4, count=1, fua=True)
    await s.write(1, 5, count=3, fua=True)
    await s.flush()
    await s.clear(0, 0, 2 * BLOCK, "trim")
    await s.write(0, 3, count=2)
    await s.clear(1, 4, BLOCK, "zero")
    await s.clear(1, 3, 2, "zero keeping space")
    await s.read(1, 0, 4 * BLOCK)
    await s.write(0, 5 * BLOCK, count=2 * BLOCK)  # cut to records
    await s.clear(0, 6 * BLOCK, 16 * BLOCK, "trim")  # more extents than the active map has slots
    for turn in range(11):
        await s.write(0, (turn % 3) * BLOCK, count=BLOCK, pause=0.06)
    await s.flush()
    await s.write(1, 5, 6)
    await s.read(0, 0, 8 * BLOCK)


async def overflow(s: Script) -> None:
    """The link goes down until the log is full and the DCM takes over; and comes back (M7, O12)."""
    await _load(s)
    s.arm()
    s.link(up=False)
    for turn in range(13):
        await s.write(0, 4 * turn, count=BLOCK, pause=0.02)
    await s.clear(1, 0, 2 * BLOCK, "trim")
    await s.flush()
    await s.write(1, 9, fua=True)
    s.link(up=True)
    await s.in_sync()


async def _overflowed(s: Script) -> None:
    s.link(up=False)
    for turn in range(13):
        await s.write(0, 4 * turn, count=BLOCK, pause=0.01)
    await s.clear(1, 0, 2 * BLOCK, "trim")


async def resync(s: Script) -> None:
    """What the DCM marks is copied, while writes go on (V6, O13)."""
    await _overflowed(s)
    s.arm()
    s.link(up=True)
    for turn in range(4):
        await s.write(0, 10 * turn, 150 + 3 * turn, count=2, pause=0.02)
    await s.clear(0, 20, BLOCK, "zero")
    await s.in_sync()
    await s.write(0, 60)


async def full_resync(s: Script) -> None:
    """Everything is compared by hash, while writes go on (X1)."""
    await _load(s)
    await s.in_sync()
    s.arm()
    await s.full_resync()
    for turn in range(4):
        await s.write(0, 10 * turn, count=2, pause=0.005)
    await s.in_sync()
    await s.write(0, 60)


async def restart(s: Script) -> None:
    """Both nodes are stopped cleanly and started (semantics 4)."""
    world = s.world
    await _load(s)
    s.arm()
    await s.stop(world.a)
    await _load(s)
    await s.stop(world.remotes[0])
    await _load(s)
    await s.up(world.remotes[0])
    await s.in_sync()


async def kill(s: Script) -> None:
    """Both nodes are killed and started: redo (O19, O23)."""
    world = s.world
    await _load(s)
    s.arm()
    s.kill(world.a)
    await _load(s)
    s.kill(world.remotes[0])
    await _load(s)
    await s.up(world.remotes[0])
    await s.in_sync()


async def power(s: Script) -> None:
    """Both nodes lose power at once; what counts is their recovery (faults 2-6)."""
    world = s.world
    await s.write(0, 100, count=BLOCK)
    await _load(s)
    s.power_cut(world.a, world.remotes[0])
    s.arm()
    await _load(s)
    await s.up(world.remotes[0])
    await s.in_sync()


async def power_in_resync(s: Script) -> None:
    """Both nodes lose power in the middle of a resync (M10, O12)."""
    world = s.world
    await _overflowed(s)
    s.link(up=True)
    while world.a.node is not None and world.a.node.primary is not None:
        progress = world.a.node.primary.remotes[0].progress
        if progress is not None and progress.done_bytes > 0:
            break
        await asyncio.sleep(0.000_5)
    await s.write(0, 33, count=2)
    s.power_cut(world.a, world.remotes[0])
    s.arm()
    await _load(s)
    await s.up(world.remotes[0])
    await s.in_sync()


async def recovery_cut(s: Script) -> None:
    """Power fails, and again while both recover; what counts is the second recovery (fault 5)."""
    world = s.world
    a, b = world.a, world.remotes[0]
    await s.write(0, 100, count=BLOCK)
    await _load(s)
    s.power_cut(a, b)
    for host in (a, b):
        await s.starting(host)
        await asyncio.sleep(0.002)
        s.power_cut(host)
    s.arm()
    await _load(s)
    await s.up(b)
    await s.in_sync()


async def kill_after_power(s: Script) -> None:
    """A primary that lost power is killed while it recovers, and the secondary too."""
    world = s.world
    a, b = world.a, world.remotes[0]
    await _load(s)
    s.power_cut(a)
    await s.starting(a)
    await asyncio.sleep(0.002)
    s.kill(a)
    s.kill(b)
    s.arm()
    await _load(s)
    await s.up(b)
    await s.in_sync()


async def commands(s: Script) -> None:
    """Replication is paused and goes on; the secondary is frozen, loses power, and thaws (V8)."""
    await _load(s)
    s.arm()
    await s.pause(on=True)
    await s.write(0, 70, count=2)
    await s.pause(on=False)
    await s.freeze(on=True)
    await _load(s)
    s.power_cut(s.world.remotes[0])
    await s.write(0, 70, count=2)
    await s.up(s.world.remotes[0])
    await s.freeze(on=False)
    await s.in_sync()


async def snapshots(s: Script) -> None:
    """Three are taken, what they need is kept, and the middle one goes (V9, O21)."""
    await _load(s)
    s.arm()
    first = await s.snapshot()
    await s.write(0, 0, 40, count=3)
    second = await s.snapshot()
    await s.clear(0, 16, 3 * BLOCK, "trim")
    await s.write(1, 2, fua=True)
    await s.snapshot()
    await s.write(0, 1, 41, count=2)
    await s.delete(second)
    await s.in_sync()
    await s.delete(first)


async def restore(s: Script) -> None:
    """A restore, writes while it is copied, and back (V10-V12)."""
    await _load(s)
    uuid = await s.snapshot()
    await s.write(0, 0, 40, count=2 * BLOCK)
    await s.write(1, 2, count=4)
    s.arm()
    await s.restore(uuid)
    await s.write(0, 44, fua=True)
    await s.write(0, 2, 90)
    await s.in_sync()


async def spill(s: Script) -> None:
    """A log in memory, past its threshold and around the ring, through a kill, a power cut and a
    clean stop (M4)."""
    world = s.world
    await _load(s)
    await s.in_sync()
    s.arm()
    s.link(up=False)
    for turn in range(3):
        await s.write(0, 8 * turn, count=BLOCK, pause=0.01)
    await s.flush()
    await s.write(1, 5, count=2)
    s.kill(world.a)
    await _load(s)
    s.link(up=True)
    await s.in_sync()
    await s.write(0, 40, 60, count=BLOCK)
    s.power_cut(world.a)
    await _load(s)
    await s.in_sync()
    s.link(up=False)
    await s.write(0, 80, count=BLOCK)
    await s.stop(world.a)
    s.link(up=True)
    await _load(s)
    await s.in_sync()


async def create(s: Script) -> None:
    """From nothing to the first synchronisation (O18): operations count from ``create`` on."""
    await _load(s)


Scenario = Callable[[Script], Awaitable[None]]
SPILLING = replace(OPTIONS, spill=8 * KIB, facets=2)


def options_of(scenario: str) -> Options:
    """What the nodes of a scenario are like."""
    return SPILLING if scenario == "spill" else OPTIONS


SCENARIOS: dict[str, Scenario] = {
    "write": write,
    "overflow": overflow,
    "resync": resync,
    "full resync": full_resync,
    "restart": restart,
    "kill": kill,
    "power": power,
    "power in resync": power_in_resync,
    "recovery cut": recovery_cut,
    "kill after power": kill_after_power,
    "commands": commands,
    "snapshots": snapshots,
    "restore": restore,
    "create": create,
    "spill": spill,
}
