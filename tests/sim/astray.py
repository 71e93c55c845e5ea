"""Writes to a node's own files that their disk lost, or put somewhere else in the file, and told
nobody (fault 16), and saves of a superblock that rot: who reads them back must notice.

A record of a log has its seq, a sector of a map its place, a superblock its number and counter:
what is not what it should be is not taken for good, all that it may have spoken of is compared, and
everything is equal again in the end, and each snapshot that is shown is what it was. That a newer
page of a map was lost, nothing says: what it had marked is a difference that nobody knows of until
a verify finds it.

Once at the end of a run, where nothing else goes on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from nbdmirror.codec import mappage, slots
from nbdmirror.core.ring import Ring
from tests.sim import snapshots
from tests.sim.faults import AllLost, Fault, Kind, Miswrites
from tests.sim.host import Host
from tests.sim.image import SECTOR
from tests.sim.options import constants
from tests.sim.oracle import Violation, compare
from tests.sim.script import Script
from tests.sim.world import World

SYNC_SECONDS = 300.0
WRITES = 5
SPREAD = 12
"""Writes, of which a resync has not copied all at once."""
MOMENT_S = 0.000_1
EVER = 1 << 30
PATH = "/state/superblock"
FULL_MAX = 400
LONGEST = 8 << 10
"""Of what is appended at once here."""
LOG_MAX = 68 << 10
"""Bytes of a log that is full after so many writes."""

Case = Callable[[Kind], Awaitable[None]]


class Astray:
    """What became of such writes, and whether that was noticed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(f"{world.seed}:astray")
        self._script = Script(world, lambda: None)
        self._what = ""

    async def run(self) -> None:
        """Now and then."""
        world, options, rng = self._world, self._world.options, self._random
        if world.a.node is None or rng.random() >= options.astray:
            return
        if options.snapshot_gap or options.mode != "async" or options.spill:
            return
        case, kind, what = rng.choice(self._cases())
        self._what = f"{kind.value} in {what}"
        world.trace("world", self._what)
        world.fired[self._what] += 1
        await case(kind)
        await self._all_equal()
        world.astray_on = None

    def _cases(self) -> list[tuple[Case, Kind, str]]:
        """What may happen to which file."""
        options, node = self._world.options, self._world.a.node
        assert node is not None
        both, maps = (Kind.DROP, Kind.STRAY), list[tuple[Case, Kind, str]]()
        if options.facets == 1:
            maps.append((self._active, Kind.DROP, "a map"))
            if options.on_full == "dcm" and options.log_size <= LOG_MAX:
                maps.append((self._map, Kind.DROP, "a map"))
        in_memory = node.status()["log"]["in_memory"]
        if options.hot_extents > mappage.SLOTS and not in_memory:
            return [*maps, (self._active, Kind.STRAY, "a map")]
        cases: list[tuple[Case, Kind, str]]
        cases = [(self._log_there, kind, "a log") for kind in both]
        cases.append((self._superblock, Kind.STRAY, "a superblock"))
        cases.append((self._after_snapshot, Kind.FLIP, "a superblock"))
        if not in_memory:
            cases.append((self._in_resync, Kind.FLIP, "a superblock"))
            cases += [(self._log, kind, "a log") for kind in both]
            cases += [(self._superblock, Kind.DROP, "a superblock"), *maps]
        return cases

    # -- what all of them do ---------------------------------------------------------------------

    async def _in_sync(self) -> None:
        world = self._world
        world.net.heal_all()
        node = world.a.node
        assert node is not None
        await world.in_life(world.a, node.wait("in-sync", None, SYNC_SECONDS))

    async def _all_equal(self) -> None:
        world = self._world
        await self._write()  # the primary sees whether a link is still there
        await self._in_sync()
        line = world.history.lines[-1]
        for host in world.hosts.values():
            compare(host.images(), line.image(line.head), f"{host.name} after a {self._what}")
        assert world.a.node is not None
        world.witness.check_facets(world.a, world.a.node)

    def _begin(self, host: Host) -> None:
        self._world.astray_on = host
        self._world.noticed.clear()

    async def _again(self, host: Host, end: str, faults: Miswrites | None = None) -> None:
        await self._end(host, end)
        await self._start(host, faults)

    async def _end(self, host: Host, end: str) -> None:
        world = self._world
        if end == "stop":
            await world.stop(host)
        elif end == "power":
            world.power_cut(host, AllLost())
        else:
            world.kill(host)

    async def _start(self, host: Host, faults: Miswrites | None) -> None:
        """Perhaps on a disk that loses what it then writes."""
        host.disk.faults = faults
        if not await self._world.start(host):
            raise Violation(f"{host.name} does not start after a {self._what}: {host.failed}")

    def _check_noticed(self, host: Host) -> None:
        if not self._world.noticed:
            raise Violation(f"{host.name} did not notice a {self._what} (fault 16)")
        self._world.fired[f"{self._what} was noticed"] += 1

    async def _verify(self) -> None:
        """What nobody noticed is found by those who look."""
        world, node = self._world, self._world.a.node
        await self._in_sync()
        assert node is not None
        for remote in world.remotes:
            for index, volume in enumerate(remote.config.volumes):
                world.rot.expect(node, index, remote, volume.facets[0])
            world.fired[f"{self._what} was found by a verify"] += bool(world.rot.wanted)
            world.fired[f"{self._what} made no difference"] += not world.rot.wanted
            await world.rot.verify(node, remote.name)
        await world.rot.check_mended()

    async def _write(self) -> None:
        await self._script.write(*self._place())

    def _place(self) -> tuple[int, int]:
        options, rng = self._world.options, self._random
        volume = rng.randrange(len(options.sizes))
        return volume, rng.randrange(options.sizes[volume] // options.cell)

    def _cut(self) -> None:
        for remote in self._world.remotes:
            self._script.link(up=False, name=remote.name)

    # -- the log ---------------------------------------------------------------------------------

    def _append(self, host: Host, kind: Kind) -> Miswrites:
        """Of the next one to the log: it lands somewhere else in the ring."""
        assert host.node is not None
        log = host.node.log
        at = log.ring.head % log.ring.capacity
        places = range(0, log.ring.capacity - LONGEST, SECTOR)
        shift = self._random.choice([place for place in places if place != at]) - at
        return Miswrites(log._file.path, Fault(kind, shift=shift))

    async def _log(self, kind: Kind) -> None:
        """A record of the primary's that remotes still need, with others behind it."""
        world, a = self._world, self._world.a
        end = self._random.choice(["kill", "stop", "read"])
        self._begin(a)
        self._cut()
        lost = self._random.randrange(WRITES - 1)
        far: dict[str, int | float] = {"engine.log.RECENT_BYTES_MAX": 1}
        with constants(far if end == "read" else {}):
            for turn in range(WRITES):
                a.disk.faults = self._append(a, kind) if turn == lost else None
                await self._write()
            if end == "read":
                await self._in_sync()
            else:
                await self._again(a, end)
        self._check_noticed(a)
        # What lies behind it in the log is in the facets, and soon on their disks.
        last = world.history.head
        await self._script.until(lambda node: _released(node.log.ring, last))

    async def _log_there(self, kind: Kind) -> None:
        """A record of a secondary's, which it has applied, with others behind it."""
        host = self._random.choice(self._world.remotes)
        self._begin(host)
        lost = 0
        for turn in range(WRITES):
            assert host.node is not None
            if turn == 1:
                lost = host.node.log.next_seq
            host.disk.faults = self._append(host, kind) if turn == 1 else None
            await self._write()
            await self._in_sync()
        await self._again(host, "kill")
        assert host.node is not None
        if host.node.log.ring.tail_seq <= lost:
            self._check_noticed(host)

    # -- the superblock --------------------------------------------------------------------------

    async def _superblock(self, kind: Kind) -> None:
        """A start's first save, or that and all that follow; and the next start."""
        rng, a = self._random, self._world.a
        host = a if kind is Kind.DROP else rng.choice(list(self._world.hosts.values()))
        # Nothing has to be released of the log, for a superblock that does not say so.
        last = self._world.history.head
        await self._script.until(lambda node: _released(node.log.ring, last))
        self._begin(host)
        self._cut()
        await self._end(host, rng.choice(["kill", "stop"]))
        # The next one goes to the other slot; it lands in the one that counts.
        to_other = 2 * newest_slot(host) - slots.SLOT_SIZE
        fault = Fault(kind, shift=rng.choice([to_other, slots.SECTOR_SIZE]))
        # The first write is that of the slot that counts, which is made durable once more.
        faults = Miswrites(PATH, fault, 2, EVER if kind is Kind.DROP else 1)
        await self._start(host, faults)
        if host is a:
            for _ in range(WRITES):
                await self._write()
            await self._script.flush()
        await self._again(host, rng.choice(["kill", "power"]))
        if faults.last:  # else a later save has put another in its place
            self._check_noticed(host)

    async def _in_resync(self, kind: Kind) -> None:
        """A secondary's last save, when some regions of a resync are there, and its log has held
        older versions of them. The primary's log has lost the newer ones, with its power."""
        world, rng, a = self._world, self._random, self._world.a
        host, held = rng.choice(world.remotes), rng.random() < 0.5
        self._begin(host)
        await self._delay(host, EVER if held else 0.0)
        places = [self._place() for _ in range(SPREAD)]
        for place in places:
            await self._script.write(*place)
        # Else a redo of the primary's brings the older versions back there too.
        await self._script.until(lambda node: _has_released(a, world.history.head))
        self._cut()
        assert a.node is not None
        log, stall = a.node.log._file.path, Fault(Kind.STALL, seconds=SYNC_SECONDS)
        a.disk.faults = lambda name, path, nth: stall if (name, path) == ("sync", log) else None
        for place in places:
            await self._script.write(*place)
        for volume in a.node.volumes:
            await world.in_life(a, volume.in_service()[0].sync())
        await self._again(a, "power")
        node = await self._script.primary()
        assert node.primary is not None
        remote = node.primary.remote(host.name)
        left = rng.randrange(1, max(2, remote.dirty_regions))
        world.net.heal_all()
        while remote.dirty_regions > left and world.a.node is node:
            await asyncio.sleep(MOMENT_S)
        await self._rotten(host)
        await self._delay(host, 0.0)

    async def _delay(self, host: Host, seconds: float) -> None:
        """Of its own: it ends as a session says so."""
        assert host.node is not None and host.node.secondary is not None
        applier = host.node.secondary.applier
        await self._world.in_life(host, applier.change(delay=seconds))

    async def _after_snapshot(self, kind: Kind) -> None:
        """The last save, when something was just overwritten that two snapshots have, perhaps
        without a redo that comes by what it was."""
        world, rng = self._world, self._random
        host = rng.choice(list(world.hosts.values()))
        self._begin(host)
        place, between = self._place(), rng.random()
        await self._script.write(*place)
        await self._script.snapshot()
        if between < 0.3:
            await self._script.write(*place)
        elif between < 0.9:
            await self._script.until(lambda node: _has_released(host, world.history.head))
        await self._script.snapshot()
        await self._script.write(*place)
        await self._in_sync()
        await self._rotten(host)
        await self._in_sync()
        await snapshots.look(world)

    async def _rotten(self, host: Host) -> None:
        """Its process dies, the save that counts rots, and it is started again."""
        await self._end(host, "kill")
        host.disk.flip(PATH, newest_slot(host) + self._random.randrange(slots.SECTOR_SIZE))
        await self._start(host, None)
        self._check_noticed(host)

    # -- the maps --------------------------------------------------------------------------------

    async def _active(self, kind: Kind) -> None:
        """A sector of the active map, at a start; or of extents that are new in it. Then power
        fails."""
        a = self._world.a
        self._begin(a)
        if kind is Kind.STRAY:
            fault = Fault(kind, shift=-mappage.SECTOR_SIZE)
            await self._again(a, "kill", Miswrites("/state/active", fault, 2))
            await self._again(a, "power")
            self._check_noticed(a)
            return
        a.disk.faults = Miswrites("/state/active", Fault(kind), 1, EVER)
        for _ in range(WRITES):
            await self._write()
        await self._in_sync()
        await self._again(a, "power")
        await self._verify()

    async def _map(self, kind: Kind) -> None:
        """All pages of a remote's map, from an overflow on."""
        a = self._world.a
        self._begin(a)
        self._cut()
        a.disk.faults = Miswrites("/state/dcm", Fault(kind), 1, EVER)
        assert a.node is not None and a.node.primary is not None
        for _ in range(FULL_MAX):
            await self._write()
            if all(remote.tracking for remote in a.node.primary.remotes):
                break
        await self._again(a, "kill")
        await self._verify()


def newest_slot(host: Host) -> int:
    """Where in the superblock the save that counts begins."""
    content, size = host.disk.content(PATH), slots.SLOT_SIZE
    index, _, _ = slots.choose([content[:size], content[size:]])
    return index * size


def _released(ring: Ring, seq: int) -> bool:
    """Whether it, and what lies before it, is needed no more, durably."""
    return ring.tail_seq > seq and ring.durable_tail == ring.tail


def _has_released(host: Host, seq: int) -> bool:
    return host.node is not None and _released(host.node.log.ring, seq)
