"""Snapshots in a run: who takes and deletes them, and the oracle that each equals its seq for ever.

A snapshot must read as the group did after its record, on both sides, across crashes, overflows,
resyncs and deletions in any order (V9, O21, X2); one that was promised must not be gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdmirror.codec import mark as marks
from nbdmirror.codec.mark import Mark
from nbdmirror.engine.node import Node
from nbdmirror.engine.snapshots import LOST_MAX
from nbdmirror.errors import NbdmirrorError, VolumeFailed
from tests.sim.oracle import ID_BYTES, Entry, Violation, Write, compare

if TYPE_CHECKING:
    from tests.sim.host import Host
    from tests.sim.world import World

NOTHING = Entry(0, 0, 0, b"")
"""What a mark changes."""


@dataclass(frozen=True, slots=True)
class Found:
    """A snapshot as a node gives it: its entry, and the content of each of its volumes."""

    entry: dict[str, Any]
    images: list[bytes]


async def read_all(node: Node) -> list[Found]:
    """Every snapshot that a node shows; one that goes meanwhile is left out."""
    found = []
    for entry in list(node.snapshots.entries):
        if not node.snapshots.shown(entry):
            continue
        images = []
        try:
            for index in entry["volumes"]:
                chain = node.snapshots.chains[index]
                images.append(bytes(await chain.read(entry["uuid"], 0, chain.volume.size)))
        except VolumeFailed as error:
            # What lies below a restore is in facets only; and a disk may refuse when nobody else
            # has it: then the error says so.
            lost = any(not v.in_service() or v.overlay is not None for v in node.volumes)
            words = ("could not be read for it", "simulated", "nor a remote")
            lost = lost or any(word in str(error) for word in words)
            if node.snapshots.shown(entry) and not lost:
                raise Violation(f"snapshot {entry['uuid']} cannot be read: {error}") from error
            continue
        if node.snapshots.shown(entry):
            found.append(Found(dict(entry), images))
    return found


class Album:
    """What every snapshot has to show."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._images: dict[str, list[bytes]] = {}
        self._volumes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        """(epoch, seq) of the record of each."""
        self._promised: dict[str, None] = {}
        self._released: dict[str, None] = {}
        self._lacked: dict[tuple[str, int], dict[str, None]] = {}
        """By host, and which disk of it: the snapshots that it told as lost or lacking."""
        self._imageless: dict[str, None] = {}
        """Secondaries that told that they have lost the image from before the resync that runs."""
        self._gone: dict[str, None] = {}
        """Deleted on every node, or refreshed."""

    def marked(self, epoch: int, seq: int, mark: Mark) -> None:
        """The primary logs a mark behind the record ``seq``."""
        if mark.do == marks.SNAPSHOT:
            assert mark.uuid is not None
            image = self._world.history.lines[-1].image(seq)
            self._images[mark.uuid] = [bytes(image[index]) for index in mark.volumes]
            self._volumes[mark.uuid] = mark.volumes
            self._places[mark.uuid] = epoch, seq + 1

    def restored(self, uuid: str, volumes: Sequence[str], seq: int) -> None:
        """A restore is complete: the group after ``seq`` is another from now on."""
        world = self._world
        if world.history.lines[-1].base_seq < seq:
            names = [volume.name for volume in world.a.config.volumes]
            shown = self._shown(uuid)
            world.history.restored(seq, {names.index(n): shown[names.index(n)] for n in volumes})
            world.fired["restored"] += 1

    def _shown(self, uuid: str) -> dict[int, bytes]:
        """What a restore of it brings back, by volume."""
        images = dict(zip(self._volumes[uuid], self._images[uuid], strict=True))
        return self._world.inscribed.shown(uuid, images)

    def images(self, entry: dict[str, Any]) -> list[bytes] | None:
        """What a snapshot was taken of; None of one that a node made for itself."""
        return self._images.get(entry["uuid"])

    def recovered(self, node: Node) -> None:
        """The primary came back: a restore may have been durable before anybody was told."""
        state = node.store.state.get("restore")
        if state is not None:
            names = [node.volumes[int(index)].name for index in state["sources"]]
            self.restored(state["snapshot"], names, state["seq"])

    def writes(self, uuid: str, volumes: Sequence[int]) -> list[Write]:
        """A restore is asked for: to clients as if every cell were written at once."""
        content = self._world.content
        begun = []
        shown = self._shown(uuid)
        for volume in volumes:
            image, cell = shown[volume], content.cell
            for at in range(0, len(image), cell):
                value = int.from_bytes(image[at : at + ID_BYTES], "little")
                begun.append(content.begin(volume, at, cell, value))
        return begun

    def promise(self, uuid: str) -> None:
        """A person was told that the primary has it; another may have deleted it meanwhile."""
        if uuid not in self._released:
            self._promised[uuid] = None

    def release(self, uuid: str) -> None:
        """It is being deleted, or was given up and said so."""
        self._promised.pop(uuid, None)
        self._released[uuid] = None

    def died(self, host: Host) -> None:
        """What it was giving up it did not come to tell, in its start or stop either: it may be
        there, or not."""
        snapshots = getattr(host.node or host.coming, "snapshots", None)
        for entry in snapshots.entries if snapshots is not None else []:
            if entry.get("giving_up") or entry.get("lost"):
                self._promised.pop(entry["uuid"], None)

    def check_image(self, host: Host, node: Node) -> None:
        """X2: a secondary that is not consistent has an image of when it was, or says that it lost
        it."""
        state, fired = node.store.state, self._world.fired
        upstream = state["upstream"]
        if not upstream or upstream["consistent"] or upstream["since"] is None:
            return
        doubts = ("snapshot-failed", "log-damaged", "superblock-damaged")
        if (
            host.restored
            or host.name in self._imageless
            or any(fired[f"event {kind}"] for kind in doubts)
        ):
            return
        if not any(entry["kind"] == "resync" for entry in node.snapshots.entries):
            raise Violation(f"{host.name} is not consistent and has no image of before (X2)")
        fired["image kept in a resync"] += 1

    def check_released(self) -> None:
        """All is in sync: images of before go (their deletion may be under way)."""
        for host in self._world.remotes:
            node = host.node
            for entry in node.snapshots.usable() if node is not None else []:
                if entry["kind"] == "resync" and not entry.get("deleting"):
                    raise Violation(f"{host.name} is consistent and keeps an image of before (X2)")

    def lacks(self, host: Host, event: dict[str, Any]) -> None:
        """A node told that it has lost a snapshot, or lacks it: for a reason that there may be."""
        if "the file exists" in event["why"]:
            raise Violation(f"{host.name} lacks a snapshot for no reason: {event['why']} (V9)")
        self._lacked.setdefault((host.name, host.replaced), {})[event["uuid"]] = None
        if event["snapshot_kind"] == "resync":
            self._imageless[host.name] = None

    def consistent(self, host: Host) -> None:
        """A secondary is consistent: the next resync has an image of its own."""
        self._imageless.pop(host.name, None)

    def gone(self, uuid: str) -> None:
        """A person was told that it is deleted everywhere, or taken anew."""
        self._gone[uuid] = None

    def check_there(self, host: Host, node: Node, epoch: int, seq: int) -> None:
        """A consistent secondary that has followed up to record ``seq`` of an epoch has in its list
        what the primary took until then, if only as lacking."""
        if host.restored or self._world.fired["mark a log in memory is lost"]:
            return
        there = {entry["uuid"] for entry in node.snapshots.entries}
        told = self._lacked.get((host.name, host.replaced), {})
        for uuid in self._promised:
            since, at = self._places[uuid]
            if since <= epoch and at <= seq and uuid not in there and uuid not in told:
                raise Violation(f"a clone of {host.name} at {seq} lacks the snapshot of {at} (V9)")

    def check_followed(self) -> None:
        """All is in sync: each secondary has every snapshot that the primary has, or says that it
        lacks it, and none that was deleted everywhere."""
        primary = self._world.a.node
        assert primary is not None
        entries = primary.snapshots.entries
        wanted = [e for e in entries if primary.snapshots.shown(e) and e["kind"] != "resync"]
        for host in self._world.remotes:
            node = host.node
            if node is None:
                continue
            there = {entry["uuid"] for entry in node.snapshots.entries}
            for entry in wanted:
                known = there | self._pruned(host).keys() | self._released.keys()
                if entry["uuid"] not in known:
                    raise Violation(f"{host.name} does not say that it lacks {entry['number']}")
                self._world.fired["snapshot followed, or said to lack"] += 1
            for entry in node.snapshots.entries:
                if entry["uuid"] in self._gone and node.snapshots.shown(entry):
                    raise Violation(f"{host.name} has {entry['number']}, deleted everywhere")

    def check(
        self, host: Host, node: Node, found: Sequence[Found], what: str, since: int | None = None
    ) -> None:
        """Violation unless each is what it has to be, and what was promised is in the list, if
        only as lost. ``since``: what ``Inscribed.count`` was when they began to be read."""
        beside, inscribed = self._world.beside, self._world.inscribed
        since = inscribed.count if since is None else since
        if beside.pending and host.role == "primary":
            return
        for one in found:
            entry = one.entry
            if beside.hides(entry["seq"]):
                continue
            name = f"{what}: snapshot {entry['number']} ({entry['kind']}) at {entry['seq']}"
            if entry["uuid"] not in self._images:  # of this node's own
                group = self._world.history.image(entry["epoch"], entry["seq"])
                wanted = [bytes(group[index]) for index in entry["volumes"]]
            else:
                images = self._images[entry["uuid"]]
                wanted = inscribed.wanted(host, entry, images, one.images, since)
            compare(one.images, wanted, name)
            self._world.fired[f"snapshot checked on {host.role}"] += 1
        if host.role == "primary":
            there = {entry["uuid"] for entry in node.snapshots.entries}
            # What leaves a full list of lost ones does so before that is told.
            full = sum("lost" in entry for entry in node.snapshots.entries) >= LOST_MAX
            for uuid in self._promised:
                if uuid not in there and uuid not in self._pruned(host) and not full:
                    raise Violation(f"{what}: snapshot {uuid} is gone")

    def _pruned(self, host: Host) -> dict[str, None]:
        """What may have left its list of lost ones for others: that keeps so many, and each was
        told. How many there are now proves nothing: some may have been deleted since."""
        told = self._lacked.get((host.name, host.replaced), {})
        return told if len(told) > LOST_MAX else {}


class People:
    """Takes, refreshes and deletes snapshots while a run goes on."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(f"{world.seed}:people")
        world.on_moment.append(self._moment)

    def _moment(self, host: Host, kind: str) -> None:
        if kind == "synchronised" and self._random.random() < 0.3:
            self._world.spawn(self._once())

    async def run(self) -> None:
        """Until they rest."""
        gap = self._world.options.snapshot_gap
        while gap and not self._world.people_rest:
            await asyncio.sleep(gap * self._random.expovariate(1.0))
            await self._once()

    async def _once(self) -> None:
        world, rng = self._world, self._random
        if not world.options.snapshot_gap or world.people_rest:
            return
        if world.beside.pending:
            return
        draw = rng.random()
        if world.beside.rng.random() < world.options.beside:
            await world.beside.once()
            return
        host = world.a if draw < 0.75 else rng.choice(list(world.hosts.values()))
        node = host.node
        if node is None:
            return
        from tests.sim.world import Gone

        with contextlib.suppress(Gone, NbdmirrorError, OSError):
            if draw < 0.5:
                await self._create(host, node)
            else:
                shown = [e for e in node.snapshots.entries if node.snapshots.shown(e)]
                if not shown:
                    return
                entry = rng.choice(shown)
                if world.inscribed.rng.random() < world.options.inscribe:
                    images = world.album.images(entry)
                    if images is not None and entry["kind"] != "resync":
                        await world.inscribed.once(host, node, entry, images)
                    return
                if host is not world.a and rng.random() < world.options.restores_alone:
                    await self._restore_alone(host, node, entry)
                    return
                if host is world.a and rng.random() < world.options.restores:
                    await self._restore(host, node, entry)
                    return
                world.album.release(entry["uuid"])
                if draw < 0.6:
                    work = node.people.refresh(entry["uuid"])
                    world.album.promise((await world.in_life(host, work))["uuid"])
                    world.album.gone(entry["uuid"])
                else:
                    everywhere = host is world.a and draw < 0.65
                    await world.in_life(host, node.people.delete(entry["uuid"], everywhere))
                    if everywhere:
                        world.album.gone(entry["uuid"])

    async def _restore(self, host: Host, node: Node, entry: dict[str, Any]) -> None:
        world, rng = self._world, self._random
        index = rng.choice([None, *entry["volumes"]])
        volume = None if index is None else node.volumes[index].name
        places = entry["volumes"] if index is None else [index]
        keep, force = rng.random() < 0.7, rng.random() < 0.5
        inscribed, images = world.inscribed, world.album.images(entry)
        if inscribed.busy or images is None:
            return
        inscribed.busy = True  # nobody writes into it meanwhile
        try:
            await world.in_life(host, inscribed.take(host, node, entry, images))
            writes = world.album.writes(entry["uuid"], places)
            world.trace("people", f"restore {entry['number']} {places} {keep} {force}")
            acked = False
            try:
                work = node.people.restore(entry["uuid"], volume, True, keep, force)
                await world.in_life(host, work)
                acked = True
                inscribed.restored(host, entry, places)
            finally:
                for write in writes:
                    world.content.end(write, acked=acked, durable=True)
                world.trace("people", f"restored {acked}")
        finally:
            inscribed.busy = False
            inscribed.count += 1

    async def _restore_alone(self, host: Host, node: Node, entry: dict[str, Any]) -> None:
        """On a secondary, while the primary has paused it (V14)."""
        world, rng = self._world, self._random
        primary = world.a.node
        if primary is None or world.a.leaning:
            return  # it may be all that there is
        await world.in_life(world.a, primary.pause(host.name))
        try:
            await asyncio.sleep(0.2 * rng.random())
            if world.a.leaning:
                return
            world.trace("people", f"restore {entry['number']} on {host.name}")
            host.restored = True
            keep = rng.random() < 0.7
            # Forced: what a delay holds back there is applied first.
            await world.in_life(host, node.people.restore(entry["uuid"], None, True, keep, True))
            world.fired["restored on a secondary"] += 1
            await asyncio.sleep(0.2 * rng.random())
        finally:
            if world.a.node is primary:
                await world.in_life(world.a, primary.resume(host.name))

    async def _create(self, host: Host, node: Node) -> None:
        world, rng = self._world, self._random
        volume = None
        if rng.random() < 0.5:
            volume = rng.choice(node.volumes).name
        made = await world.in_life(host, node.people.create(volume, rng.random() < 0.2))
        world.album.promise(made["uuid"])


async def look(world: World) -> None:
    """Every snapshot of every node that runs."""
    from tests.sim.world import Gone

    for host in list(world.hosts.values()):
        node = host.node
        if node is None:
            continue
        if host.role == "secondary":
            world.album.check_image(host, node)
        with contextlib.suppress(Gone):
            since = world.inscribed.count
            found = await world.in_life(host, read_all(node))
            if host.node is node:
                world.album.check(host, node, found, host.name, since)
