"""What a scenario of the sweeps can do: one client, one person, and the world around them.

A request may get an error, a node may be down for a while: the script goes on, whatever fails.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
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
        since = self.world.content.flush_issued()
        found: list[bytes] = []

        async def work() -> None:
            data = node.volumes[volume].try_read(first * cell, count * cell)
            if data is None:
                data = await node.volumes[volume].read(first * cell, count * cell)
            found.append(bytes(data))

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

    async def until(self, condition: Callable[[Node], bool]) -> None:
        """Waits for something at the primary, as long as a fault may let it."""
        end = self.world.loop.time() + SYNC_SECONDS
        while self.world.loop.time() < end:
            if condition(await self.primary()):
                return
            await asyncio.sleep(POLL_S)

    async def facet(self, action: str, path: str, other: str | None = None) -> None:
        """A command on a local facet of the primary (M8, M17)."""
        node = await self.primary()
        await self._command(node.facet(action, path, other))

    async def facets_back(self) -> None:
        """Waits until every facet of the primary is in service."""
        await self.until(lambda node: all(f.in_service for v in node.volumes for f in v.facets))

    async def replace_log(self, path: str) -> None:
        """A new disk for the log (M13)."""
        node = await self.primary()
        await self._command(node.log_replace(path))

    async def remote(self, action: str, host: Host) -> None:
        """A remote is added, or removed (M17)."""
        node = await self.primary()
        if action == "add":
            await self._command(
                node.remote_add(host.name, f"tcp:{host.name}:7000", "async", "continue")
            )
        else:
            await self._command(node.remote_remove(host.name))

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

    async def inscribe(self, uuid: str) -> None:
        """Somebody writes into a snapshot (V9)."""
        node = await self.primary()
        entry = node.snapshots.entry(uuid)
        images = None if entry is None else self.world.album.images(entry)
        if entry is not None and images is not None:
            work = self.world.inscribed.once(self.world.a, node, entry, images)
            with contextlib.suppress(Gone, NbdmirrorError):
                await work

    async def restore(self, uuid: str) -> None:
        """The whole group becomes what it was."""
        if not uuid:
            return
        node = await self.primary()
        entry = node.snapshots.entry(uuid)
        images = None if entry is None else self.world.album.images(entry)
        if entry is not None and images is not None and self.world.inscribed.count:
            try:
                await self.world.in_life(
                    self.world.a, self.world.inscribed.take(self.world.a, node, entry, images)
                )
            except (Gone, NbdmirrorError):
                return
        writes = self.world.album.writes(uuid, range(len(node.volumes)))
        done: list[bool] = []

        async def work() -> None:
            await node.people.restore(uuid, None, True, True, False)
            done.append(True)

        await self._command(work())
        for write in writes:
            self.world.content.end(write, acked=bool(done), durable=True)

    async def refresh(self, uuid: str) -> None:
        """It is taken anew (V10)."""
        if uuid:
            node = await self.primary()
            self.world.album.release(uuid)
            await self._command(node.people.refresh(uuid))

    async def delete(
        self, uuid: str, host: Host | None = None, *, everywhere: bool = False
    ) -> None:
        """Deletes a snapshot on the primary, or on ``host``, if it is not in use; alone there, or
        ``everywhere``."""
        if uuid:
            node = await self.primary() if host is None else host.node
            assert node is not None
            self.world.album.release(uuid)
            await self._command(node.people.delete(uuid, everywhere), host)
            if everywhere:
                self.world.album.gone(uuid)

    def spoil(self, path: str) -> None:
        """A disk of the primary is lost: whatever is done to that file fails."""
        self.world.a.disk.broken.add(path)

    def mend(self, path: str) -> None:
        """It works again."""
        self.world.a.disk.broken.discard(path)

    def link(self, *, up: bool, name: str = "b") -> None:
        """All links are there, or the one to ``name`` is cut."""
        if up:
            self.world.net.heal_all()
        else:
            self.world.net.cut("a", name)
            self.world.net.reset("a", name)

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
