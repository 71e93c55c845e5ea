"""How a node follows the markers of snapshots in its log: at redo, and as a secondary (O21, X2).

A secondary takes each snapshot at the point of the write order at which its primary took it, with
the same uuid; while it is being resynchronised it cannot, and says which it lacks. Before a resync
it keeps its last consistent image. The snapshots themselves are in ``engine.snapshots``.
"""

from __future__ import annotations

from collections.abc import Iterable

from nbdmirror.codec import mark as marks
from nbdmirror.codec import record as codec
from nbdmirror.codec.mark import Mark
from nbdmirror.codec.record import Record
from nbdmirror.engine.leftout import LeftOut
from nbdmirror.engine.snapshots import Entry, Snapshots, name_of


class Follower:
    """Does for the snapshots what records and markers ask for, in their order."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    async def redo(self, record: Record) -> None:
        """Before a record is carried into the facets again: what it needs of the snapshots.

        A marker finishes its plan. On a secondary the record may never have been applied: then the
        newest snapshot before it needs what it overwrites; what that one follows was applied, and
        kept, before it was taken."""
        if record.kind == codec.MARK:
            await self.marked(record)
            return
        chain = self._snapshots.chains[record.volume]
        if self._snapshots.store.state["role"] == "secondary" and chain.members:
            newest = self._snapshots.entry(chain.members[-1].uuid)
            if newest is not None and record.seq > newest["after"]:
                while chain.members and chain.holds(record.offset, record.length):
                    await chain.make_way([(record.offset, record.length)])

    async def marked(self, record: Record) -> None:
        """A marker has come up in the write order: does what it says on this node, before any
        later record is applied."""
        assert record.payload is not None
        mark = marks.decode(record.payload)
        assert mark.uuid is not None or mark.do == marks.CHANGED
        known = self._snapshots.entry(mark.uuid) if mark.uuid else None
        if mark.do == marks.DELETE:
            self._drop(mark.uuid)
        if mark.do != marks.SNAPSHOT:
            return
        if known is not None:
            if known["seq"] is None:
                known.update(seq=record.seq, after=record.seq, time_ns=record.time_ns)
            await self._snapshots.settle(known)
            self._drop(mark.replaces)
            return
        # Redo comes by markers again that were followed long ago.
        followed = self._snapshots.store.state.get("marked_seq", 0)
        if self._snapshots.store.state["role"] == "secondary" and record.seq > followed:
            await self._follow(mark, record)

    async def _follow(self, mark: Mark, record: Record) -> None:
        """Takes the snapshot that the primary took at this point, or says that it lacks it."""
        assert mark.uuid is not None
        upstream = self._snapshots.store.state["upstream"]
        why = None
        if not (upstream and upstream["consistent"]):
            why = "it was taken while this node was being resynchronised"
        else:
            why = self._snapshots.full([mark.replaces])
        entry = self._snapshots.new_entry(mark.volumes, "user", mark.number, mark.protected)
        entry.update(uuid=mark.uuid, epoch=record.epoch, time_ns=record.time_ns)
        entry.update(seq=record.seq, after=record.seq)
        if why is None:
            try:
                await self._snapshots.plan(entry, followed=True)
                self._snapshots.tell("snapshot", entry)
            except OSError as error:
                why = str(error)
        if why is not None:
            self._snapshots.store.state["marked_seq"] = record.seq
            self._lack(entry, why)
            await self._snapshots.store.save_twice()  # else redo might follow it, too late
        self._drop(mark.replaces)

    def _lack(self, entry: Entry, why: str) -> None:
        """This node does not have a snapshot of its primary's: its list says so."""
        entry["lost"] = why
        self._snapshots.entries.append(entry)
        self._snapshots.prune()
        self._snapshots.events.emit("snapshot-lacking", **name_of(entry), why=why)

    def _drop(self, uuid: str | None) -> None:
        known = self._snapshots.entry(uuid) if uuid else None
        if known is not None:
            self._snapshots.give_back(known)

    def left_out(self, told: Iterable[LeftOut], epoch: int) -> None:
        """A new stream leaves out these marks: what they say of snapshots is followed as far as it
        can be. ``epoch`` is that of the stream before: a mark of a later one is new, whatever its
        seq, for the history may have lost what was followed here. The caller saves."""
        followed = self._snapshots.store.state.get("marked_seq", 0)
        for one in told:
            mark, new = one.mark, one.epoch > epoch or one.seq > followed
            if mark.do == marks.DELETE:
                self._drop(mark.uuid)
            elif new and mark.uuid and self._snapshots.entry(mark.uuid) is None:
                entry = self._snapshots.new_entry(mark.volumes, "user", mark.number, mark.protected)
                entry.update(uuid=mark.uuid, epoch=one.epoch, time_ns=one.time_ns)
                entry.update(seq=one.seq, after=one.seq)
                self._lack(entry, "it was taken while this node got no records")

    async def make_way(self, records: Iterable[Record]) -> None:
        """Before these records are applied, one after the other up to the next marker: what the
        snapshots need of what they overwrite, with one sync for each volume."""
        ranges: dict[int, list[tuple[int, int]]] = {}
        for record in records:
            if record.kind == codec.MARK:
                break
            ranges.setdefault(record.volume, []).append((record.offset, record.length))
        for index, wanted in ranges.items():
            chain = self._snapshots.chains[index]
            while chain.members and any(chain.holds(*one) for one in wanted):
                await chain.make_way(wanted)

    def restarted(self, seq: int, told: Iterable[LeftOut]) -> None:
        """A secondary's log was emptied, to go on with ``seq``; the caller saves. Snapshots of
        records that the primary lost go, but for those that it has nevertheless, as ``told``."""
        kept = [one.mark.uuid for one in told]
        for entry in self._snapshots.usable():
            lost = entry["after"] is not None and entry["after"] >= seq
            if entry["kind"] == "user" and lost and entry["uuid"] not in kept:
                self._snapshots.give_back(entry)
            entry["after"] = seq - 1
        self._snapshots.store.state["marked_seq"] = seq - 1

    async def delay_ends(self, seq: int, now: int, delay: float) -> None:
        """What a delay holds back at ``seq`` is about to be applied, for a resync (V8). The point
        is kept until a person deletes it, or another one is and it is older than the delay."""
        snapshots = self._snapshots
        old = [
            entry
            for entry in snapshots.usable()
            if entry["kind"] == "delayed" and now - entry["time_ns"] > delay * 1e9
        ]
        try:
            if (why := snapshots.full([entry["uuid"] for entry in old])) is not None:
                raise OSError(why)
            volumes = range(len(snapshots.volumes))
            await snapshots.take_here("delayed", volumes, seq, now, protected=False)
        except OSError as error:
            snapshots.events.emit("snapshot-failed", why=f"the point of a delay: {error}")
            return
        self.release(old)

    async def before_resync(self, seq: int, now: int) -> None:
        """A secondary is consistent, at ``seq``, and is about to be resynchronised."""
        if not self._snapshots.config.before_resync:
            return
        former = self.images()
        volumes = range(len(self._snapshots.volumes))
        try:
            await self._snapshots.take_here("resync", volumes, seq, now, protected=True)
        except OSError as error:
            self._snapshots.events.emit(
                "snapshot-failed", why=f"the last consistent image: {error}"
            )
            return
        self.release(former)

    def images(self) -> list[Entry]:
        """Those from before resyncs."""
        usable = self._snapshots.usable()
        return [e for e in usable if e["kind"] == "resync" and not e.get("deleting")]

    def release(self, images: Iterable[Entry]) -> None:
        """Something later than these images is consistent, durably."""
        for entry in images:
            self._snapshots.give_back(entry)
