"""What goes wrong in a run: draws one thing after another, and mends it all in the end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from collections.abc import Coroutine
from typing import Any

from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.node import Node
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed, NbdmirrorError
from tests.sim.faults import AllLost, Fault, Kind, once
from tests.sim.held import Held
from tests.sim.host import Host
from tests.sim.options import ADMIN_FAULTS, DISK_FAULTS
from tests.sim.oracle import Violation
from tests.sim.world import Gone, World

MOMENTS_MAX = 12
DISKS_AND_PEOPLE = (*DISK_FAULTS, *ADMIN_FAULTS, "sync loss and kill a", "log error")
FAULTS_MAX = 40
"""Of one run: enough to meet, few enough to let the clients get somewhere."""


class Faults:
    """Draws what goes wrong, one thing after another."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(f"{world.seed}:faults")
        self._losses = random.Random(f"{world.seed}:losses at power cuts")
        self._numbers = random.Random(f"{world.seed}:errors of writes")
        self._restarts: list[asyncio.Task[None]] = []
        world.on_failed = self._restart_soon
        self._moments = 0
        self._over = False
        self.held = Held(world)
        if world.options.moments:
            world.on_moment.append(self._moment)

    async def run(self) -> None:
        """Until cancelled."""
        kinds = self._world.options.faults
        if not kinds:
            return
        rng = self._random
        for _ in range(FAULTS_MAX):
            await asyncio.sleep(self._world.options.fault_gap * rng.expovariate(1.0))
            (kind,) = rng.choices(list(kinds), list(kinds.values()))
            self._world.trace("world", f"fault: {kind}")
            self._world.fired[f"fault {kind}"] += 1
            await self._apply(kind)

    async def _apply(self, kind: str) -> None:
        if kind in DISKS_AND_PEOPLE and self._world.beside.pending:
            return  # which facet holds what is agreed upon between two
        name, _, last = kind.rpartition(" ")
        if name == "suspend":
            seconds = self._random.choice([0.05, 1.0, 12.0, 60.0])
            self._world.suspend(self._targets(last)[0], seconds)
        elif name in ("power", "kill", "stop"):
            await self._end(name, self._targets(last))
        elif kind in ("die starting", "stop and power"):
            await self._odd_end(kind)
        elif kind == "facet error":
            self._facet_error()
        elif kind == "facet lost":
            self._facet_lost()
        elif kind == "sync loss and kill a":
            self._lose_and_kill()
        elif kind == "log error":
            self._log_error()
        elif kind == "log replace":
            await self._replace_log()
        elif kind == "facet online":
            self._restarts.append(self._world.spawn(self._facet_in()))
        elif kind in ("facet offline", "facet replace"):
            # It ends before all is mended, or a person would take out what was just brought in.
            out = self._world.spawn(self._facet_out(kind))
            self._restarts.append(out)
            await asyncio.shield(out)
        elif kind in ADMIN_FAULTS:
            await self._admin(kind)
        elif name in ("sync error", "sync loss", "write error"):
            self._disk_error(name, self._targets(last)[0])
        elif kind == "disk stall":
            host = self._any()
            host.disk.stall(self._random.choice([0.1, 3.0, 30.0]))
        else:
            self._link(kind)

    def _targets(self, name: str) -> list[Host]:
        world = self._world
        if name == "both":
            return list(world.hosts.values())
        return [world.a if name == "a" else self._random.choice(world.remotes)]

    def _any(self) -> Host:
        return self._random.choice(list(self._world.hosts.values()))

    # -- nodes -----------------------------------------------------------------------------------

    async def _end(self, how: str, hosts: list[Host]) -> None:
        world = self._world
        for host in hosts:
            if not host.alive:
                continue
            if how == "stop":
                # It goes on when the faults come to their end meanwhile.
                await asyncio.shield(world.spawn(world.stop(host)))
            elif how == "kill":
                world.kill(host)
            else:
                world.power_cut(host, AllLost() if self._losses.random() < 0.2 else None)
            self._restart_soon(host)

    def _moment(self, host: Host, kind: str) -> None:
        """A node has just done something: its host, or another, may lose power over it."""
        rng, world = self._random, self._world
        if kind not in world.options.moments_of or self._over or self._moments >= MOMENTS_MAX:
            return
        if rng.random() < world.options.moments:
            self._moments += 1
            victim = host if rng.random() < 0.7 else self._any()
            delay = rng.choice(world.options.moments_delay) * rng.random()
            self._restarts.append(world.spawn(self._cut_later(victim, delay)))

    async def _cut_later(self, host: Host, delay: float) -> None:
        await asyncio.sleep(delay)
        if host.alive and not self._over:
            self._world.fired["fault at a moment"] += 1
            how = self._random.choice(self._world.options.moments_do)
            if how == "reset":
                remote = host if host.role == "secondary" else self._world.remotes[0]
                self._world.net.reset("a", remote.name)
            else:
                await self._end(how, [host])

    async def _odd_end(self, kind: str) -> None:
        world, rng = self._world, self._random
        host = self._any()
        if not host.alive:
            return
        if kind == "stop and power":
            stopping = world.spawn(world.stop(host))
            await asyncio.sleep(rng.choice([0.001, 0.01, 0.1]) * rng.random())
            world.power_cut(host)
            await stopping
        else:
            for _ in range(rng.randint(1, 3)):
                end = rng.choice([world.kill, world.power_cut])
                end(host)
                starting = world.spawn(self._start(host))
                await asyncio.sleep(rng.choice([0.001, 0.01, 0.1]) * rng.random())
            if host.alive:
                world.power_cut(host)
            await starting
        self._restart_soon(host)

    def _restart_soon(self, host: Host) -> None:
        delay = self._random.choice([0.0, 0.1, 2.0, 15.0]) * self._random.random()

        async def restart() -> None:
            await asyncio.sleep(delay)
            if not host.alive:
                await self._start(host)

        self._restarts.append(self._world.spawn(restart()))

    async def _start(self, host: Host) -> None:
        """Starts a host; one whose disk had failed gets a new one, if it was a secondary."""
        world = self._world
        if host.alive:
            return
        host.disk.faults = None
        if host.failed is not None:
            host.failed = None
            spared = world.options.last_facet or world.a.leaning
            spare = host.role == "secondary" and not spared
            try:
                if spare and self._random.random() < world.options.replaces:
                    await world.replace(host)
                elif not host.created:  # the power went in the middle of it
                    await world.create(host, force=True)
                elif spare and world.options.facets > 1:
                    await self._swap(host)
            except Gone:
                return
        if not host.alive:  # somebody else may have been quicker
            await world.start(host)

    async def _swap(self, host: Host) -> None:
        """A person puts another disk in the place of one of a secondary's facets, or not."""
        rng = self._random
        if self._world.options.devices:
            return  # nothing tells the node
        if rng.random() < 0.5 and not host.swapped:  # one of them is left
            volume = rng.choice(host.config.volumes)
            path = rng.choice(volume.facets)
            self._world.trace("people", f"new disk for {path} of {host.name}")
            self._world.fired["facet swapped"] += 1
            host.swapped, host.created = True, False  # until there is a file again, durably
            await self._new_disk(host, path)
            if not host.disk.exists(path):
                host.disk.open(path, create=True)
            await host.disk.sync_directory(path.rpartition("/")[0])
            host.created = True

    # -- links -----------------------------------------------------------------------------------

    def _link(self, kind: str) -> None:
        world, rng = self._world, self._random
        net = world.net
        remote = rng.choice(world.remotes).name
        if kind == "reset":
            net.reset("a", remote)
        elif kind == "net stall":
            net.stall("a", remote, rng.choice([0.05, 1.0, 8.0, 30.0]))
        elif kind == "slow link":
            for ends in (("a", remote), (remote, "a")):
                net.link(*ends).bandwidth = rng.choice([20e3, 200e3, None])
        else:
            both = kind == "cut"
            ends = ("a", remote) if rng.random() < 0.5 else (remote, "a")
            net.cut(*ends, both=both)
            seconds = rng.choice([0.05, 1.0, 12.0, 60.0])
            world.loop.call_later(seconds, net.heal, "a", remote, context=net.context)

    # -- disks -----------------------------------------------------------------------------------

    def _disk_error(self, name: str, host: Host) -> None:
        """The next operation of a kind on one of a node's files fails, and the node with it."""
        rng = self._random
        if host.node is None:
            return
        operation = "sync" if name.startswith("sync") else rng.choice(["pwrite", "pwritev"])
        kind = {
            "sync error": Kind.ERROR,
            "sync loss": Kind.LOSE,
            "write error": rng.choice([Kind.ERROR, Kind.SHORT]),
        }[name]
        prefix = rng.choice(["/state", "/facets", "/"])
        first = once(operation, prefix, Fault(kind, self._number(operation)))

        def inject(name: str, where: str, nth: int) -> Fault | None:
            return None if self._irreplaceable(host, where) else first(name, where, nth)

        host.disk.faults = inject

    @property
    def _last_may_fail(self) -> bool:
        """Whether a remote may stand in for a last facet: not one that somebody has set back."""
        world = self._world
        return world.options.last_facet and not any(one.set_back for one in world.remotes)

    def _irreplaceable(self, host: Host, path: str) -> bool:
        """Whether that is the last facet of a volume, and people have just set a remote back: they
        had another copy then, and no two of them fail together."""
        world, node = self._world, host.node
        if node is None or host is not world.a or not any(one.set_back for one in world.remotes):
            return False
        left = [[facet.path for facet in volume.in_service()] for volume in node.volumes]
        return [path] in left

    def _number(self, operation: str) -> int:
        """Of the error: a write finds the disk full now and then."""
        full = operation.startswith("pwrite") and self._numbers.random() < 0.4
        return errno.ENOSPC if full else errno.EIO

    def _failing_volume(self) -> Volume | None:
        """A volume of the primary of which a facet may fail."""
        node = self._world.a.node
        if node is None:
            return None
        volume = self._random.choice(node.volumes)
        spared = len(volume.in_service()) < 2 and not self._last_may_fail
        return None if spared else volume

    def _facet_error(self) -> None:
        """An operation on one of several facets of the primary fails."""
        world, rng = self._world, self._random
        volume = self._failing_volume()
        if volume is None:
            return
        operation, kind = rng.choice(
            [
                ("pwrite", Kind.ERROR),
                ("sync", Kind.ERROR),
                ("sync", Kind.LOSE),
                ("punch", Kind.ERROR),
                ("read", Kind.ERROR),
                ("try_pread", Kind.ERROR),
                ("write", Kind.ERROR),
            ]
        )
        path = rng.choice(volume.facets).path
        first = once(operation, path, Fault(kind, self._number(operation)))

        def inject(name: str, where: str, nth: int) -> Fault | None:
            # By the time that it strikes, another may have gone.
            alone = len(volume.in_service()) < 2 and not self._last_may_fail
            return None if alone else first(name, where, nth)

        world.a.disk.faults = inject

    def _facet_lost(self) -> None:
        """The disk of one of the primary's facets is gone for some time."""
        world, rng = self._world, self._random
        volume = self._failing_volume()
        if volume is None:
            return
        path, broken = rng.choice(volume.facets).path, world.a.disk.broken
        # Another may be gone, and nobody has noticed yet.
        left = [one for one in volume.in_service() if one.path not in {path, *broken}]
        if not left and not self._last_may_fail:
            return
        broken.add(path)
        seconds = rng.choice([0.05, 1.0, 12.0, 60.0])
        world.loop.call_later(seconds, broken.discard, path, context=world.net.context)

    def _log_error(self) -> None:
        """The primary's log goes on in memory (M13)."""
        node = self._world.a.node
        if node is not None:
            self._world.a.disk.faults = once("sync", node.log._file.path, Fault(Kind.ERROR))

    def _lose_and_kill(self) -> None:
        """A sync of one of several facets of the primary loses what it should have made durable,
        and the process dies about when it hears of it."""
        world, rng = self._world, self._random
        node = world.a.node
        if node is None:
            return
        volume = rng.choice(node.volumes)
        if len(volume.in_service()) < 2:
            return
        facet = rng.choice(volume.facets)
        first = once("sync", facet.path, Fault(Kind.LOSE))

        def inject(name: str, where: str, nth: int) -> Fault | None:
            fault = first(name, where, nth) if len(volume.in_service()) > 1 else None
            if fault is not None:
                delay = world.options.timing.sync[1] * rng.random() * 2
                self._restarts.append(world.spawn(self._kill_later(facet, delay)))
            return fault

        world.a.disk.faults = inject

    async def _kill_later(self, facet: LocalFacet, delay: float) -> None:
        host = self._world.a
        life = host.life
        await asyncio.sleep(delay)
        if life.alive and host.node is not None:
            # What is not noted may be what the other facets are made equal to.
            host.unsynced_lost = host.unsynced_lost or facet.failed is None or facet.unnoted
            await self._end("kill", [host])

    # -- people ----------------------------------------------------------------------------------

    async def _facet_out(self, kind: str) -> None:
        """A facet is taken out of service for a time, and brought back, or its disk replaced."""
        world, rng = self._world, self._random
        node = world.a.node
        if node is None:
            return
        paths = [f.path for v in node.volumes for f in v.facets if f.path not in world.fresh]
        if not paths:
            return
        path = rng.choice(paths)
        with contextlib.suppress(Gone, NbdmirrorError):
            await world.in_life(world.a, node.facet("offline", path))
            await asyncio.sleep(rng.choice([0.01, 0.3, 5.0]) * rng.random())
            self._check_same(node)
            if kind == "facet replace":
                world.fresh[path] = None
                await world.in_life(world.a, self._new_disk(world.a, path))
                self._check_same(node)
                await world.in_life(world.a, node.facet("replace", path))
                del world.fresh[path]
            else:
                await world.in_life(world.a, node.facet("online", path))

    def _check_same(self, node: Node) -> None:
        """Gone if the primary was started anew: a former process is asked for nothing."""
        if self._world.a.node is not node:
            raise Gone

    async def _facet_in(self) -> None:
        """Somebody sees a facet fail and asks for it again, sooner than the node has noted that."""
        world, node = self._world, self._world.a.node
        while node is not None and node is world.a.node and not self._over:
            for path in [f.path for v in node.volumes for f in v.facets if f.unnoted]:
                with contextlib.suppress(Gone, NbdmirrorError):
                    await world.in_life(world.a, node.facet("online", path))
            await asyncio.sleep(0.002)

    async def _replace_log(self) -> None:
        """The log is moved, or brought back from memory."""
        world = self._world
        node = world.a.node
        if node is not None:
            world.logs += 1
            with contextlib.suppress(Gone, NbdmirrorError):
                await world.in_life(world.a, node.log_replace(f"/logs/{world.logs}"))

    async def _new_disk(self, host: Host, path: str) -> None:
        """What a person puts in may hold anything."""
        host.disk.broken.discard(path)
        size = len(host.disk.content(path))
        if self._world.options.devices:
            host.disk.add_block_device(path, size)
            if self._random.random() < 0.5:
                host.disk.scribble(path, 0, b"\xff" * size)
            return
        host.disk.unlink(path)
        if self._random.random() < 0.5:
            file = host.disk.open(path, create=True)
            with contextlib.suppress(OSError):  # a fault that was meant for the old disk
                file.pwrite(0, b"\xff" * size)
                await file.sync()
                await host.disk.sync_directory(path.rpartition("/")[0])
            file.close()

    async def _admin(self, kind: str) -> None:
        world, rng = self._world, self._random
        node = world.a.node
        if kind == "clock jump":
            self._any().clock.offset_ns += rng.choice([-86400, 86400, 3600]) * 1_000_000_000
        elif node is not None:
            name = rng.choice(world.remotes).name
            with contextlib.suppress(Gone, NbdmirrorError):
                if kind == "pause":
                    await world.in_life(world.a, node.pause(name))
                    await asyncio.sleep(rng.random())
                    self._check_same(node)
                    await world.in_life(world.a, node.resume(name))
                elif kind == "verify":
                    await world.in_life(world.a, node.verify(name, rng.random() < 0.5))
                else:
                    await world.in_life(world.a, node.resync(name, kind == "full resync"))

    # -- the end of it ---------------------------------------------------------------------------

    async def heal(self) -> None:
        """Everything is mended and started."""
        world = self._world
        self._over = True
        while unfinished := [task for task in self._restarts if not task.done()]:
            await asyncio.wait(unfinished)
        world.net.heal_all()
        for host in world.hosts.values():
            host.disk.faults = None
            host.disk.broken.clear()
            for other in world.hosts:
                if other != host.name:
                    world.net.link(host.name, other).bandwidth = None
        for host in world.hosts.values():
            for _ in range(10):
                while host.stopping or host.starting:
                    await asyncio.sleep(0.1)
                if host.node is None:
                    await self._start(host)
            if host is world.a and host.node is None:
                raise Violation(f"the primary does not start: {host.failed}")
        node = world.a.node
        if node is None:  # while the others started: an error from before
            raise Gone
        try:
            await self._bring_back(node)
        except DiskFailed as error:  # an error from before has only now been noticed
            raise Gone from error

    async def _bring_back(self, node: Node) -> None:
        world = self._world

        async def ask(work: Coroutine[Any, Any, Any]) -> None:
            if world.a.node is not node:  # it has failed meanwhile, and there is another
                work.close()
                raise Gone
            await world.in_life(world.a, work)

        await self.held.end()
        for remote in world.remotes:
            await ask(node.resume(remote.name))
        if node.status()["log"]["in_memory"] and self._random.random() < 0.5:
            await self._replace_log()
        for volume in node.volumes:
            for facet in volume.facets:
                swapped = facet.path in world.fresh and not facet.writable
                action = "replace" if swapped else "online"
                world.fresh.pop(facet.path, None)
                await ask(node.facet(action, facet.path))
