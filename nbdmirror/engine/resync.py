"""A resync, as the primary runs it: what the remote's DCMs mark is copied to it (V6, X3).

It begins with passes over the map, while changes go on being marked: they need no log, and what is
rewritten often travels once a pass. When what is left, and what clients write meanwhile, fits the
log, it goes on *in order*: the log is kept for the remote from that moment, its records are
forwarded, and the rest of the map is copied between them. With the map empty and the stream past
that moment the remote is consistent. ``core.convergence`` decides when; a log that overflows
nevertheless sends the remote back to its map, and asks for more room the next time.

Where it is doubtful that regions differ, or where it was seen to save traffic, they are compared
before they are copied (``engine.copier``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nbdmirror.codec import repl
from nbdmirror.codec.fields import SEQ_MAX
from nbdmirror.codec.hashing import BLOCK
from nbdmirror.codec.record import MARK
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.config import ReplicationConfig
from nbdmirror.core import convergence
from nbdmirror.core.convergence import Pass
from nbdmirror.core.progress import Progress
from nbdmirror.core.remotestate import Stall
from nbdmirror.engine.copier import COMPARE_BYTES, COMPARE_SECONDS, COPY_BYTES, Copier
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.governor import Governor
from nbdmirror.engine.link import Link
from nbdmirror.engine.log import Cursor
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.sources import Sources
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import FormatError, PeerError

RETRY_SECONDS = 10.0
"""Regions that the facet could not give are tried again so often."""
PASS_SECONDS_MIN = 0.05
"""Passes over a few regions that are written all the time do not follow faster."""
HOLE_BYTES = 1 << 30
"""Holes are cleared in pieces of at most this."""
LOG_SHARE = 0.9
"""Of the log: what may be filled before a remote is forced out of it."""

COPIES_SECONDS = 5.0
"""The number of copies that a remote confirmed is saved so often: should the process die, an older
state of the remote is told by what was saved, and bits that were cleared since stay so."""
LARGER_LOG = 'a larger log, or on_full = "block" (clients wait then), or less to write'


@dataclass(frozen=True, slots=True)
class Terms:
    """What a resync shares with all of its node, and how this one is to end."""

    store: Store
    events: EventLog
    tuning: ReplicationConfig
    governor: Governor
    compress: bool
    waiting: bool
    """A full log holds up clients (``on_full = "block"``): then it cannot overflow."""
    order: Callable[[], Awaitable[None]] | None
    """Has the stream go on in order from now; ``None``: it does so from the beginning."""


class Resync:
    """Copies what the remote's DCMs mark, until they are empty and the remote consistent."""

    def __init__(self, remote: Remote, link: Link, terms: Terms) -> None:
        self.remote = remote
        self._link = link
        self._terms = terms
        self._order = terms.order
        self._compare = bool(remote.facts["compare"])
        self._end_seq: int | None = None
        self._sources = Sources(remote.group, remote.group.volumes)
        self._began_at = self._saved_at = asyncio.get_running_loop().time()
        kind = "full" if remote.facts["full"] else "dcm"
        phase = "ordered" if terms.order is None else "passes"
        self.progress = remote.progress = Progress(kind, remote.dirty_bytes, phase=phase)
        self.copier = Copier(
            remote,
            link,
            terms.tuning.window_bytes,
            terms.governor,
            terms.compress,
            self.progress,
        )
        self.copier.answers.stalled = self._stalled

    def _stalled(self, stall: Stall | None) -> None:
        self.remote.stall = stall
        if stall is not None:
            self._terms.events.emit("resync-stalled", remote=self.remote.name, why=stall.why)
        self.remote.notify()

    async def run(self) -> None:
        """Returns when the remote has confirmed, durably, that it is consistent."""
        remote, copier = self.remote, self.copier
        while True:
            seen = await self._pass()
            unread, copier.failed_reads = copier.failed_reads, None
            if self._order is None:
                if remote.dirty_regions == 0 and await self._is_proved():
                    break
            elif unread is None and self._may_order(seen):
                await self._order()
                self._order = None
            if unread is not None:
                self._stalled(Stall(unread, "see to the disks here: nbdmirror facet list"))
                await asyncio.sleep(RETRY_SECONDS)
            self.progress.next_pass("passes" if self._order else "ordered", remote.dirty_bytes)
        self._end_seq = remote.group.log.next_seq - 1
        self._link.send(Type.RESYNC_END, [repl.SEQ.pack(self._end_seq)])
        await copier.wait(lambda: self._end_seq is None)
        await self._finish()

    async def _is_proved(self) -> bool:
        """Whether the facets have on disk what was read from them; if not, what one of them may
        have lost is marked again, for another has it."""
        lost = await self._sources.lost()
        for volume, facet in lost:
            try:
                await self._mark_lost(volume, facet.lost_seq)
            except FormatError as error:
                self.remote.drop.set()  # before the log may be released that the session reads
                await self.remote.fill(f"{facet.path} failed while it was read, and {error}")
        return not lost

    async def _mark_lost(self, volume: Volume, seq: int) -> None:
        log = self.remote.group.log
        cursor, end = Cursor(seq + 1), log.next_seq
        while cursor.seq < end:
            if cursor.seq < log.ring.tail_seq:
                raise FormatError(f"the log begins at {log.ring.tail_seq}, not at {cursor.seq}")
            for record in (await log.read(cursor)).parsed():
                if record.kind != MARK and record.volume == volume.index:
                    self.remote.mark(record.volume, record.offset, record.length)

    async def _finish(self) -> None:
        remote = self.remote
        if remote.drop.is_set():  # in this very step: the map is in use again
            raise ConnectionResetError("the session was told to end")
        remote.facts.update(
            full=False, compare=False, consistent=True, holds=[], why=None, behind_ns=None
        )
        if remote.dirty_regions == 0:
            for dcm in remote.dcms:
                if dcm.map.default:
                    dcm.clear()
        # With the facts, whoever saves next: consistent, but all of its map marked, it would follow
        # no volume after a restart (M11).
        remote.save_defaults()
        await remote.sync_maps()
        await self._terms.store.save()
        remote.progress = remote.stall = None
        remote.order_failures = 0
        remote.notify()

    # -- walking -----------------------------------------------------------------------------

    async def _pass(self) -> Pass:
        """One walk over what is marked, to its end; returns what was seen of it."""
        loop, remote, group = asyncio.get_running_loop(), self.remote, self.remote.group
        began, marked = loop.time(), remote.dirty_bytes
        written, sent = group.bytes_written, self._link.bytes_sent
        waited = self.copier.waited_seconds
        for volume, dcm in zip(group.volumes, remote.dcms, strict=True):
            await self._walk(volume, dcm)
        await self.copier.drained()
        if self._order is not None and (rest := began + PASS_SECONDS_MIN - loop.time()) > 0:
            await asyncio.sleep(rest)
        return Pass(
            began_bytes=marked,
            left_bytes=remote.dirty_bytes,
            seconds=loop.time() - began,
            waited_seconds=self.copier.waited_seconds - waited,
            written_bytes=group.bytes_written - written,
            sent_bytes=self._link.bytes_sent - sent,
        )

    def _may_order(self, seen: Pass) -> bool:
        """Whether to go on in order; says why not, if passes alone do not lead there."""
        remote = self.remote
        ring = remote.group.log.ring
        room = int(remote.group.log.capacity * LOG_SHARE) - ring.used
        since = asyncio.get_running_loop().time() - max(self._began_at, remote.order_failed_at)
        if self._terms.waiting or convergence.may_order(seen, room, remote.order_failures, since):
            remote.stall = None
            return True
        why = convergence.stuck(seen, room)
        if why is not None and remote.stall is None:
            self._terms.events.emit("resync-converges-not", remote=remote.name, why=why)
        remote.stall = None if why is None else Stall(why, LARGER_LOG)
        return False

    async def _walk(self, volume: Volume, dcm: DcmFile) -> None:
        """Over a volume's marked regions, from its start to its end."""
        at = 0
        while True:
            run = next(dcm.map.runs(at), None)
            if run is None:
                return
            first, count = run
            at = first + await self._stretch(volume, first, count)
            await self._save_copies()
            if self._order is not None and not self.progress.done_bytes:
                # One window first, while nothing else is on the link: it tells what the link takes,
                # and whether comparing pays.
                await self.copier.drained()

    async def _save_copies(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._saved_at >= COPIES_SECONDS:
            self._saved_at = now
            await self._terms.store.save()

    async def _stretch(self, volume: Volume, first: int, count: int) -> int:
        """Handles the start of a marked stretch; returns how many regions that was."""
        copier = self.copier
        await copier.send_wanted()
        region = volume.region_size
        offset = first * region
        span = min(count * region, max(HOLE_BYTES, region), volume.size - offset)
        ((_, length, empty),) = volume.pieces(offset, span, 1)
        if empty:
            # Whole regions only: a region that is partly data is copied.
            hole = length // region if length < span else -(-span // region)
            if hole:
                await copier.hole(volume, first, hole)
                return hole
        if copier.compare_pays.worth():
            limit = COPY_BYTES if copier.compare_pays.doubtful else COMPARE_BYTES
            count = min(count, copier.size(region, limit, COMPARE_SECONDS))
            # What is known to differ needs no hashes of whole regions; blocks may be the same.
            ask = not self._compare and region > BLOCK
            await copier.compare(volume, first, count, ask=ask)
        else:
            count = min(count, copier.size(region))
            await copier.copy(volume, first, [None] * count)
        return count

    # -- answers -----------------------------------------------------------------------------

    def on_frame(self, frame: Frame) -> None:
        """WANT, COPIES, DONE and CONSISTENT from the remote; PeerError if they make no sense."""
        if frame.type is Type.WANT:
            self.copier.on_want(frame)
        elif frame.type is Type.DONE:
            for (token,) in repl.TOKEN.iter_unpack(frame.payload[: len(frame.payload) // 8 * 8]):
                self.copier.on_done(token)
        elif frame.type is Type.COPIES:
            (copies,) = frame.unpack(repl.COPIES)
            if copies > SEQ_MAX:
                raise PeerError(f"COPIES {copies}: no more than {SEQ_MAX} can be")
            facts = self.remote.facts
            facts["copies"] = max(facts.get("copies", 0), copies)
        else:
            (seq,) = frame.unpack(repl.SEQ)
            if seq != self._end_seq:
                raise PeerError(f"CONSISTENT at {seq}, asked was {self._end_seq}")
            self._end_seq = None
        self.copier.answers.came()
