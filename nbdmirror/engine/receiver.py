"""The secondary's end of a replication connection.

Records go to the secondary's own log first, become durable there by group commit, and only then
reach the facets (O2, O9): a power cut anywhere leaves an exact prefix (V7). What is acknowledged
as durable was durable (O4). Region copies of a resync go to the facets directly, and are
acknowledged when those are synced (O7); the node says durably that it is inconsistent before the
first one lands, and consistent again when the stream has passed the end of the resync.

Frames are handled in their order by one task; what may wait there holds back the peer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, takewhile
from typing import Any, NamedTuple

from nbdmirror.codec import batch, fields, repl
from nbdmirror.codec import record as codec
from nbdmirror.codec.record import Record
from nbdmirror.codec.regions import Region, parse_hashes, parse_region
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.config import Limits
from nbdmirror.engine import leftout
from nbdmirror.engine.comparer import Comparer
from nbdmirror.engine.link import Link
from nbdmirror.engine.readserver import ReadServer
from nbdmirror.engine.secondary import Secondary
from nbdmirror.errors import DiskFailed, NbdmirrorError, PeerError

QUEUE_BYTES_MAX = 8 << 20
"""Frames that wait to be handled; beyond it the connection is not read."""
AHEAD_BYTES = 4 << 20
"""Copies that wait in the queue: what they overwrite is kept for snapshots with the same sync."""
FULL_LOOK_SECONDS = 1.0
ACK_PAUSE_SECONDS = 0.01
"""A primary where nobody waits for this remote hears of its progress no more often than this."""


class Portion(NamedTuple):
    """Verified records that go into the log together; one of the last two says what they are."""

    part: memoryview
    number: int
    largest: int
    epoch: int
    """Of the last of them."""
    records: list[Record] | None
    places: bytes | None


class Receiver:
    """One connection from a primary, from HELLO to its end."""

    def __init__(self, secondary: Secondary, limits: Limits, proved: str | None = None) -> None:
        """``proved``: the name that the peer has proved to have, None where nothing proves one."""
        self.secondary = secondary
        self.proved = proved
        self.on_started: Callable[[], None] = lambda: None
        """Called once: the handshake has ended well."""
        self.link = Link(self._on_frame, limits)
        self.link.begin(started=False)
        self._frames: deque[Frame] = deque()
        self._queued = 0
        self._arrived = asyncio.Event()
        self._streaming = False
        self._started = False
        self.agreed = False
        """The primary knows this node for the one that it means: START came."""
        self._sizes = b"".join(v.size.to_bytes(8, "little") for v in secondary.volumes)
        self.peer = "?"
        self.hello: dict[str, Any] = {}
        """What the primary said of itself, once it is let in."""
        self._acked = (-1, -1, -1)
        self._acked_at = 0.0
        self._ack_due: asyncio.TimerHandle | None = None
        self._eager = False
        self._copies: int | None = None
        """As the primary knows them by now; ``None``: it does not ask."""
        self._synced_tokens: list[int] = []
        self._sync_task: asyncio.Task[None] | None = None
        self._end_seq: int | None = None
        self._reads = ReadServer(secondary, self.link)
        self._comparer = Comparer(secondary, self.link)

    async def run(self) -> None:
        """Handles frames until the link is gone; returns its cause."""
        tasks = [
            asyncio.ensure_future(self._pump()),
            asyncio.ensure_future(self._comparer.run(self._sync_soon)),
            asyncio.ensure_future(self.link.closed.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (NbdmirrorError, ConnectionError, TimeoutError) as error:
            self.link.close(error)
            if isinstance(error, DiskFailed):
                self.secondary.fail(error)
        except Exception as error:
            # A defect costs the primary its session; it is told.
            self.link.close(error)
            self.secondary.events.emit("defect", peer=self.peer, why=repr(error))
            raise
        finally:
            if self._sync_task is not None:
                tasks.append(self._sync_task)
            tasks += self._reads.tasks
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._ack_due is not None:
                self._ack_due.cancel()
            self.secondary.leave(self)
            self.link.close()

    # -- frames in order ---------------------------------------------------------------------

    def _on_frame(self, frame: Frame) -> None:
        if frame.type is Type.PING:
            return
        if not self._started and self._frames:
            raise PeerError("more than one frame at a time during the handshake")
        self._frames.append(frame)
        self._queued += frame.size
        if self._queued > QUEUE_BYTES_MAX:
            self.link.set_reading(False)
        self._arrived.set()

    async def _pump(self) -> None:
        tuning = self.secondary.tuning
        async with asyncio.timeout(tuning.timeout_seconds):
            await self._handshake(await self._next())
            await self._start(await self._next())
        watch = asyncio.ensure_future(
            self.link.watch(tuning.heartbeat_seconds, tuning.timeout_seconds)
        )
        try:
            while True:
                await self._handle(await self._next())
        finally:
            watch.cancel()

    async def _handle(self, frame: Frame) -> None:
        if frame.type is Type.RECORDS:
            await self._on_records(frame)
        elif frame.type is Type.REGION:
            await self._on_region(frame)
        elif frame.type in (Type.HASHES, Type.VERIFY):
            self._comparer.put(parse_hashes(frame))
        elif frame.type is Type.READ:
            await self._reads.on_frame(frame)
        elif frame.type is Type.START:
            await self._start(frame)
        elif frame.type is Type.RESYNC_END:
            (self._end_seq,) = frame.unpack(repl.SEQ)
            await self._check_end()
        else:
            raise PeerError(f"unexpected {frame.type.name}")

    async def _next(self) -> Frame:
        while not self._frames:
            self._arrived.clear()
            await self._arrived.wait()
        if self.link.cause is not None:  # closed: a stale session never writes after a new one
            raise ConnectionResetError(str(self.link.cause))
        frame = self._frames.popleft()
        self._queued -= frame.size
        if self._queued <= QUEUE_BYTES_MAX // 2:
            self.link.set_reading(True)
        return frame

    # -- handshake ---------------------------------------------------------------------------

    async def _handshake(self, frame: Frame) -> None:
        if frame.type is not Type.HELLO:
            raise PeerError(f"{frame.type.name} came instead of HELLO")
        hello = frame.json()
        self.link.session = frame.session
        refusal = self._impostor(hello) or self.secondary.refusal(hello)
        if refusal is not None:
            self.peer = fields.brief(hello.get("node"))
            self._refuse(*refusal)
        self.peer = str(hello["node"])
        self.hello = hello
        # The former session ends before this one may write: a stale one never comes after.
        await self.secondary.enter(self)
        # What is told as durable is durable (O4).
        await self.secondary.commit()
        self.link.send_json(Type.WELCOME, self.secondary.welcome(hello))

    def _refuse(self, rule: str, why: str) -> None:
        """Tells both sides, and ends the connection: raises PeerError."""
        why = fields.brief(why)
        self.secondary.events.emit("refused", peer=self.peer, rule=rule, why=why)
        self.link.send_json(Type.REFUSE, {"rule": rule, "why": why})
        self.link.close(PeerError(why), flush=True)
        raise PeerError(why)

    def _impostor(self, hello: dict[str, Any]) -> tuple[str, str] | None:
        """A node that proved one name and says another (F6)."""
        said = hello.get("node")
        if self.proved is None or said == self.proved:
            return None
        return "F6", f"{self.proved} says that it is {str(said)[:64]!r}"

    async def _start(self, frame: Frame) -> None:
        if frame.type is Type.REFUSE:
            why = fields.brief(frame.json().get("why"))
            self.secondary.events.emit("refused", peer=self.peer, why=why)
            raise PeerError(f"the primary refused: {why}")
        if frame.type is not Type.START:
            raise PeerError(f"{frame.type.name} came instead of START")
        self.agreed = True
        start = frame.json()
        action, seq, resync = start.get("action"), start.get("seq"), start.get("resync")
        if (
            action not in ("continue", "reset")
            or type(seq) is not int
            or not 1 <= seq <= fields.SEQ_MAX
        ):
            raise PeerError(f"START garbled: {fields.brief(start)}")
        log = self.secondary.log
        if action == "continue" and seq != log.next_seq:
            raise PeerError(f"START continues at {seq}, the log here ends at {log.next_seq - 1}")
        marks = leftout.parse(start, len(self.secondary.volumes))
        copies = fields.integer(start, "copies") if "copies" in start else None
        anew = action == "reset" or bool(resync)
        if anew and (frozen := self.secondary.frozen()) is not None:
            self._refuse(*frozen)
        delay = start.get("apply_delay", 0.0)
        if not isinstance(delay, int | float) or not 0 <= delay <= 86_400:
            raise PeerError(f"START garbled: apply_delay {delay!r}")
        if delay != self.secondary.applier.settings["delay"]:
            await self.secondary.applier.change(delay=float(delay))
        self.secondary.eager = start.get("eager") is True
        if anew:
            self.secondary.tell_delay(fields.brief(start.get("why")))
        reset_seq = seq if action == "reset" else None
        put_off = start.get("put_off") is True
        await self.secondary.adopt(
            self.hello, reset_seq, bool(resync), marks, put_off=put_off, copies=copies or 0
        )
        self._copies = copies
        self._started = True
        self._eager = start.get("eager") is True
        self.link.begin(started=True)
        self.on_started()
        self.link.send_json(Type.READY, {})
        self.acknowledge()

    # -- records -----------------------------------------------------------------------------

    async def _on_records(self, frame: Frame) -> None:
        log = self.secondary.log
        portions = self._checked(frame.payload, log.next_seq)
        for part, count, largest, epoch, records, places in portions:
            if largest > log.capacity // 4:
                what = f"a record of {largest} bytes, and the log of {self.secondary.node_name}"
                have = f"takes no larger one than {log.capacity // 4}: a larger log.size is needed"
                self._refuse("T1", f"{what} {have}")
            while not log.fits(len(part), largest):
                self._check_stuck(len(part) + largest)
                # Whether it is frozen meanwhile is looked at again.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FULL_LOOK_SECONDS):
                        await self.secondary.need_space()
            first_seq = log.next_seq
            log.append([part], len(part), count, records=records, places=places)
            log.ring.epoch = epoch
            self.secondary.applier.arrived(first_seq)
            self.acknowledge()

    def _check_stuck(self, room: int) -> None:
        """Refuses the primary if the log has not this room until somebody thaws this node (V8).
        Clients that wait for what is durable here (I8) would wait for it too, and without a word;
        so it is as if the link were lost, and the primary knows why."""
        secondary, ring = self.secondary, self.secondary.log.ring
        if not secondary.applier.settings["frozen"]:
            return
        all_released = ring.tail_seq > secondary.applied_seq and ring.tail == ring.durable_tail
        if all_released and ring.room() < room:
            why = f"{secondary.node_name} is frozen, and its log is full: nbdmirror apply thaw"
            self._refuse("V8", why)

    def _checked(self, view: memoryview, next_seq: int) -> list[Portion]:
        """The records that are new here, all verified (X6)."""
        epochs = self.secondary.log.ring.epoch, int(self.hello["epoch"])
        plain = batch.check_writes(view, next_seq, *epochs, self._sizes)
        if plain is not None and len(view) <= self.secondary.log.capacity // 4:
            start, places, largest, epoch = plain
            count = len(places) // batch.PLACE_SIZE
            return [Portion(view[start:], count, largest, epoch, None, places)] if count else []
        records, payload = self._checked_singly(view, next_seq)
        return list(self._portions(payload, records)) if records else []

    def _portions(self, payload: memoryview, records: list[Record]) -> Iterator[Portion]:
        """A frame's records as a whole, or one by one where the log here is small."""
        sizes = [codec.stored_size(record.kind, record.length) for record in records]
        if len(payload) <= self.secondary.log.capacity // 4:
            yield Portion(payload, len(records), max(sizes), records[-1].epoch, records, None)
            return
        at = 0
        for record, size in zip(records, sizes, strict=True):
            yield Portion(payload[at : at + size], 1, size, record.epoch, [record], None)
            at += size

    def _checked_singly(self, view: memoryview, next_seq: int) -> tuple[list[Record], memoryview]:
        """The same for records of any kind, and with what is wrong with them; and their bytes."""
        records: list[Record] = []
        start = at = 0
        epoch, epoch_max = self.secondary.log.ring.epoch, int(self.hello["epoch"])
        while at < len(view):
            record = codec.parse(view, at)
            at += codec.stored_size(record.kind, record.length)
            if record.seq < next_seq and not records:
                start = at  # already here: skipped, never applied again (O8)
                continue
            if record.seq != next_seq:
                raise PeerError(f"record {record.seq} came, {next_seq} was next")
            if record.epoch > epoch_max:
                raise PeerError(f"record {record.seq} of epoch {record.epoch}, not {epoch_max}")
            if record.epoch < epoch:
                # A scan would stop there, and take what is behind for damage (O10).
                raise PeerError(
                    f"record {record.seq} of epoch {record.epoch} behind one of {epoch}"
                )
            epoch = record.epoch
            if record.kind == codec.MARK:
                self.secondary.check_mark(record)
            else:
                self.secondary.check_range(record.volume, record.offset, record.length)
            if record.kind == codec.FILL:
                raise PeerError(f"record {record.seq} is a fill")
            next_seq += 1
            records.append(record)
        if at > len(view):
            raise PeerError("records cut short")
        return records, view[start:]

    def acknowledge(self) -> None:
        """Tells the primary what is received, durable and applied, if that has changed: at once
        where it asked for that, else soon."""
        if not self._started or self._ack_due is not None:
            return
        loop = asyncio.get_running_loop()
        wait = self._acked_at + ACK_PAUSE_SECONDS - loop.time()
        if wait <= 0 or self._eager:
            self._acknowledge_now()
        else:
            self._ack_due = loop.call_later(wait, self._acknowledge_now)

    def _acknowledge_now(self) -> None:
        self._ack_due = None
        if self.link.cause is not None:
            return
        secondary = self.secondary
        received = secondary.log.next_seq - 1
        state = (received, min(secondary.log.durable_seq, received), secondary.applied_seq)
        if state != self._acked:
            self._acked = state
            self._acked_at = asyncio.get_running_loop().time()
            self.link.send(Type.ACK, [repl.ACK.pack(*state)])

    # -- regions -----------------------------------------------------------------------------

    def _region(self, frame: Frame) -> Region:
        region = parse_region(frame)
        self.secondary.check_resyncing()
        self.secondary.check_range(region.volume, 0, 1)  # even of one in which nothing differs
        for offset, length, _ in region.extents:
            self.secondary.check_range(region.volume, offset, length)
        return region

    def _ranges_ahead(self, region: Region) -> Iterator[tuple[int, int]]:
        """What this copy and those right behind it are about to overwrite with data."""
        size = 0
        behind = takewhile(lambda frame: frame.type is Type.REGION, self._frames)
        for one in chain([region], map(self._region, behind)):
            for offset, length, data in one.extents:
                if data is not None and one.volume == region.volume:
                    yield offset, length
                    size += length
            if size >= AHEAD_BYTES:
                return

    async def _on_region(self, frame: Frame) -> None:
        region = self._region(frame)
        secondary = self.secondary
        if secondary.in_the_way(region.volume, region.extents):
            await secondary.make_way(region.volume, list(self._ranges_ahead(region)))
        for offset, length, data in region.extents:
            await secondary.place(region.volume, offset, length, data)
        if not region.more:
            self._sync_soon(region.token)

    def _sync_soon(self, token: int) -> None:
        self._synced_tokens.append(token)
        if self._sync_task is None:
            self._sync_task = asyncio.ensure_future(self._sync_regions())

    async def _sync_regions(self) -> None:
        """Acknowledges windows once the facets are durable past them (O7)."""
        while self._synced_tokens:
            tokens, self._synced_tokens = self._synced_tokens, []
            try:
                await self.secondary.sync_placed()
            except DiskFailed as error:
                self.link.close(error)
                return
            if self.link.cause is not None:
                return
            if self._copies not in (None, self.secondary.copies):
                self._copies = self.secondary.copies
                self.link.send(Type.COPIES, [repl.COPIES.pack(self._copies)])
            self.link.send(Type.DONE, [b"".join(map(repl.TOKEN.pack, tokens))])
        self._sync_task = None

    async def progress(self) -> None:
        """Called by the secondary when its durable or applied position moved."""
        self.acknowledge()
        self._comparer.moved()
        await self._check_end()

    async def _check_end(self) -> None:
        seq = self._end_seq
        if seq is None or self.secondary.applied_seq < seq or self.link.cause is not None:
            return
        self._end_seq = None
        await self.secondary.become_consistent(seq)
        self.link.send(Type.CONSISTENT, [repl.SEQ.pack(seq)])

    def status(self) -> dict[str, Any]:
        """The ``upstream`` object of the status."""
        return {"name": self.peer, "link": "connected" if self._started else "connecting"}
