"""The invariants, checked while a run goes on: on crash clones, and on what the nodes say.

A crash clone is a copy of a host's disk whose power is cut; a node recovers on it
(``tests.sim.clone``).
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from nbdmirror.engine.node import Node
from tests.sim import cover
from tests.sim.clone import Image, recover_alone
from tests.sim.faults import AllLost
from tests.sim.holders import held
from tests.sim.host import Host
from tests.sim.oracle import Violation, compare
from tests.sim.snapshots import look
from tests.sim.world import World


class Checks:
    """Looks at the run from time to time."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(f"{world.seed}:checks")
        self._losses = random.Random(f"{world.seed}:losses")
        self._done: dict[str, tuple[object, int]] = {}
        self._cloned: dict[str, list[tuple[int, int]]] = {}
        """What the disks that the last clone of a host was made of had done by then."""
        self._looked = (-1, -1)
        """What the primary's disk and history had come to when they were last compared."""
        world.on_moment.append(self._moment)

    async def run(self) -> None:
        """Until cancelled."""
        gap = self._random.choice([0.003, 0.02, 0.1, 1.0])
        while True:
            await asyncio.sleep(gap * self._random.random() * 2)
            self.look()
            await look(self._world)
            if self._random.random() < 0.2:
                host = self._random.choice(list(self._world.hosts.values()))
                if host.created and self._has_changed(host):
                    self.crash_clone(host)
                gap = min(gap * 1.1, 2.0)

    def _has_changed(self, host: Host) -> bool:
        """Whether a clone can show something new: since the last one a disk was written to."""
        hosts = self._world.hosts.values() if host.role == "primary" else [host]
        state = [(other.disk.operations, other.disk.boots) for other in hosts]
        former = self._cloned.get(host.name)
        self._cloned[host.name] = state
        return state != former

    def _moment(self, host: Host, kind: str) -> None:
        """After a handshake the primary relies on what it was told: is it true? And what a remote
        lacks must not be forgotten between log and map."""
        if kind == "connected" and self._random.random() < 0.3:
            self._world.spawn(self._clone_soon(self._world.remotes, 0.002))
        elif kind == "connected" and self._losses.random() < 0.3:
            self._world.spawn(self._clone_soon([host], 0.02))
        elif kind == "overflow" and self._random.random() < 0.5:
            self._world.spawn(self._clone_soon([host], 0.05))

    async def _clone_soon(self, hosts: list[Host], seconds: float) -> None:
        await asyncio.sleep(seconds * self._random.random())
        for host in hosts:
            if host.created:
                self.crash_clone(host)

    # -- what must hold at every moment ----------------------------------------------------------

    def look(self) -> None:
        """Everything that can be checked without a clone."""
        world = self._world
        for host in world.hosts.values():
            if host.node is not None:
                self._bounds(host, host.node)
        node = world.a.node
        if node is None:
            return
        status = node.status()
        for remote in status["remotes"]:
            self._progress(remote)
            if remote["state"] == "synchronised" and remote["dirty"]["regions"]:
                raise Violation(f"{remote['name']} is synchronised with marked regions (I5)")
        restoring = any(volume.overlay is not None for volume in node.volumes)
        flying = any(facet.pending for volume in node.volumes for facet in volume.facets)
        state = (world.a.disk.operations, world.history.head)
        if state != self._looked and not (restoring or flying or world.beside.pending):
            self._looked = state
            line = world.history.lines[-1]
            for index, (mine, wanted) in enumerate(
                zip(world.a.local(), line.image(line.head), strict=True)
            ):
                if mine is not None:  # else crash clones ask who holds it
                    compare([mine], [wanted], f"the primary (V5): volume {index}")
            world.witness.check_facets(world.a, node)

    def _progress(self, remote: dict[str, Any]) -> None:
        """Bytes done never fall within a pass; no more is sent than what is marked (I4)."""
        resync = remote["resync"]
        name = remote["name"]
        if resync is None:
            self._done.pop(name, None)
            return
        node = self._world.a.node
        assert node is not None and node.primary is not None
        run = (node.primary.remote(name).progress, resync["pass"])
        known, done = self._done.get(name, (run, 0))
        if known == run and resync["done_bytes"] < done:
            raise Violation(f"progress of {name} fell from {done} to {resync['done_bytes']}")
        if resync["done_bytes"] > resync["total_bytes"]:
            raise Violation(f"progress of {name} is above 100 %: {resync}")
        self._done[name] = (run, resync["done_bytes"])

    def _bounds(self, host: Host, node: Node) -> None:
        """I6: queues have limits, whatever happens."""
        ring = node.log.ring
        if ring.head - ring.durable_tail > ring.capacity:
            raise Violation(f"the log of {host.name} holds more than it can")
        for receiver in node.doors.receivers.values():
            if receiver._queued > (8 << 20) + (4 << 20):
                raise Violation(f"{host.name} queues {receiver._queued} bytes")

    # -- crash clones ----------------------------------------------------------------------------

    def _lost(self) -> random.Random | None:
        """What is lost of a clone: now and then all that was not synced. A sector that was written
        often lands almost surely in some version, so its absence would hardly ever be seen."""
        return AllLost() if self._losses.random() < 0.25 else None

    def crash_clone_of_one(self) -> None:
        """Of a host that is drawn."""
        self.crash_clone(self._random.choice(list(self._world.hosts.values())))

    def crash_clone(self, host: Host, rng: random.Random | None = None) -> None:
        """What if this host lost its power now? ``rng`` draws what is lost."""
        world = self._world
        if host.role == "primary" and world.beside.pending:
            return  # what it holds is not what it has been told
        if world.rot.spoilt or world.astray_on is not None:
            return
        world.fired[f"clone of {host.role}"] += 1
        kept = self._kept(host)
        disk = host.disk.clone(f"{world.seed}:clone:{world.loop.now_ns}")
        disk.power_cut(rng or self._lost())
        image = recover_alone(disk, host.config, f"{world.seed}:clone")
        what = f"a clone of {host.name} (O21)"
        world.album.check(host, image.node, image.snapshots, what)
        if host.role == "secondary":
            self._check_secondary(host, image)
            return
        if image.seq < kept:
            raise Violation(f"{what} ends at {image.seq}, but {kept} was in the file (O5)")
        self._check_primary(image, self._remotes_of(image.node))

    def _remotes_of(self, primary: Node) -> dict[str, Image]:
        """What its remotes come back with from their own deaths, or losses of power, at once."""
        world, found = self._world, {}
        for host in world.remotes:
            if not (host.created and _is_remote(primary, host)):
                continue
            disk = host.disk.clone(f"{world.seed}:cover:{world.loop.now_ns}")
            if self._random.random() < 0.5:
                disk.power_cut(self._lost())
            found[host.name] = recover_alone(disk, host.config, f"{world.seed}:cover")
        return found

    def _check_primary(self, image: Image, remotes: dict[str, Image]) -> None:
        """What it makes of all that is left is what was durable; and a remote that came back with
        it would get all that it lacks."""
        world = self._world
        volumes = held(image.node, image.volumes, image.pending, remotes).volumes
        world.fired["clone without a facet"] += any(one is None for one in image.volumes)
        for volume, data in enumerate(volumes):
            world.content.check(
                volume, 0, data, since=0, crashed=True, what="a clone of the primary (I3)"
            )
        for name, other in remotes.items():
            if other.node.store.state.get("damaged") and world.hosts[name].lost_unnoted:
                continue
            rule = cover.check(
                image.node,
                name,
                other.node,
                image.pending,
                volumes,
                other.images(),
                world.options.cell,
            )
            world.fired[f"cover {rule}"] += 1

    @staticmethod
    def _kept(host: Host) -> int:
        """The last record that this primary has durably in the file of its log, as it believes."""
        node = host.node
        if host.role != "primary" or node is None or node.log.failed is not None:
            return 0
        if node.log.frozen or node.store.state.get("log_volatile"):
            return 0
        return node.log.kept_seq

    def flushed(self) -> None:
        """With synchronous remotes what a flush promised survives the loss of the primary (I3)."""
        world = self._world
        node = world.a.node
        if node is None or node.primary is None or self._random.random() < 0.7:
            return
        for remote in node.primary.remotes:
            host = world.hosts[remote.name]
            gate = remote.gate
            if gate is None or gate.excused or not (gate.engaged and gate.streaming):
                continue
            if not host.created:  # a new disk, and the primary has not noticed yet
                continue
            disk = host.disk.clone(f"{world.seed}:flushed:{world.loop.now_ns}")
            disk.power_cut(self._lost())
            image = recover_alone(disk, host.config, f"{world.seed}:flushed")
            if image.consistent and gate.consistent:
                world.fired["flush is at a synchronous remote"] += 1
                for volume, data in enumerate(image.images()):
                    what = f"{host.name} after a flush (I3)"
                    world.content.check(volume, 0, data, since=0, crashed=True, what=what)

    def _check_secondary(self, host: Host, image: Image) -> None:
        world = self._world
        believed = self._believed(host)
        if not image.initialised or not image.consistent:
            world.fired["clone inconsistent"] += 1
            return
        if world.beside.hides(image.seq):
            return
        wanted = world.history.image(image.epoch, image.seq)
        what = f"a clone of {host.name} at record {image.seq} (I1)"
        compare(image.images(), wanted, what)
        if image.held is not None:
            seq, volumes = image.held
            here = f"a clone of {host.name} that is held back at record {seq} (I1, V8)"
            compare(volumes, world.history.image(image.epoch, seq), here)
            world.fired["clone that is held back"] += 1
        for volume, data in zip(image.node.volumes, wanted, strict=True):
            for facet in volume.in_service():
                content = image.node.env.disk.content(facet.path)  # type: ignore[attr-defined]
                compare([content[: volume.size]], [data], f"{facet.path} of {what}")
        world.album.check_there(host, image.node, image.epoch, image.seq)
        if image.seq < believed:
            raise Violation(
                f"a clone of {host.name} ends at {image.seq}, but {believed} was durable (O4)"
            )

    def _believed(self, host: Host) -> int:
        """What the primary relies on that this secondary has on disk."""
        node = self._world.a.node
        if node is None or node.primary is None or not _is_remote(node, host):
            return 0
        remote = node.primary.remote(host.name)
        if remote.link != "connected" or remote.tracking or remote.starting:
            return 0
        return remote.durable_seq


def _is_remote(primary: Node, host: Host) -> bool:
    """Not so while a person has removed it."""
    assert primary.primary is not None
    return any(remote.name == host.name for remote in primary.primary.remotes)
