"""A remote as the primary knows it: its facts, its DCMs, its place in the log (V2, V6).

Decides nothing about the wire (``engine.session``) and nothing about when space is needed
(``engine.housekeeper``); it is what both act upon. The facts are part of the superblock:

    address, mode, compression, on_link_loss, added, max_rate, verify_interval, verify_rate,
    verify_repair what the configuration, or ``remote add``, says
    node          what the node there calls itself: see ``engine.acquaintance``
    initialised   a stream was agreed upon once
    tracking      in DCM logging: the log keeps nothing for it
    base_seq      the DCM and the log together hold every change after this seq
    full          a full comparison is due or not finished
    compare       the marked regions are doubtful: compared by hash before they are sent
    consistent    the remote confirmed that it is consistent, and nothing has happened since
    holds         volumes (names) without a local facet: it is all that they have, and it goes on
                  following them although it is not consistent, because others are compared
    met_epoch     the epoch in which it last agreed to a stream
    paused        by a person
    why           the cause of the last resync or refusal, for people
    behind_ns     wall clock: since when the remote lacks something that the log does not hold
    verify        a verify that is wanted or runs: see ``engine.verify.request``; null if none
    verified      what the last one found: {finished_ns, differing, ...}; null if there was none
    away          its link was lost, and it has not come back
    copies        number that the remote saved before the last region copy that it acknowledged; it
                  only grows, and a remote that says less was set back (see ``core.identity``)
    missed        [uuid, seq] of deletions of snapshots that it may not have durably, and that a new
                  stream would leave out (see ``engine.leftout``)
    defaults      {volume name: default bit of its DCM}
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbdmirror.codec import mark as marks
from nbdmirror.codec import record as codec
from nbdmirror.codec.mark import Mark
from nbdmirror.codec.record import Record
from nbdmirror.core.bucket import Bucket
from nbdmirror.core.dcm import Dcm
from nbdmirror.core.progress import Progress
from nbdmirror.core.remotestate import Stall
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.gate import SyncGate
from nbdmirror.engine.group import Group
from nbdmirror.engine.leftout import DELETIONS_MAX, deletion
from nbdmirror.engine.log import Cursor
from nbdmirror.engine.maps import DcmFile, dirty_runs, map_name
from nbdmirror.engine.remotestatus import remote_state, remote_status
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed, FormatError
from nbdmirror.ports import Disk

if TYPE_CHECKING:
    from nbdmirror.engine.remoteread import RemoteReads

PENDING_SCAN_MAX = 64 << 20
"""Pending log bytes up to which a block status looks at each entry."""

NEW_FACTS: dict[str, Any] = {
    "initialised": False,
    "tracking": True,
    "base_seq": 0,
    "full": True,
    "compare": True,
    "consistent": False,
    "holds": [],
    "met_epoch": 0,
    "copies": 0,
    "paused": False,
    "why": None,
    "behind_ns": None,
    "verify": None,
    "verified": None,
    "defaults": {},
}


class Remote:
    """One remote of the group, while this node is primary."""

    def __init__(
        self,
        name: str,
        facts: dict[str, Any],
        group: Group,
        store: Store,
        events: EventLog,
        disk: Disk,
        directory: str,
    ) -> None:
        self.name = name
        self.facts = facts
        self.group = group
        self._store = store
        self._events = events
        self.dcms: list[DcmFile] = [
            DcmFile(disk, f"{directory}/dcm/{map_name(name, v.name)}", v.regions, v.region_size)
            for v in group.volumes
        ]
        log = group.log
        self.received_seq = self.durable_seq = self.applied_seq = log.ring.tail_seq - 1
        self.marked_seq: int | None = None
        """While pending entries are being marked: they are in the DCM up to here."""
        self._mark_end = 0
        self._told_seq = log.next_seq - 1
        """In DCM logging: of snapshots taken past this record the remote has never heard."""
        self._marking = asyncio.Lock()
        self.gone = False
        """Removed by a person."""
        self.put_off = False
        """A comparison is due: see ``core.identity``."""
        self.starting = False
        """A stream is being agreed upon: the log is kept for it already."""
        self.held = False
        self.engaged = False
        """A session agrees upon a stream, or runs one."""
        self.link = "disconnected"
        self.reads: RemoteReads | None = None
        """Reads through it, while there is a stream."""
        self.gate: SyncGate | None = None
        """What replies wait for, if it is a synchronous remote."""
        self.refused: str | None = None
        self.failed: str | None = None
        self.unheard: str | None = None
        """Somebody is there, and the last attempt ended before a word that we understand."""
        self.stall: Stall | None = None
        self.progress: Progress | None = None
        self.bytes_sent = 0
        self.bucket = Bucket(facts.get("max_rate"))
        self.order_failures = 0
        """How often the log overflowed since the remote was last consistent, and when last."""
        self.order_failed_at = float("-inf")
        self.on_moved: Callable[[], None] = lambda: None
        """Called when the remote acknowledged more; housekeeping sets it."""
        self.changed = asyncio.Event()
        """Set with every acknowledgement and change of state; waiters clear it."""
        self.kick = asyncio.Event()
        """Ends the pause before the next attempt to connect."""
        self.verify_wanted = asyncio.Event()
        """Set when a verify was asked for."""
        self.drop: asyncio.Event = asyncio.Event()
        """Ends the session that runs now; the next handshake decides anew."""

    # -- while a change goes by the log (``engine.bypass``) ------------------------------------

    def hold(self) -> None:
        """Ends the session; none is agreed upon until ``go_on``."""
        self.held = True
        self.cancel_start()

    async def released(self) -> None:
        """Returns when no session reads the log any more."""
        while self.engaged:
            await self.changed.wait()

    def go_on(self) -> None:
        """Sessions may be agreed upon again."""
        self.held = False
        self.kick.set()

    # -- opening -----------------------------------------------------------------------------

    def open(self) -> None:
        """Opens the DCMs; a damaged one is filled and said so (X1)."""
        for volume, dcm in zip(self.group.volumes, self.dcms, strict=True):
            dcm.open(bool(self.facts["defaults"].get(volume.name, True)))
            if not self.facts["initialised"]:
                dcm.fill()  # a file of that name may be left from a former remote
            if dcm.damage is not None:
                why = f"the map could not be read ({dcm.damage})"
                self.facts.update(full=True, compare=True, why=why)
        self.save_defaults()
        if self.facts["tracking"]:
            self.group.trackers.append(self)

    def save_defaults(self) -> None:
        """Puts the maps' default bits into the facts; the caller saves the superblock."""
        self.facts["defaults"] = {
            volume.name: dcm.map.default
            for volume, dcm in zip(self.group.volumes, self.dcms, strict=True)
        }

    def close(self, *, unlink: bool = False) -> None:
        """Closes the DCMs."""
        for dcm in self.dcms:
            dcm.close(unlink=unlink)

    # -- the log and the DCM -----------------------------------------------------------------

    @property
    def tracking(self) -> bool:
        """Whether the remote is in DCM logging."""
        return bool(self.facts["tracking"])

    def follows(self, volume: Volume) -> bool:
        """Whether it has, or gets from the log in order, all that was ever written to it (M11)."""
        return may_follow(self.facts, volume.name) and not self.dcms[volume.index].map.count

    def doubt(self, why: str) -> None:
        """What is marked is to be compared, and the remote is not consistent until that is done.
        What it alone has stays what it is. The caller marks, and saves."""
        held = [v.name for v in self.group.volumes if not v.in_service() and self.follows(v)]
        self.facts.update(compare=True, consistent=False, holds=held, why=why)

    @property
    def behind_ns(self) -> int | None:
        """Wall clock: when the oldest record was taken that it does not have on disk; ``None`` if
        it has all. To be put into the facts before its place in the log is given up."""
        known: int | None = self.facts.get("behind_ns")
        if known is None and self.durable_seq < self.group.log.next_seq - 1:
            known = self.group.timeline.time_of(self.durable_seq + 1)
        return known

    @property
    def dirty_regions(self) -> int:
        """Regions that are marked, over all volumes."""
        return sum(dcm.map.count for dcm in self.dcms)

    @property
    def dirty_bytes(self) -> int:
        """Their size."""
        return sum(dcm.map.count * dcm.region_size for dcm in self.dcms)

    def floor(self, head_seq: int) -> int:
        """The log up to here is not needed for this remote."""
        if self.starting or not self.tracking:
            return self.durable_seq
        return head_seq if self.marked_seq is None else self.marked_seq

    def note(self, record: Record) -> None:
        """A record of the log is not forwarded to this remote: what it says is kept for it."""
        if record.kind != codec.MARK:
            self.mark(record.volume, record.offset, record.length)
        else:
            assert record.payload is not None
            self.miss(record.seq, marks.decode(record.payload))

    def mark(self, volume: int, offset: int, length: int) -> None:
        """Marks a change in the DCM (see ``group.Tracker``)."""
        self.dcms[volume].mark(offset, length)

    @contextmanager
    def _writing_maps(self) -> Iterator[None]:
        """A map that cannot be written is the failure of the whole node (O16), whoever needed it:
        what it was to hold is known to nothing else."""
        try:
            yield
        except DiskFailed as error:
            self.group.fail(error)
            raise

    def miss(self, seq: int, mark: Mark, taken: int = 0) -> None:
        """A mark was logged that the stream to this remote may come to leave out; the caller saves
        the facts. ``taken``: the record of the snapshot that is gone by it. One that came and went
        while the remote was away is nothing to it, however many those are."""
        gone = deletion(mark)
        if gone is None or (self.tracking and taken > self._told_seq):
            return
        missed = self.facts.get("missed", [])
        if not self.tracking:  # in order: what it has durably it has followed
            missed = [one for one in missed if one[1] > self.durable_seq]
        if all(uuid != gone for uuid, _ in missed):
            missed.append([gone, seq])
        self.facts["missed"] = missed[-DELETIONS_MAX:]

    async def sync_maps(self) -> None:
        """Makes every mark so far durable; DiskFailed if it cannot, for the whole node."""
        with self._writing_maps():
            # Together, for their directory is synced once for all who ask at the same time.
            syncs = (dcm.sync() for dcm in self.dcms)
            for result in await asyncio.gather(*syncs, return_exceptions=True):
                if result is not None:
                    raise result

    async def merge(self, maps: Mapping[int, Dcm]) -> None:
        """Marks the regions of {volume index: map}, durably; DiskFailed as ``sync_maps``."""
        with self._writing_maps():
            for index, regions in maps.items():
                self.dcms[index].merge(regions)
        await self.sync_maps()

    async def fill(self, why: str, *, save: bool = True) -> None:
        """Marks everything, to be compared, durably: the maps first, because what the superblock
        says of them must never be less than what they hold (O12). The log is not needed then, and
        is not read for this remote any more: it may be what is damaged. Until the maps are durable
        it is: whoever asked may be cancelled, or the process die. The caller has to ``save``, or
        this does."""
        with self._writing_maps():
            for dcm in self.dcms:
                dcm.fill()
        await self.sync_maps()
        if not self.tracking:
            # In one step, and not sooner: a full map misses nothing, and another who fills it at
            # the same time may be cancelled.
            self.facts.update(tracking=True, base_seq=0)
            self._track()
        self.facts["behind_ns"] = self.behind_ns
        self.facts.update(full=True, compare=True, consistent=False, holds=[], why=why)
        self.save_defaults()
        if save:
            await self._store.save()

    def _track(self) -> None:
        """From this step on its changes are marked."""
        if self not in self.group.trackers:
            self.group.trackers.append(self)
            self.snapshots_told()

    async def overflow(self, why: str) -> None:
        """Forces this remote out of the log (M7, O12): from this step on its changes are marked;
        what is pending is marked piece by piece, and its space released as that is durable. Returns
        when all is marked, whoever began: one who asks meanwhile goes on where that one ended."""
        if not self.tracking and not self.gone:
            pending = self.group.log.next_seq - 1 - self.durable_seq
            self.marked_seq, self._mark_end = self.durable_seq, self.group.log.next_seq
            self._leave(why)
            self.cancel_start()
            self._events.emit("overflow", remote=self.name, why=why, pending_records=pending)
        async with self._marking:
            if self.marked_seq is not None:
                await self._store.save()
                try:
                    await self._mark_pending(Cursor(self.marked_seq + 1))
                except FormatError as error:
                    # What cannot be read back cannot be marked: then everything is.
                    self._events.emit("log-damaged", remote=self.name, why=error.message)
                    await self.fill(error.message)
                self.marked_seq = None
                self.notify()

    async def _mark_pending(self, cursor: Cursor) -> None:
        while cursor.seq < self._mark_end:
            chunk = await self.group.log.read(cursor)
            with self._writing_maps():
                for record in chunk.parsed():
                    self.note(record)
            self.marked_seq = chunk.last_seq
            await asyncio.sleep(0)

    def snapshots_told(self) -> None:
        """From this step on the remote may know of every snapshot so far."""
        self._told_seq = self.group.log.next_seq - 1

    def leave_log(self) -> None:
        """At start: the caller marks what is pending, and saves."""
        if self.facts["initialised"] and not self.tracking:
            self._leave(self.facts["why"])

    def _leave(self, why: str | None) -> None:
        self.facts.update(behind_ns=self.behind_ns, base_seq=self.durable_seq, why=why)
        self.facts.update(tracking=True, consistent=False, holds=[])
        self._track()

    def resume_log(self) -> None:
        """The remote reads the log again, from where a handshake said. The facts are saved by
        the caller before anything is cleared from the DCM (O12)."""
        if self.tracking:
            self.facts["tracking"] = False
            self.group.trackers.remove(self)

    def acknowledge(self, received: int, durable: int, applied: int) -> None:
        """The remote's three positions, from its ACK; they only grow."""
        self.received_seq = max(self.received_seq, received)
        self.durable_seq = max(self.durable_seq, durable)
        self.applied_seq = max(self.applied_seq, applied)
        if self.gate is not None:
            self.gate.moved(self.received_seq, self.durable_seq)
        self.on_moved()
        self.notify()

    def _order_failed(self) -> None:
        if self.progress is not None and self.progress.kind != "verify":
            self.order_failures += 1
            self.order_failed_at = asyncio.get_running_loop().time()

    def cancel_start(self) -> None:
        """The log is full while a stream is being agreed upon: it is not kept for that."""
        self._order_failed()
        self.starting = False
        self.drop.set()

    def notify(self) -> None:
        """Wakes whoever waits for a change of this remote."""
        self.changed.set()
        self.changed.clear()

    async def lacking(self, volume: int, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """(offset, length, lacking) pieces that cover the range: what the remote does not have
        on disk, by its DCM and by the entries still pending in the log (all, if those are many).
        """
        log, dcm = self.group.log, self.dcms[volume]
        pieces = dcm.dirty_runs(offset, length)
        if self.tracking or self.durable_seq >= log.next_seq - 1:
            return pieces
        if log.bytes_between(self.durable_seq + 1) > PENDING_SCAN_MAX:
            return [(offset, length, True)]
        marked = Dcm(dcm.map.regions)
        region = dcm.region_size
        for first, size, dirty in pieces:
            if dirty:
                marked.mark(first // region, (first + size - 1) // region)
        cursor = Cursor(self.durable_seq + 1)
        while cursor.seq < log.next_seq:
            if cursor.seq < log.ring.tail_seq:  # acknowledged, or overflowed, meanwhile
                cursor = Cursor(log.ring.tail_seq)
                continue
            for record in (await log.read(cursor)).parsed():
                if record.volume == volume and record.kind != codec.MARK:
                    last = record.offset + record.length - 1
                    marked.mark(record.offset // region, last // region)
        return dirty_runs(marked, region, offset, length)

    # -- status ------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """The state in one word."""
        return remote_state(self)

    def status(self, now: float, wall_ns: int) -> dict[str, Any]:
        """The remote's object in the status (``engine.remotestatus``)."""
        return remote_status(self, now, wall_ns)


def may_follow(facts: Mapping[str, Any], volume: str) -> bool:
    """Whether a remote follows the volume of that name, unless its map says otherwise."""
    known = facts["consistent"] or volume in facts.get("holds", ())
    return bool(facts["initialised"] and known and not facts["tracking"])


def volume_map(volumes: Sequence[Volume]) -> list[dict[str, Any]]:
    """The volumes as a handshake names them."""
    return [
        {"name": v.name, "uuid": v.uuid, "size": v.size, "region_size": v.region_size}
        for v in volumes
    ]
