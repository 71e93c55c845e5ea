"""The snapshots of a node: which there are, taking and dropping them, what goes when space ends.

They are part of the superblock, oldest first::

    uuid        32 hex digits, the same on every node that has it
    number      what people call it; 0: made by the node itself
    kind        "user", "resync" (the last consistent image, kept while one runs, X2), "restore"
                (the state before a restore), "delayed" (where a secondary was when a resync ended
                its delay, V8)
    seq, epoch  the record that it follows, and whose history that is; seq null: planned
    after       the record of the log as it is here after which it begins: redo needs it
    time_ns     when
    volumes     indices
    protected   not given up for space while there is another
    writable    whether it is exported so (V9)
    pending     its marker is logged, but may not be durable, nor what it follows in the facets
    provisional the state before a restore that has not begun, durably: unless it does, the snapshot
                is deleted, on secondaries too, at the latest after the next start
    deleting    what older ones need of it is on its way to them; it is not shown as usable
    giving_up   ... because of this: it will be lost, not deleted
    lost        why it is gone, if it is: kept until a person has seen it

Policy (the issue's): when the disk of the layers, or ``space_max``, is full, the oldest unprotected
snapshot goes, then the oldest; the volume always goes on. What goes is told as an event and stays
in the list as lost. An error of that disk costs the snapshots of the volume, never the volume.

A snapshot is planned durably before its marker is logged, and is empty then; so no write ever waits
for it to be taken (O21), and a crash in between leaves either a marker that finishes it or a plan
that is dropped. Where the layers are: ``engine.layerfiles``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import Any

from nbdmirror.codec import mark as marks
from nbdmirror.codec.mark import Mark
from nbdmirror.config import SnapshotConfig
from nbdmirror.engine.chain import Chain, Member
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.facet import to_the_end
from nbdmirror.engine.group import Group
from nbdmirror.engine.layer import FULL, LayerFile
from nbdmirror.engine.layerfiles import LayerFiles
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import (
    DiskFailed,
    FormatError,
    NbdmirrorError,
    Refused,
    StateError,
    refuse_shortage,
)
from nbdmirror.ports import Disk

Entry = dict[str, Any]

STOP_SECONDS = 10.0
LOST_MAX = 32
"""Snapshots that are gone are kept in the list up to so many."""


class Snapshots:
    """The registry; ``chains`` has one chain for each volume."""

    def __init__(
        self,
        disk: Disk,
        directory: str,
        volumes: Sequence[Volume],
        store: Store,
        events: EventLog,
        random: Random,
        config: SnapshotConfig,
    ) -> None:
        self.config = config
        self.volumes = volumes
        self.entries: list[Entry] = store.state.setdefault("snapshots", [])
        self.chains = [Chain(v, self._give_up, self._may_keep) for v in volumes]
        self.busy: str | None = None
        """Why snapshots cannot be taken or deleted now: a restore is being copied."""
        self.kept_for_restore: tuple[str, ...] = ()
        """Files of these stay, lost or deleted: a restore of the first of them reads them."""
        self.files = LayerFiles(disk, directory, volumes)
        self.store = store
        self.events = events
        self._random = random
        self.shortage: Callable[[int], str | None] = lambda files: None
        """Why there are no descriptors for so many files more; see ``admission.Room``."""
        self.lock = asyncio.Lock()
        """One taking or deleting at a time."""
        self._giving = asyncio.Lock()
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._planned: dict[str, None] = {}
        """In the list, and not durable yet: nobody reads or deletes them."""
        self._started = False

    # -- start and end -----------------------------------------------------------------------

    async def open(self) -> None:
        """Opens the layers, and proves what a crash left in doubt, before redo or a write.
        StateError if there are too few descriptors."""
        known = {entry["uuid"] for entry in self.usable()} | {*self.kept_for_restore}
        self.files.tidy(known)
        for index, chain in enumerate(self.chains):
            for entry in [e for e in self.usable() if index in e["volumes"]]:
                try:
                    chain.push(await self.open_member(entry["uuid"], index))
                except (StateError, FormatError, OSError) as error:
                    refuse_shortage(error)
                    self._damaged(entry, str(error))

    async def open_member(self, uuid: str, volume: int) -> Member:
        """Opens and proves a snapshot's layers of a volume. StateError, FormatError or OSError."""
        member = Member(uuid, await self.files.open(uuid, volume))
        try:
            await member.layer.prove()
            if self.files.there(uuid, volume, own=True):
                member.own = await self.files.open(uuid, volume, own=True)
        except BaseException:
            member.close()
            raise
        return member

    def _damaged(self, entry: Entry, why: str) -> None:
        """It is lost, and so is every older one that may need a layer of it, of any volume."""
        lost = [entry]
        for older in reversed(self.entries[: self.entries.index(entry)]):
            needed = any({*older["volumes"]} & {*one["volumes"]} for one in lost)
            if needed and older.get("lost") is None:
                lost.append(older)
        for one in reversed(lost):
            one["lost"] = why
            for chain in self.chains:
                member = chain.drop(one["uuid"])
                if member is not None:
                    member.close()
            self.events.emit("snapshot-lost", **name_of(one), why=why)

    def recovered(self, end_seq: int, *, redone: bool) -> None:
        """After redo: plans without a marker, and snapshots of records that were lost, go. What was
        not ``redone``, or logged in memory, is no more than what the facets have. The caller
        saves."""
        # A log in memory ends wherever it was last released; what it held is in the facets (M13).
        volatile = bool(self.store.state.get("log_volatile"))
        for entry in self.entries:
            if volatile and entry["after"] is not None:
                entry["after"] = min(entry["after"], end_seq)
            beyond = (entry["after"] or 0) > end_seq
            beyond = beyond or (entry.pop("pending", False) and (volatile or not redone))
            if entry.get("lost") is None and (entry["seq"] is None or beyond):
                entry["deleting"] = True

    def start(self) -> None:
        """Goes on with deletions that a restart has cut, and those that redo came by; with those of
        provisional ones whoever took them does."""
        self._started = True
        for entry in list(self.entries):
            if entry.get("deleting") and not entry.get("provisional"):
                self.spawn(self.finish_delete, entry)

    def spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Runs something beside; an error of a disk that matters reaches the store's owner."""
        task = asyncio.ensure_future(self._guard(work, *args))
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def _guard(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        try:
            await work(*args)
        except (NbdmirrorError, OSError) as error:
            self.events.emit("snapshot-failed", why=str(error))

    async def stop(self) -> None:
        """Ends what runs beside; the layers need no proof at the next start. What a person began
        is finished; nothing is begun any more."""
        self.busy = "the node stops"
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):  # it may wait for room in the log
            async with asyncio.timeout(STOP_SECONDS):
                await self.lock.acquire()  # for good
        for chain in self.chains:
            try:
                await chain.stop(self.sync_own)
            except (OSError, DiskFailed) as error:
                self.events.emit("snapshot-failed", why=str(error))

    def close(self) -> None:
        """Closes the layers."""
        for chain in self.chains:
            chain.close()

    # -- looking -----------------------------------------------------------------------------

    def usable(self) -> list[Entry]:
        """Those that have layers, oldest first."""
        return [entry for entry in self.entries if entry.get("lost") is None]

    def entry(self, uuid: str) -> Entry | None:
        """The entry of that uuid."""
        return next((entry for entry in self.entries if entry["uuid"] == uuid), None)

    def shown(self, entry: Entry) -> bool:
        """Whether it can be read."""
        if entry.get("lost") or entry.get("deleting") or entry["seq"] is None:
            return False
        if entry["uuid"] in self._planned:
            return False
        return all(self.chains[index].has(entry["uuid"]) for index in entry["volumes"])

    # -- taking ------------------------------------------------------------------------------

    def new_entry(self, volumes: Sequence[int], kind: str, number: int, protected: bool) -> Entry:
        """A plan; nothing is done yet."""
        return {
            "uuid": f"{self._random.getrandbits(128):032x}",
            "number": number,
            "kind": kind,
            "seq": None,
            "epoch": self.store.state["epoch"],
            "after": None,
            "time_ns": 0,
            "volumes": list(volumes),
            "protected": protected,
            "writable": False,
        }

    def full(self, but: Sequence[str | None] = ()) -> str | None:
        """Why there cannot be another one, in the place of those ``but`` for which it comes."""
        if sum(entry["uuid"] not in but for entry in self.usable()) >= self.config.count_max:
            return f"there are {self.config.count_max} snapshots already"
        return self.store.full()

    def check_room(self) -> None:
        """Refused if there is no room for another one."""
        why = self.full()
        if why is not None:
            raise Refused(why, hint="delete one, or raise count_max in [snapshots]")

    async def plan(self, entry: Entry, *, followed: bool = False) -> list[tuple[Chain, Member]]:
        """Makes the empty layers and the entry, durably. OSError or DiskFailed.

        An entry that has its seq holds the volumes from the step on in which it is in the list:
        who is cancelled before it is durable leaves no snapshot there that keeps nothing. With
        ``followed`` that is the step in which its marker counts as followed."""
        made: list[tuple[Chain, Member]] = []
        if (why := self.shortage(len(entry["volumes"]))) is not None:
            raise OSError(errno.EMFILE, why)
        try:
            for index in entry["volumes"]:
                self.files.remove(entry["uuid"], index)  # of who was cancelled before
                layer = await self.files.create(entry["uuid"], index)
                made.append((self.chains[index], Member(entry["uuid"], layer)))
            await self.files.sync_names()
        except BaseException:
            for _, member in made:
                member.close()
            raise
        self.entries.append(entry)
        if entry["seq"] is not None:
            self._push(made)
        if followed:
            self.store.state["marked_seq"] = entry["seq"]
        self._planned[entry["uuid"]] = None
        await self.settle(entry)
        return made

    async def settle(self, entry: Entry) -> None:
        """Returns when an entry is durable: whoever was saving it may have been cancelled. Before
        anything is kept in its layer alone, which a start that does not know it would remove."""
        if entry["uuid"] in self._planned:
            await self.store.save_twice()
            self._planned.pop(entry["uuid"], None)

    @staticmethod
    def _push(made: list[tuple[Chain, Member]]) -> None:
        for chain, member in made:
            chain.push(member)

    def begin(self, entry: Entry, made: list[tuple[Chain, Member]], seq: int, now: int) -> None:
        """From this step on it holds the volumes as they are; they are after record ``seq``."""
        entry.update(seq=seq, after=seq, time_ns=now, epoch=self.store.state["epoch"])
        self._push(made)

    async def take(self, group: Group, entry: Entry, replaces: str | None, now: int) -> None:
        """Takes a snapshot on a primary: returns when it will survive anything (O21)."""
        entry["pending"] = True
        made = await self.plan(entry)
        mark = Mark(
            marks.SNAPSHOT,
            entry["uuid"],
            tuple(entry["volumes"]),
            entry["number"],
            entry["protected"],
            replaces,
        )
        await group.put_mark(mark, lambda seq: self.begin(entry, made, seq, now))
        del entry["pending"]
        replaced = self.entry(replaces) if replaces else None
        if replaced is not None:
            replaced["deleting"] = True  # with the same save: there is one of a number
        await self.store.save()
        self.tell("snapshot", entry)

    async def take_here(
        self,
        kind: str,
        volumes: Sequence[int],
        seq: int,
        now: int,
        *,
        protected: bool,
        provisional: bool = False,
    ) -> Entry:
        """Takes one that only this node has, after record ``seq``: nothing may change the volumes
        meanwhile. OSError or DiskFailed."""
        entry = self.new_entry(volumes, kind, 0, protected)
        entry.update(seq=seq, after=seq, time_ns=now)
        if provisional:
            entry["provisional"] = True
        await self.plan(entry)
        self.tell("snapshot", entry)
        return entry

    def tell(self, kind: str, entry: Entry) -> None:
        """Emits an event about a snapshot."""
        names = [self.volumes[index].name for index in entry["volumes"]]
        seq, epoch = entry["seq"], entry["epoch"]
        self.events.emit(kind, **name_of(entry), seq=seq, epoch=epoch, volumes=names)

    # -- dropping ----------------------------------------------------------------------------

    def give_back(self, entry: Entry) -> None:
        """Deletes a snapshot beside what is done now; after ``start`` only: what saves the
        superblock in the middle of a recovery saves what that has changed too soon."""
        if not entry.get("deleting"):
            entry["deleting"] = True
            if self._started:
                self.spawn(self.delete, entry)

    async def delete(self, entry: Entry) -> None:
        """Deletes a snapshot; what the one before needs of it moves there first."""
        entry["deleting"] = True
        await self.store.save()
        await self.finish_delete(entry)

    async def finish_delete(self, entry: Entry) -> None:
        async with self.lock:
            if entry not in self.entries:
                return
            why = entry.get("giving_up")
            if entry.get("lost") is None:
                for index in entry["volumes"]:
                    await self._merge(self.chains[index], entry["uuid"])
                if why is not None and entry.get("lost"):
                    return  # another, given up for it, took it along, and told
            if why is not None:  # a restart had cut it
                _now_lost(entry, why)
            elif entry in self.entries:
                self.entries.remove(entry)
            await self.store.save()
            await self._unlink(entry)
            if why is None:
                self.tell("snapshot-deleted", entry)
            else:
                self.events.emit("snapshot-lost", **name_of(entry), why=why)

    async def _merge(self, chain: Chain, uuid: str) -> None:
        while True:
            try:
                self._discard(await self._left(chain, uuid))
                return
            except OSError as error:
                await self._give_up(chain, error)

    async def _left(self, chain: Chain, uuid: str) -> Member | None:
        return await chain.leave(uuid, free=uuid not in self.kept_for_restore)

    def _discard(self, member: Member | None) -> None:
        if member is None or member.uuid in self.kept_for_restore:
            return  # the restore closes it
        self.spawn(member.layer.discard)
        if member.own is not None:
            self.spawn(member.own.discard)

    async def _unlink(self, entry: Entry) -> None:
        if entry["uuid"] in self.kept_for_restore:
            return  # stays until the restore is through; the next start removes it
        for index in entry["volumes"]:
            await self.files.discard(entry["uuid"], index)

    def release_restore(self) -> None:
        """A restore is through: what only it needed goes."""
        kept, self.kept_for_restore, self.busy = self.kept_for_restore, (), None
        there = {entry["uuid"] for entry in self.usable()}
        for uuid in kept:
            for index in range(len(self.volumes)):
                if uuid not in there:
                    self.files.remove(uuid, index)

    # -- when space ends ---------------------------------------------------------------------

    @property
    def bytes_kept(self) -> int:
        """About what all layers take."""
        return sum(member.bytes_kept for chain in self.chains for member in chain.members)

    def _may_keep(self, size: int) -> bool:
        limit = self.config.space_max
        return limit is None or self.bytes_kept + size <= limit

    async def _give_up(self, chain: Chain, error: OSError | None) -> None:
        """Regions could not be kept (``error``, or the limit): makes room by the policy."""
        async with self._giving:
            uuids = [member.uuid for member in chain.members]
            if not uuids:
                return
            if error is not None and error.errno not in FULL:
                await self.lose(uuids, f"an error of the disk: {error}")
                return
            why = "the space for snapshots is used up" + (f": {error}" if error else "")
            # One disk and one limit are for the layers of all volumes.
            taking = {m.uuid for one in self.chains for m in one.members if m.bytes_kept}
            among = [e for e in self.usable() if e["uuid"] in taking or e["uuid"] in uuids]
            oldest = next((entry for entry in among if not entry["protected"]), among[0])
            await self.lose([oldest["uuid"]], why)

    async def lose(self, uuids: list[str], why: str) -> None:
        """Ends snapshots, durably, before the write that costs them goes on. What older ones need
        of them moves there, or, where it cannot, those end too. To the end, though the write's
        client is gone: nobody would take up what was begun."""
        await to_the_end(asyncio.ensure_future(self._lose(uuids, why)))

    async def _lose(self, uuids: list[str], why: str) -> None:
        entries = [entry for uuid in uuids if (entry := self.entry(uuid)) is not None]
        for entry in entries:
            entry.update(deleting=True, giving_up=why)
        await self.store.save()
        for entry in entries:
            for index in entry["volumes"]:
                chain, uuid = self.chains[index], entry["uuid"]
                try:
                    member = await self._left(chain, uuid)
                except OSError:
                    await self._lose([m.uuid for m in chain.members[: chain.index(uuid)]], why)
                    member = await self._left(chain, uuid)
                self._discard(member)
            _now_lost(entry, why)
        self.prune()
        await self.store.save()
        for entry in entries:
            await self._unlink(entry)
            self.events.emit("snapshot-lost", **name_of(entry), why=why)

    async def sync_own(self, uuid: str, own: LayerFile) -> None:
        """Makes durable what was written into a snapshot. OSError if that failed: then it is lost,
        because a later start could not tell what of it is on the disk (O16)."""
        try:
            await own.sync()
        except OSError as error:
            await self.lose([uuid], f"an error of the disk: {error}")
            raise

    def prune(self) -> None:
        for entry in [e for e in self.entries if e.get("lost")][:-LOST_MAX]:
            self.entries.remove(entry)


def _now_lost(entry: Entry, why: str) -> None:
    """Nothing is left of it but its place in the list, which whoever deletes it takes away."""
    entry["lost"] = why
    for key in ("deleting", "giving_up"):
        entry.pop(key, None)


def name_of(entry: Entry) -> dict[str, Any]:
    """What an event says of which snapshot it is about."""
    return {"uuid": entry["uuid"], "number": entry["number"], "snapshot_kind": entry["kind"]}
