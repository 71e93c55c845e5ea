"""The hosts of one run: nodes created, booted, killed, cut from power, stopped and started.

Everything a node does happens in its own life; the world's tasks outlive it. Each start and stop
is checked against the oracle, at the one place where both are known.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from nbdmirror.codec import record as codec
from nbdmirror.config import (
    AdminConfig,
    Config,
    LogConfig,
    NbdConfig,
    RemoteConfig,
    ReplicationConfig,
    SnapshotConfig,
    VolumeConfig,
)
from nbdmirror.engine.create import create
from nbdmirror.engine.node import Node
from nbdmirror.errors import NbdmirrorError
from nbdmirror.ports import Env
from tests.sim.beside import Beside
from tests.sim.host import Host
from tests.sim.inscribed import Inscribed
from tests.sim.loop import WORLD, Incarnation, NodeDead, SimLoop
from tests.sim.net import SimNet
from tests.sim.options import Options
from tests.sim.oracle import Content, History, Moot
from tests.sim.rot import Rot
from tests.sim.snapshots import Album
from tests.sim.witness import Witness

T = TypeVar("T")


class Gone(Exception):
    """The node died before it was done."""


class World:
    """All of one run."""

    def __init__(self, seed: int, options: Options, *, trace: Callable[[str], None] | None) -> None:
        self.seed = seed
        self.options = options
        self.random = random.Random(f"{seed}:world")
        shuffle = random.Random(f"{seed}:shuffle") if options.shuffle else None
        self.loop = SimLoop(shuffle=shuffle)
        self.net: SimNet
        self.fired: Counter[str] = Counter()
        self.digest = hashlib.blake2b(digest_size=16)
        self._trace = trace
        self.serving: asyncio.Event
        """Set while the primary serves clients."""
        self.content = Content(options.sizes, options.cell)
        self.history = History([bytes(size) for size in options.sizes])
        self.album = Album(self)
        self.witness = self.make_witness()
        self.beside = Beside(self)
        self.inscribed = Inscribed(self)
        self.rot = Rot(self)
        self.astray_on: Host | None = None
        """Whose disk has lost or misplaced a write to a file of its node (``tests.sim.astray``)."""
        self.noticed: dict[str, None] = {}
        """Kinds of damage that nodes have told of since then."""
        self.hosts: dict[str, Host] = {}
        self.violation: BaseException | None = None
        self.fresh = {}
        self.logs = 0
        """How often the log was moved."""
        self.on_moment: list[Callable[[Host, str], None]] = []
        """Called with each event of a node: the moments at which a fault is most telling."""
        self.on_failed: Callable[[Host], None] = lambda host: None
        """Called when a node has ended by itself: somebody has to look after it."""
        self.broken: asyncio.Event
        self.on_flushed: Callable[[], None] = lambda: None
        """Called when a client's FLUSH has succeeded."""

    def make_witness(self) -> Witness:
        """Who holds what the nodes do against the oracle."""
        return Witness(self)

    @property
    def a(self) -> Host:
        """The primary."""
        return self.hosts["a"]

    @property
    def remotes(self) -> list[Host]:
        """The secondaries."""
        return [host for host in self.hosts.values() if host.role == "secondary"]

    def build(self) -> None:
        """Makes the hosts; within the running loop."""
        self.broken = asyncio.Event()
        self.serving = asyncio.Event()
        self.net = SimNet(self.loop, self.seed)
        names = ["b", "c"][: self.options.remotes]
        for name in ("a", *names):
            self.net.host(name)
            role = "primary" if name == "a" else "secondary"
            self.hosts[name] = Host(self, name, self._config(name, names), role)

    def _config(self, name: str, remotes: list[str]) -> Config:
        options = self.options
        primary = name == "a"
        facets = options.facets
        return Config(
            path="/etc/nbdmirror.toml",
            group="g",
            node=name,
            state_dir="/state",
            nbd=NbdConfig(("unix:/nbd",)),
            admin=AdminConfig(socket=""),
            log=LogConfig(
                size=options.log_size if primary else options.remote_log_size,
                mode="spill" if options.spill and primary else "disk",
                spill_threshold=options.spill if primary else 0,
                on_full=options.on_full,
                extent_size=options.extent,
                hot_extents=options.hot_extents,
            ),
            volumes=tuple(
                VolumeConfig(
                    f"v{index}",
                    size,
                    tuple(f"/facets/v{index}.{facet}" for facet in range(facets)),
                    options.region,
                )
                for index, size in enumerate(options.sizes)
            ),
            remotes=tuple(
                RemoteConfig(
                    remote,
                    f"tcp:{remote}:7000",
                    mode=options.mode,
                    on_link_loss=options.on_link_loss,
                    compression=options.compression,
                )
                for remote in remotes
            )
            if primary
            else (),
            replication=ReplicationConfig(
                listen=None if primary else f"tcp:{name}:7000",
                window_bytes=options.window,
                insecure=True,
            ),
            snapshots=SnapshotConfig(options.snapshots_max, options.snapshot_space),
        )

    # -- trace and failure ---------------------------------------------------------------------

    def trace(self, node: str, event: str) -> None:
        """One line of the run's history: the same for the same seed."""
        line = f"{self.loop.now_ns} {node} {event}"
        self.digest.update(line.encode())
        self.digest.update(b"\n")
        if self._trace is not None:
            self._trace(line)

    def fail(self, error: BaseException) -> None:
        """The run has found something; the first thing counts."""
        if self.violation is None:
            self.violation = error
            self.trace("world", f"VIOLATION {error}")
            self.broken.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task of the world itself; what it raises ends the run."""

        async def guard() -> None:
            try:
                await work
            except Exception as error:
                self.fail(error)

        return self.loop.spawn(WORLD, guard())  # whoever asks: a node may, in its own life

    async def in_life(self, host: Host, work: Coroutine[Any, Any, T]) -> T:
        """Runs work as part of a node; Gone if the node dies first."""
        if not host.life.alive:
            work.close()
            raise Gone
        task = self.loop.spawn(host.life, work)
        end = self.loop.create_future()
        host.waiting[end] = None
        task.add_done_callback(lambda _: _settle(end))
        try:
            await end
        except asyncio.CancelledError:
            task.add_done_callback(self._overheard)
            raise
        finally:
            del host.waiting[end]
        if not task.done():
            raise Gone
        try:
            return task.result()
        except NodeDead:  # it died in the middle of that very work
            raise Gone from None

    def _overheard(self, task: asyncio.Task[Any]) -> None:
        """Who asked for it has left: a refusal is nobody's; anything else is still a failure."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, NbdmirrorError):
            message = f"task {task.get_name()} failed and nobody looked"
            self.loop.call_exception_handler({"message": message, "exception": error})

    # -- lives -----------------------------------------------------------------------------------

    def _begin_life(self, host: Host) -> None:
        host.life = Incarnation(host.name, host.life.number + 1)
        host.gone = self.loop.create_future()

    def _end_life(self, host: Host, *, power: bool, stopped: bool = False) -> None:
        host.leaned = host.leaning
        for volume in host.node.volumes if host.node is not None else ():
            # It has seen a volume's last facet fail, and has not come to note it.
            unnoted = not volume.in_service() and any(f.unnoted for f in volume.facets)
            host.unsynced_lost = host.unsynced_lost or unnoted
        if host.role == "primary" and host.life.alive:
            self.content.died()
            self.serving.clear()
            self.album.died(host)
        if host.life.alive:
            if stopped:
                host.life.kill()
            else:
                self.loop.cut(host.life)
        self.net.kill(host.life, power=power)
        host.node = None
        host.starting = host.stopping = False
        for waiter in (host.gone, *host.waiting):
            _settle(waiter)

    def env(self, host: Host) -> Env:
        """The world as a node of that host sees it."""
        rng = random.Random(f"{self.seed}:node:{host.name}:{host.life.number}")
        return Env(host.disk, self.net.host(host.name), host.clock, rng)

    async def create(self, host: Host, *, force: bool = False) -> None:
        """Makes a node's state."""
        self._begin_life(host)
        host.starting, host.created = True, False
        await self.in_life(host, create(self.env(host), host.config, host.role, force=force))
        host.created = True
        self._end_life(host, power=False)

    async def start(self, host: Host) -> bool:
        """Boots the host if need be and starts its node. False: it died or failed meanwhile."""
        assert not host.alive
        self.net.boot(host.name)
        self._begin_life(host)
        host.starting = True
        self.trace(host.name, "start")
        if host.role == "primary":
            host.look_for_memory()
            if self.options.mode_changes:
                self._edit(host)
        node = host.coming = Node(self.env(host), host.config)
        node.events.listen(lambda event: self.witness.on_event(host, event))
        try:
            await self.in_life(host, node.start(nbd=False))
            restored = await self.in_life(host, overlaid(node))
        except Gone:
            return False
        except (NbdmirrorError, OSError) as error:
            if "could not be read for it" in str(error):  # what a restore was to bring back
                self.fail(Moot(str(error)))
            self._failed(host, str(error))
            return False
        host.starting = False
        host.node = node
        power, host.lost_power = host.lost_power, False
        if host.role == "primary":
            self.witness.recovered(host, node, restored, power=power)
            if not await self._said_again(host, node):
                return False
            self.serving.set()
        self.spawn(self._watch(host, node))
        return True

    async def _said_again(self, host: Host, node: Node) -> bool:
        """A person had not been told that a change was taken in (V13): says so again, before
        anybody writes. False if the node did not live to hear it."""
        if not self.beside.pending:
            return True
        host.node, host.starting = None, True
        try:
            await self.in_life(host, self.beside.say(node))
        except Gone:
            return False
        except (NbdmirrorError, OSError) as error:
            self._failed(host, str(error))
            return False
        host.node, host.starting = node, False
        return True

    def _edit(self, host: Host) -> None:
        """A person changes the mode of the log, or does not."""
        rng = random.Random(f"{self.seed}:mode:{host.life.number}")
        spill = self.options.spill if rng.random() < 0.5 else 0
        mode = "spill" if spill else "disk"
        log = replace(host.config.log, mode=mode, spill_threshold=spill)
        host.config = replace(host.config, log=log)

    async def _watch(self, host: Host, node: Node) -> None:
        """What the daemon does when its node has failed for good: it ends."""
        assert node.failed is not None
        ends: list[asyncio.Future[Any]] = [node.failed, host.gone]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if node.failed.done() and host.node is node:
            error = node.failed.result()
            self.trace(host.name, f"failed: {error}")
            await self.stop(host)
            host.failed = str(error)
            self.on_failed(host)

    def _failed(self, host: Host, why: str) -> None:
        self.trace(host.name, f"cannot start: {why}")
        self.fired["start failed"] += 1
        host.failed = why
        self._end_life(host, power=False)
        self.on_failed(host)

    async def stop(self, host: Host) -> None:
        """SIGTERM: the node stops cleanly, if nothing worse comes first."""
        host.leaned = host.leaning
        node, host.node = host.node, None
        if node is None:
            return
        if host.role == "primary":
            self.serving.clear()
        host.sources = [(volume.in_service() or volume.facets)[0].path for volume in node.volumes]
        host.stopping = True
        self.trace(host.name, "stop")
        try:
            if host.role == "primary":
                await self._requests_end(host)
            await self.in_life(host, node.stop())
        except Gone:
            return
        except (NbdmirrorError, OSError) as error:
            self.trace(host.name, f"stop: {error}")
        # A command that has not ended is cut off in the middle, as by a kill.
        self._end_life(host, power=False, stopped=not host.waiting)

    people_rest = False
    """Nobody takes, deletes or restores snapshots any more."""
    fresh: dict[str, None]
    """Facets of the primary on whose place a new disk lies, of which the node was not told yet."""
    requests = 0
    """Of clients, in flight."""

    async def _requests_end(self, host: Host) -> None:
        """As the export does: requests in flight have half a minute."""
        for _ in range(300):
            if not self.requests or host.gone.done():
                return
            await asyncio.sleep(0.1)

    def kill(self, host: Host) -> None:
        """SIGKILL: the page cache stays."""
        self.trace(host.name, "kill")
        self._end_life(host, power=False)

    def suspend(self, host: Host, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after some time; whatever may come meanwhile."""
        life = host.life
        if host.alive and life.running:
            self.trace(host.name, "suspend")
            self.loop.suspend(life)
            context = self.net.context
            self.loop.call_later(seconds, self.loop.wake, life, context=context)

    def power_cut(self, host: Host, rng: random.Random | None = None) -> None:
        """The host loses power, and stays off until ``start``; ``rng`` draws what is lost."""
        self.trace(host.name, "power cut")
        self._end_life(host, power=True)
        host.disk.power_cut(rng)
        host.lost_power = True

    async def replace(self, host: Host) -> None:
        """A person puts in a new disk and creates the node anew."""
        assert not host.alive and host.role == "secondary"
        self.trace(host.name, "new disk")
        host.replaced += 1
        host.new_disk()
        await self.create(host)


async def overlaid(node: Node) -> dict[int, bytes]:
    """What clients read of volumes whose restore is not copied yet, by index."""
    volumes = [volume for volume in node.volumes if volume.overlay is not None]
    return {volume.index: bytes(await volume.read(0, volume.size)) for volume in volumes}


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def clearing(kind: str) -> tuple[int, int]:
    """(kind, flags) of the record of a clearing request."""
    return {
        "trim": (codec.TRIM, 0),
        "zero": (codec.ZERO, 0),
        "zero keeping space": (codec.ZERO, codec.NO_HOLE),
    }[kind]
