"""What the nodes of a run do, held against the oracle: each event, each start, each record.

The world boots and ends nodes; here is what is concluded from what they then say and hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbdmirror.codec import mark as marks
from nbdmirror.codec.mark import Mark
from nbdmirror.engine.batch import Batch, Records
from nbdmirror.engine.group import Group
from nbdmirror.engine.node import Node
from nbdmirror.engine.volume import Volume
from tests.sim.clone import Image, records, recover_alone
from tests.sim.holders import Held, held
from tests.sim.host import Host
from tests.sim.oracle import Defect, Entry, Violation, compare
from tests.sim.snapshots import NOTHING

if TYPE_CHECKING:
    from tests.sim.world import World


DAMAGE = ("log-damaged", "superblock-damaged", "active-map-damaged", "failed")
"""What a node says of files of its own that do not hold what it wrote to them; a secondary that has
to apply such a record ends."""


class Witness:
    """Follows the nodes of one run."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._unsettled: dict[int, tuple[str, int]] = {}
        """By volume: which remote will say what a crash has left of it, when it meets the primary;
        and the line of history that begins there."""

    # -- events ----------------------------------------------------------------------------------

    def on_event(self, host: Host, event: dict[str, Any]) -> None:
        """A node tells something."""
        world = self._world
        fields = {k: v for k, v in event.items() if k not in ("cursor", "time", "kind")}
        world.fired[f"event {event['kind']}"] += 1
        if event["kind"] == "defect":
            world.fail(Defect(f"a defect on {host.name}: {event['why']}"))
        if event["kind"] in ("snapshot-lost", "snapshot-lacking"):
            self._judge(lambda: world.album.lacks(host, event))
        if event["kind"] in ("snapshot-lost", "snapshot-deleted") and host.role == "primary":
            world.album.release(event["uuid"])
        if event["kind"] == "consistent":
            world.album.consistent(host)
        if event["kind"] == "restored" and host.role == "primary":
            world.album.restored(event["uuid"], event["volumes"], event["seq"])
        if event["kind"] == "log-damaged" and "remote" in event:
            self._judge(lambda: self._on_damage(host, event))
        if event["kind"] == "superblock-damaged":
            self._judge(lambda: self._on_superblock(host, event))
        if host is world.astray_on and event["kind"] in DAMAGE:
            world.noticed[event["kind"]] = None
            host.forked = host.forked or ("remote" not in event and event["kind"] != "failed")
        if event["kind"] == "facet-failed" and host.node is not None:
            failed = next(v for v in host.node.volumes if v.name == event["volume"])
            host.unsynced_lost = host.unsynced_lost or not failed.in_service()
        if event["kind"] == "started":
            self._on_started(host, event)
        if event["kind"] == "verify-differs" and not world.beside.pending:
            self._judge(lambda: world.rot.told(host, event))
        if event["kind"] == "handshake":
            world.fired[f"rule {event['rule']}"] += 1
            self._judge(lambda: self._on_handshake(host, event))
        world.trace(host.name, f"{event['kind']} {json.dumps(fields, sort_keys=True)}")
        for listener in world.on_moment:
            listener(host, event["kind"])

    @staticmethod
    def _on_damage(host: Host, event: dict[str, Any]) -> None:
        """What a remote is to get can be read back from the log, if its disk has done no harm: else
        everything is compared for nothing (I4)."""
        harm = (
            "read error",
            "read flip",
            "pread error",
            "pread flip",
            "sync lose",
            "sync lie",
            "rot",
            "pwritev drop",
            "pwritev stray",
            "pwrite drop",
            "pwrite stray",
        )
        if not any(kind.startswith(harm) for kind in host.disk.fired):
            raise Violation(f"{host.name} cannot read its log, whose disk is sound: {event['why']}")

    def _on_superblock(self, host: Host, event: dict[str, Any]) -> None:
        """A torn save is none, so this takes a disk that does harm: else everything is compared for
        nothing (I4)."""
        if host is not self._world.astray_on:
            raise Violation(f"{host.name} distrusts its superblock, which is sound: {event['why']}")

    def _judge(self, told: Callable[[], None]) -> None:
        try:
            told()
        except Violation as error:
            self._world.fail(error)

    def _on_started(self, host: Host, event: dict[str, Any]) -> None:
        host.forked = event["power_loss"] or event["memory_lost"] or host.memory_gone
        host.memory_gone = False
        node = host.coming
        if node is not None and node.primary is not None:
            host.end_seq, host.early = node.log.next_seq - 1, []
            _keep_early(node.primary.group, host.early)
        lost, host.unsynced_lost = host.unsynced_lost, False
        if event["memory_lost"]:
            self._world.fired["mark a log in memory is lost"] += 1
        if host.forked and (event["facets_healed"] or lost):
            self._world.content.forget_volatile()  # a log in memory is gone: as after a power loss

    def _on_handshake(self, host: Host, event: dict[str, Any]) -> None:
        """What was decided is what a remote has, durably: here a volume that it holds is settled.
        And rules that mean that something was lost, in a world where nothing is (T6, I4)."""
        name = event["remote"]
        remote = self._world.hosts[name]
        for volume, (leader, line) in list(self._unsettled.items()):
            if leader == name:
                self._settle(volume, self._clones()[name], line)
        if event["rule"] == "T5" and (self._world.astray_on is not None or remote.lost_unnoted):
            return
        if remote.restored and "was restored on" in event["why"]:
            return
        if remote.swapped and "a facet is new" in event["why"]:
            return
        if event["rule"] in ("T5", "T6", "T9", "T12"):
            raise Violation(f"{host.name} met {name}: {event['rule']} {event['why']}")

    def _settle(self, volume: int, found: Image, number: int) -> None:
        history = self._world.history
        line = history.lines[number]
        image = found.images()[volume]
        if found.seq <= line.base_seq:  # it has lost what it was ahead, and gets the rest
            image = bytes(history.lines[number - 1].image(line.base_seq)[volume])
        self._world.content.settle(volume, image)
        history.settle(volume, image, number)
        self._world.fired["a remote said what a crash had left"] += 1
        del self._unsettled[volume]

    # -- a start of the primary ------------------------------------------------------------------

    def recovered(self, host: Host, node: Node, restored: dict[int, bytes], *, power: bool) -> None:
        """The primary is about to serve: what it holds must be what it promised, and is what the
        future starts from. ``restored``: what clients read of volumes whose restore is not copied
        yet; ``power``: it had lost its power."""
        world = self._world
        head, end = world.history.head, host.end_seq
        if world.beside.pending:
            world.history.back_to(end)
        world.history.found(end)
        world.album.recovered(node)
        if node.store.state.get("log_volatile"):
            world.history.back_to(end)  # what was restored stays so; its mark was in memory
        holders = self._held(host, node)
        images = [restored.get(index, image) for index, image in enumerate(holders.volumes)]
        forked = power or host.forked
        # A remote may have more than was recovered, or get it, still under way from before; and
        # may lose it again, until the two have met.
        unknown = [*self._unsettled, *(holders.leaders if forked else ())]
        world.content.recovered(
            [None if index in unknown else image for index, image in enumerate(images)],
            power=power,
        )
        if forked:
            assert node.primary is not None
            if world.astray_on is host:  # what was recovered once may be damaged since
                world.history.back_to(end)
            world.history.fork(node.primary.group.epoch, end, images)
            for volume, leader in holders.leaders.items():
                self._unsettled.setdefault(volume, (leader, len(world.history.lines) - 1))
        elif end != world.history.head:
            raise Violation(
                f"a killed primary came back with {end} of {world.history.head} records"
            )
        elif not world.beside.pending:
            wanted = world.history.lines[-1].image(end)
            for index in (i for i in range(len(images)) if i not in unknown):
                compare(
                    images[index : index + 1], wanted[index : index + 1], "the primary after redo"
                )
        world.beside.died(head, end)
        self.check_facets(host, node)
        self._marked_early(host, node)
        self.observe(node)

    def _marked_early(self, host: Host, node: Node) -> None:
        assert node.primary is not None
        group, world = node.primary.group, self._world
        del group.__dict__["mark"]
        for seq, mark in enumerate(host.early, host.end_seq + 1):
            world.album.marked(group.epoch, world.history.head, mark)
            world.history.append(seq, [NOTHING])

    def _held(self, host: Host, node: Node) -> Held:
        local = host.local()
        if all(image is not None for image in local):
            return held(node, local, [], {})
        self._world.fired["a start without a facet"] += 1
        disk = host.disk.clone(f"{self._world.seed}:log")
        return held(node, local, records(disk, node), self._clones())

    def _clones(self) -> dict[str, Image]:
        """What each remote would come back with, if its process died now."""
        seed = f"{self._world.seed}:held:{self._world.loop.now_ns}"
        return {
            host.name: recover_alone(host.disk.clone(seed), host.config, seed)
            for host in self._world.remotes
            if host.created
        }

    def check_facets(self, host: Host, node: Node) -> None:
        """Every facet in service holds the same."""
        for volume in node.volumes:
            if volume.overlay is not None or self._world.beside.pending:
                continue  # a restore is being copied, or one facet was changed by itself
            facets = [host.disk.content(f.path)[: volume.size] for f in volume.in_service()]
            for other in facets[1:]:
                compare([other], facets[:1], f"facets of {volume.name} on {host.name}")

    # -- records ---------------------------------------------------------------------------------

    def observe(self, node: Node) -> None:
        """Every record that the primary logs goes into the history too."""
        assert node.primary is not None
        group, history = node.primary.group, self._world.history
        append = group._append

        def observed(volume: Volume, batch: Batch) -> Records:
            seq = group.log.next_seq
            history.attempted = entries = [
                Entry(
                    volume.index,
                    change.offset,
                    change.length,
                    None if change.payload is None else bytes(change.payload),
                )
                for change in batch.changes()
            ]
            records = append(volume, batch)
            try:
                history.append(seq, entries)
            except Violation as error:
                self._world.fail(error)
            return records

        setattr(group, "_append", observed)  # noqa: B010 (mypy forbids the plain assignment)
        self._observe_marks(group)

    def _observe_marks(self, group: Group) -> None:
        log_mark = group.mark
        world = self._world

        def observed(mark: Mark) -> int:
            world.history.attempted = [NOTHING]
            # An append that fails may have brought it into the log nevertheless.
            world.album.marked(group.epoch, world.history.head, mark)
            seq = log_mark(mark)
            try:
                world.history.append(seq, [NOTHING])
                if mark.do == marks.CHANGED:
                    world.beside.logged(seq)
            except Violation as error:
                world.fail(error)
            return seq

        setattr(group, "mark", observed)  # noqa: B010


def _keep_early(group: Group, early: list[Mark]) -> None:
    """Marks are noted until the history goes on."""
    log_mark = group.mark

    def noted(mark: Mark) -> int:
        early.append(mark)
        return log_mark(mark)

    group.__dict__["mark"] = noted
