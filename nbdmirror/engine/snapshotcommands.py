"""What people ask of snapshots: create, list, diff, delete, refresh, export. Called by the control
socket's methods; the work is that of ``engine.snapshots``."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from nbdmirror.codec import mark as marks
from nbdmirror.codec.mark import Mark
from nbdmirror.config import uris
from nbdmirror.core.dcm import Dcm
from nbdmirror.engine.group import Group
from nbdmirror.engine.restorer import Restorer
from nbdmirror.engine.snapshotexport import SnapshotExports, SnapshotVolume, label, pick
from nbdmirror.engine.snapshots import Entry, Snapshots
from nbdmirror.engine.volume import Volume, closed
from nbdmirror.errors import (
    MORE_DESCRIPTORS,
    NbdmirrorError,
    Refused,
    UsageError,
    lacks_descriptors,
)

if TYPE_CHECKING:
    from nbdmirror.engine.node import Node

RANGES_MAX = 10_000
"""Ranges that one ``diff`` lists; ``more`` says that there are others."""


class SnapshotCommands:
    """The commands of one node."""

    def __init__(self, node: Node, exports: SnapshotExports) -> None:
        self._node = node
        self._snapshots: Snapshots = node.snapshots
        self._exports = exports

    # -- taking and dropping -----------------------------------------------------------------

    async def create(self, volume: str | None, protected: bool) -> dict[str, Any]:
        """Takes a snapshot of a volume, or of all at one seq; on the primary."""
        places = [self.volume(volume)] if volume else self._snapshots.volumes
        entry = await self.take([place.index for place in places], "user", protected=protected)
        return self._describe(entry)

    async def take(
        self,
        volumes: builtins.list[int],
        kind: str,
        *,
        protected: bool,
        provisional: bool = False,
        replaced: Entry | None = None,
    ) -> Entry:
        """Takes one, with the next number or that of the one that it replaces."""
        snapshots, group = self._snapshots, self._group()
        async with snapshots.lock:
            self._check_idle()
            if replaced is None:
                snapshots.check_room()
            elif not snapshots.shown(replaced):  # somebody else was quicker
                raise Refused(
                    f"snapshot {label(replaced)} is gone, or there is another with its number",
                    hint="look for it with nbdmirror snapshot list",
                )
            state = self._node.store.state
            number = state.get("snapshot_number", 0) + 1
            if replaced is not None and replaced["number"]:
                number = replaced["number"]
            else:
                state["snapshot_number"] = number
            entry = snapshots.new_entry(volumes, kind, number, protected)
            if provisional:
                entry["provisional"] = True
            replaces = None if replaced is None else replaced["uuid"]
            try:
                await snapshots.take(group, entry, replaces, self._node.env.clock.time_ns())
            except OSError as error:
                room = f"free space in {snapshots.files.directory}"
                raise NbdmirrorError(
                    f"the snapshot could not be taken: {error.strerror or error}",
                    hint=MORE_DESCRIPTORS if lacks_descriptors(error) else room,
                ) from error
        return entry

    async def delete(self, spec: str, everywhere: bool) -> dict[str, Any]:
        """Deletes a snapshot here; ``everywhere``: on the secondaries too, at one point of the
        write order."""
        entry = self._find(spec, lost=True)
        self._check_needless(entry)
        self._check_idle()
        with self._unused(entry, "deleted"):
            if everywhere:
                mark = Mark(marks.DELETE, entry["uuid"], tuple(entry["volumes"]))
                await self._group().put_mark(mark)
            await self._snapshots.delete(entry)
        self._exports.forget(entry)
        return {"uuid": entry["uuid"], "number": entry["number"]}

    async def refresh(self, spec: str) -> dict[str, Any]:
        """The snapshot becomes one of the volumes as they are now, with its number and a uuid of
        its own; what was written into it is dropped. Nothing is copied (V10)."""
        entry = self._find(spec)
        with self._unused(entry, "taken anew"):
            fresh = await self.take(
                entry["volumes"], entry["kind"], protected=entry["protected"], replaced=entry
            )
            await self._snapshots.delete(entry)
        self._exports.forget(entry)
        return self._describe(fresh)

    async def export(self, spec: str, writable: bool) -> dict[str, Any]:
        """How a snapshot is attached; ``writable`` holds for clients that attach from now on."""
        entry = self._find(spec)
        found = [u for v in self._served(entry) for u in uris(self._node.config, v.name)]
        if writable and not entry["writable"]:
            if entry["kind"] == "resync":
                raise Refused("the last consistent image is not to be changed")
            if not found:
                raise NbdmirrorError(
                    "the daemon has no address at which clients attach",
                    hint="name one in [nbd] listen, and restart the daemon",
                )
            entry["writable"] = True
            await self._node.store.save()
        return {"writable": entry["writable"], "uris": found}

    async def restore(
        self, spec: str, volume: str | None, while_attached: bool, keep: bool, force: bool
    ) -> dict[str, Any]:
        """Restores the volumes of a snapshot, or one of them; complete on return (V12)."""
        return await self._restorer().restore(
            self._find(spec),
            self.volume(volume) if volume else None,
            while_attached=while_attached,
            keep=keep,
            force=force,
        )

    async def changed(
        self,
        volume: str,
        ranges: builtins.list[tuple[int, int]],
        facet: str | None,
        force: bool,
    ) -> dict[str, Any]:
        """A facet of the volume was changed in these ranges beside the log (V13)."""
        return await self._restorer().changed(self.volume(volume), ranges, facet, force=force)

    def _restorer(self) -> Restorer:
        assert self._node.restorer is not None  # made before anybody can ask
        return self._node.restorer

    # -- looking -----------------------------------------------------------------------------

    def list(self) -> builtins.list[dict[str, Any]]:
        """Every snapshot, oldest first, with both maps' counts. Costs the maps, not the volumes."""
        return [self._describe(entry) for entry in self._taken()]

    def brief(self) -> builtins.list[dict[str, Any]]:
        """As in the status: without the counts that take a look at the maps (I7)."""
        return [self._facts(entry) for entry in self._taken()]

    def _taken(self) -> builtins.list[Entry]:
        """Not those that are planned: they hold nothing yet."""
        return [entry for entry in self._snapshots.entries if entry["seq"] is not None]

    def _facts(self, entry: Entry) -> dict[str, Any]:
        volumes = self._snapshots.volumes
        state = "lost" if entry.get("lost") else "deleting" if entry.get("deleting") else "ok"
        return {
            "number": entry["number"],
            "uuid": entry["uuid"],
            "kind": entry["kind"],
            "state": state,
            "why": entry.get("lost"),
            "seq": entry["seq"],
            "time_ns": entry["time_ns"],
            "volumes": [volumes[index].name for index in entry["volumes"]],
            "size": sum(volumes[index].size for index in entry["volumes"]),
            "protected": entry["protected"],
            "writable": entry["writable"],
        }

    def _describe(self, entry: Entry) -> dict[str, Any]:
        facts = self._facts(entry)
        changed, own, kept = _Count(), _Count(), _Count()
        if facts["state"] == "ok":
            for volume in self._served(entry):
                chain = self._snapshots.chains[volume.index]
                member = chain.members[chain.index(entry["uuid"])]
                size = volume.region_size
                changed.add(chain.changed(entry["uuid"]).count, size)
                kept.add(member.layer.map.kept.count, size)
                if member.own is not None:
                    own.add(member.own.map.kept.count, size)
        return {
            **facts,
            "changed": changed.status(),
            "own": own.status(),
            "kept": kept.status(),
            "clients": self._exports.clients(entry),
        }

    def diff(self, spec: str, until: str | None, volume: str | None) -> dict[str, Any]:
        """The ranges that volumes changed from a snapshot on, until a later one or now; ranges
        written into the snapshots themselves are among them."""
        first = self._find(spec)
        last = self._find(until) if until else None
        for entry in (first, last) if volume is not None and last else (first,):
            if volume is not None and self.volume(volume).index not in entry["volumes"]:
                raise UsageError(f"volume {volume} is not in snapshot {label(entry)}")
        result: dict[str, Any] = {"region_sizes": {}, "ranges": [], "bytes": 0, "more": False}
        for place in self._served(first):
            base = self._snapshots.volumes[place.index]
            if volume is not None and base.name != volume:
                continue
            if last is not None and base.index not in last["volumes"]:
                continue
            result["region_sizes"][base.name] = base.region_size
            regions = self.difference(base.index, first, last)
            result["bytes"] += _bytes_of(base, regions)
            for offset, length in self._ranges(base, regions):
                if len(result["ranges"]) >= RANGES_MAX:  # there may be millions, and clients wait
                    result["more"] = True
                    break
                result["ranges"].append({"volume": base.name, "offset": offset, "length": length})
        return result

    def difference(self, index: int, first: Entry, last: Entry | None) -> Dcm:
        """The regions of a volume that may differ between two snapshots, or one and now: the OR
        of both maps of each (V9, V10)."""
        chain = self._snapshots.chains[index]
        ends = [entry for entry in (first, last) if entry is not None]
        at = [chain.index(entry["uuid"]) for entry in ends]
        if at != sorted(at):
            ends.reverse()
        found = chain.changed(ends[0]["uuid"], None if last is None else ends[1]["uuid"])
        for entry in ends:
            own = chain.members[chain.index(entry["uuid"])].own
            if own is not None:
                found.merge(own.map.kept)
        return found

    @staticmethod
    def _ranges(volume: Volume, regions: Dcm) -> Iterator[tuple[int, int]]:
        size = volume.region_size
        for first, count in regions.runs():
            yield first * size, min(count * size, volume.size - first * size)

    # -- finding -----------------------------------------------------------------------------

    def _find(self, spec: str, *, lost: bool = False) -> Entry:
        """The snapshot of a number, a uuid's first digits, or VOLUME@either."""
        spec = spec.rpartition("@")[2]
        entry = pick(self._snapshots, spec)
        if entry is None and lost:
            gone = [e for e in self._snapshots.entries if e.get("lost")]
            match = [e for e in gone if spec in (str(e["number"]), e["uuid"])]
            match = match or [e for e in gone if len(spec) > 5 and e["uuid"].startswith(spec)]
            entry = match[0] if match else None
        if entry is None:
            shown = [label(e) for e in self._snapshots.entries if self._snapshots.shown(e)]
            raise UsageError(
                f"there is no snapshot {spec!r} (snapshots: {', '.join(shown) or 'none'})"
            )
        return entry

    def volume(self, name: str) -> Volume:
        """The volume of that name; UsageError lists them."""
        for volume in self._snapshots.volumes:
            if volume.name == name:
                return volume
        names = ", ".join(volume.name for volume in self._snapshots.volumes)
        raise UsageError(f"there is no volume {name!r} (volumes: {names})")

    def _served(self, entry: Entry) -> builtins.list[SnapshotVolume]:
        return [self._exports.serve(entry, index) for index in entry["volumes"]]

    def _group(self) -> Group:
        if self._node.primary is None:
            raise Refused(
                f"{self._node.config.node} is a secondary: it takes the snapshots of its primary",
                hint="run this on the primary",
            )
        return self._node.primary.group

    def clients(self, entry: Entry) -> int:
        """How many have a snapshot attached."""
        return self._exports.clients(entry)

    def _unused(self, entry: Entry, what: str) -> AbstractContextManager[None]:
        """Refused while clients have it attached, or another command is at it; none attaches it
        within."""
        clients = self._exports.clients(entry)
        if clients:
            raise Refused(
                f"snapshot {label(entry)} has {clients} clients attached",
                hint="detach them first",
            )
        return closed(self._served(entry), f"snapshot {label(entry)} is about to be {what}")

    def _check_needless(self, entry: Entry) -> None:
        """X2: the last consistent image stays while nothing else is promotable."""
        upstream = self._node.store.state["upstream"]
        waits = self._node.secondary is not None and upstream and not upstream["consistent"]
        if waits and entry["kind"] == "resync" and not entry.get("lost"):
            raise Refused(
                f"snapshot {label(entry)} is the last consistent image of this node",
                hint="it goes by itself when the resync is through",
            )

    def _check_idle(self) -> None:
        if self._snapshots.busy is not None:
            raise Refused(self._snapshots.busy, hint="see its progress in status")


class _Count:
    """Regions and their size."""

    def __init__(self) -> None:
        self._regions = 0
        self._bytes = 0

    def add(self, regions: int, size: int) -> None:
        """So many regions more, of that size."""
        self._regions += regions
        self._bytes += regions * size

    def status(self) -> dict[str, int]:
        """As JSON."""
        return {"regions": self._regions, "bytes": self._bytes}


def _bytes_of(volume: Volume, regions: Dcm) -> int:
    """The size of the marked regions of a volume, of which the last may be shorter."""
    beyond = volume.regions * volume.region_size - volume.size
    return regions.count * volume.region_size - beyond * regions.is_marked(volume.regions - 1)
