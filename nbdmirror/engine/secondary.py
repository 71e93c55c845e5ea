"""A secondary: its log, its facets, and what it may promise to a primary (V7, V8).

Two tasks run as long as the node does: one makes the log durable, one applies what is durable
to the facets, in order (``engine.applier``). Connections come and go (``engine.receiver``); at
most one is current.

The ``upstream`` part of the superblock: {name, consistent, since}. ``consistent`` is false from
before the first region copy of a resync lands until the stream has passed its end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nbdmirror.codec import fields
from nbdmirror.codec import mark as marks
from nbdmirror.codec.hashing import agreed
from nbdmirror.codec.record import Record
from nbdmirror.codec.regions import Extent
from nbdmirror.config import ReplicationConfig
from nbdmirror.engine.applier import Applier
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.facet import LocalFacet, to_the_end
from nbdmirror.engine.follower import Follower
from nbdmirror.engine.greeting import answer, misfit, second_name, second_run
from nbdmirror.engine.leftout import LeftOut
from nbdmirror.engine.log import Log
from nbdmirror.engine.rejoin import trust
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed, NbdmirrorError, PeerError, Refused
from nbdmirror.ports import Buffer, Clock

COMMIT_PAUSE_SECONDS = 0.02
"""Between two commits of the log: what a durable acknowledgement may come later."""

if TYPE_CHECKING:
    from nbdmirror.engine.receiver import Receiver


class Secondary:
    """The receiving role of a node."""

    def __init__(
        self,
        group_name: str,
        node_name: str,
        volumes: list[Volume],
        log: Log,
        store: Store,
        events: EventLog,
        tuning: ReplicationConfig,
        follower: Follower,
        clock: Clock,
    ) -> None:
        self.group_name = group_name
        self.node_name = node_name
        self.volumes = volumes
        self.log = log
        self.store = store
        self.events = events
        self.tuning = tuning
        self.follower = follower
        self._clock = clock
        self.applier = Applier(volumes, log, store, events, follower)
        self.applier.caught_up = self._tell
        self.current: Receiver | None = None
        self._entered: dict[Receiver, asyncio.Event] = {}
        self.detached = False
        self.stopping = False
        """No connection becomes the current one any more: what it brought would not be synced."""
        self.eager = False
        """The primary's clients wait for what is durable here."""
        self.failed: NbdmirrorError | None = None
        self.on_failed: Callable[[NbdmirrorError], None] = lambda error: None
        self.need_space: Callable[[], Coroutine[Any, Any, None]] = _no_space
        self._tasks: list[asyncio.Task[None]] = []
        self._placed = self._placed_synced = 0
        """Regions put into the facets, and how many of these are durable there."""
        self.copies = int(store.state.get("copies", 0))
        """As it is durable in the superblock."""
        log.on_failed = self.fail

    def start(self) -> None:
        """Starts committing and applying."""
        self._tasks = [
            asyncio.ensure_future(self._guard(self._commit())),
            asyncio.ensure_future(self._guard(self.applier.run())),
        ]
        if self._consistent:
            # It may have ended just before; and perhaps no primary comes any more.
            self.follower.release(self.follower.images())

    async def stop(self) -> None:
        """Ends the tasks, then commits what is in the log, and applies what may be applied.

        A record that is cut short is done again; a snapshot that it asked for is in the list."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.failed is None:
            await self.log.sync(self.log.next_seq - 1)
            await self.applier.settle()
            await self.sync_facets()

    @property
    def applied_seq(self) -> int:
        """Every record up to here is in the facets."""
        return self.applier.applied_seq

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (NbdmirrorError, OSError) as error:
            self.fail(error)

    def fail(self, error: NbdmirrorError | OSError) -> None:
        """A disk of this node failed for good: no more promises, the primary is told (O16); and
        nothing is applied any more, for what may be, as memory has it, may not be on the disk."""
        if not isinstance(error, NbdmirrorError):
            error = DiskFailed(str(error), number=error.errno or 5)
        if self.failed is None:
            self.failed = error
            for task in self._tasks:
                task.cancel()
            if self.current is not None:
                self.current.link.close(error)
            self.on_failed(error)

    # -- committing and applying -------------------------------------------------------------

    async def _commit(self) -> None:
        log = self.log
        while True:
            while log.durable_seq >= log.next_seq - 1:
                log.appended.clear()
                await log.appended.wait()
            await self.commit()
            await self._tell()
            if not self.eager:
                # Nobody waits for an asynchronous secondary: larger commits cost its host less.
                await asyncio.sleep(COMMIT_PAUSE_SECONDS)

    async def commit(self) -> None:
        """Makes durable what is in the log by now: from then on it may be applied."""
        await self.log.sync(self.log.next_seq - 1)
        self.applier.wake()

    async def _tell(self) -> None:
        if self.current is not None:
            # Where the link is gone, its receiver sees that itself.
            with contextlib.suppress(ConnectionError):
                await self.current.progress()

    async def drain(self) -> None:
        """Returns when everything in the log is durable, applied, and durable in the facets.

        A disk that fails in it ends the node, be it a command that asked (O16); then raises."""
        try:
            await self.log.sync(self.log.next_seq - 1)
            await self.applier.drain()
            await self.sync_facets()
        except (NbdmirrorError, OSError) as error:
            self.fail(error)
            raise

    # -- sessions ----------------------------------------------------------------------------

    async def enter(self, receiver: Receiver) -> None:
        """Makes a connection the current one; the former ends first, and what it began in a thread
        (a hole that is being punched) lands before anything that this one writes.
        ConnectionResetError as the node stops."""
        if self.stopping:
            raise ConnectionResetError("the node stops")
        former, self.current = self.current, receiver
        if former is not None and former is not receiver:
            former.link.close(PeerError("replaced by a newer connection"))
        while others := [ended for one, ended in self._entered.items() if one is not receiver]:
            await others[0].wait()
        self._entered[receiver] = asyncio.Event()
        # Whatever the former session queued is either in the log by now or gone with it.
        await asyncio.sleep(0)

    def leave(self, receiver: Receiver) -> None:
        """A connection has ended, and nothing of it runs any more."""
        if self.current is receiver:
            self.current = None
        if receiver in self._entered:
            self._entered.pop(receiver).set()

    def refusal(self, hello: dict[str, Any]) -> tuple[str, str] | None:
        """(rule, reason) why this primary is not for us; ``None`` if it is (T1, T12)."""
        if self.failed is not None:
            return "failed", f"{self.node_name} failed: {self.failed.message}"
        if self.detached or self.store.state.get("restore") is not None:
            return "V14", f"a snapshot is being restored on {self.node_name}"
        refusal = misfit(
            hello, self.node_name, self.group_name, self.store.state["uuid"], self.volumes
        )
        current = self.current
        # One whose primary has not agreed may be the very one that is about to be refused.
        if refusal is None and current and current.agreed and current.link.cause is None:
            refusal = second_run(hello, current.hello) or second_name(
                hello, current.hello, self.node_name
            )
        return refusal

    def frozen(self) -> tuple[str, str] | None:
        """(rule, reason) why no stream may begin for which all that is held back is applied, and
        copies land in the facets: somebody keeps the point that they are at (V8). Of one where a
        resync is under way there is no such point."""
        if not self.applier.settings["frozen"] or not self._consistent:
            return None
        return (
            "V8",
            f"{self.node_name} is frozen, and a resync would end that: nbdmirror apply thaw",
        )

    def tell_delay(self, why: str) -> None:
        """A stream begins for which all that a delay holds back is applied (V8)."""
        if self.applier.delayed:
            self.events.emit("delay-given-up", seq=self.applied_seq, why=why)

    @property
    def _consistent(self) -> bool:
        return bool((self.store.state["upstream"] or {}).get("consistent"))

    def welcome(self, hello: dict[str, Any]) -> dict[str, Any]:
        """What this node says of itself (WELCOME)."""
        seq = self.log.next_seq - 1
        return answer(hello, self.node_name, self.store.state, seq, self.copies)

    def distrust(self) -> None:
        """It promised more than it has; or its superblock may be out of date, of before the log was
        emptied for a resync: then redo has brought back what region copies had replaced. Whatever
        the primary knows, everything is compared (I5); the caller saves."""
        if self.store.state["upstream"] is not None:
            self.store.state["upstream"]["consistent"] = False
            self.store.state["damaged"] = True

    async def adopt(
        self,
        hello: dict[str, Any],
        reset_seq: int | None,
        resync: bool,
        left_out: Sequence[LeftOut] = (),
        *,
        put_off: bool = False,
        copies: int = 0,
    ) -> None:
        """Takes over the primary's identity and history, and the terms of START, durably.

        Before a resync the log is emptied too: a record from before it, redone over a region
        copy, could bring back what the copy replaced."""
        if resync and reset_seq is None:
            reset_seq = self.log.next_seq
        if reset_seq is not None:
            await self._end_delay()
            await self.drain()
        if resync and self._consistent:
            await self.follower.before_resync(self.log.next_seq - 1, self._clock.time_ns())
        # No await from here to the save: what is saved is all of it or nothing.
        state, epoch = self.store.state, int(self.store.state["epoch"])
        state["uuid"] = fields.text(hello, "uuid")
        state["generation"] = fields.text(hello, "generation")
        state["history"] = [list(pair) for pair in fields.history(hello)]
        state["epoch"] = fields.integer(hello, "epoch", fields.EPOCH_MAX)
        state["run"] = fields.text(hello, "run")
        state["forks"] = fields.forks(hello)
        for volume, other, saved in zip(
            self.volumes, hello["volumes"], state["volumes"], strict=True
        ):
            volume.uuid = saved["uuid"] = fields.text(other, "uuid")
        former = state["upstream"] or {}
        state["upstream"] = {
            "name": fields.text(hello, "node"),
            "consistent": bool(former.get("consistent")) and not resync,
            "since": former.get("since"),
        }
        if resync:  # what a former session has placed counts too
            self._count_copies(copies)
        counted = int(state.get("copies", 0))
        if not put_off:
            state["altered"] = state["rejoined"] = state["damaged"] = False
        self.follower.left_out(left_out, epoch)
        if reset_seq is not None:
            self._reset(reset_seq, left_out)
        await to_the_end(asyncio.ensure_future(self._adopted(counted, reset_seq is not None)))

    async def _adopted(self, copies: int, emptied: bool) -> None:
        """The end of ``adopt``, also where its session is cut meanwhile: of a count that is durable
        and not told the primary would think that this is an older copy of the node (T5)."""
        await self.store.save()
        self.copies = max(self.copies, copies)
        if emptied:
            self.log.confirm_tail(self.log.ring.tail)

    async def _end_delay(self) -> None:
        """Keeps the point at which a delay holds the facets, if it is one, before it goes (V8)."""
        if self.applier.delayed and self._consistent:
            async with self.applier.lock:
                seq, delay = self.applied_seq, float(self.applier.settings["delay"])
                await self.follower.delay_ends(seq, self._clock.time_ns(), delay)

    async def detach(self, *, force: bool) -> None:
        """Something else than the primary is about to change the volumes (V14): everything is
        applied and durable, and no primary is let in until ``detached`` is taken back, which undoes
        this. Refused while the link is active, or the node frozen; or, but for ``force``, while a
        delay holds something back."""
        if self.current is not None or self._entered:  # what one began in a thread may yet land
            raise Refused(
                f"{self.node_name} is connected to its primary: what is restored here would be "
                "replaced",
                hint="pause this remote on the primary first",
            )
        if self.applier.settings["frozen"]:
            # The point that somebody keeps here would be gone, whatever becomes of the change (V8).
            raise Refused(
                f"{self.node_name} is frozen: what it holds back would be applied first",
                hint="nbdmirror apply thaw, then again; or restore it elsewhere",
            )
        if self.applier.delayed and not force:
            # So would the point that a delay keeps; but nobody can thaw that, and it may be long.
            raise Refused(
                f"{self.node_name} is delayed: what it holds back would be applied first",
                hint="wait until all is applied: see nbdmirror status; --force applies it now",
            )
        self.detached = True
        await self.drain()

    async def diverge(self, change: dict[str, Any]) -> None:
        """From this save of the superblock on, in which ``change`` goes, what is detached may be
        changed: no redo comes by, and the primary will compare everything."""
        assert self.detached
        state = self.store.state
        if state["upstream"] is not None:
            state["upstream"]["consistent"] = False
        state.update(change, altered=True)
        self._reset(self.log.next_seq)
        await self.store.save()
        self.log.confirm_tail(self.log.ring.tail)

    def _reset(self, seq: int, left_out: Sequence[LeftOut] = ()) -> None:
        """Empties the log, to go on with ``seq``; what it held is in the facets, durably."""
        self.log.reset(seq)
        self.applier.reset(seq)
        self.follower.restarted(seq, left_out)
        for volume in self.volumes:
            for facet in volume.facets:
                facet.restart(seq)
        ring = self.log.ring
        self.store.state["tail"] = {"position": ring.tail, "seq": ring.tail_seq}
        self.store.state["durable_seq"] = self.log.durable_seq

    async def become_consistent(self, seq: int) -> None:
        """The stream has passed the end of a resync: say so, durably."""
        self.store.state["upstream"].update(consistent=True, since=seq)
        trust(self.store, self.volumes)
        # Should the next resync begin before that is durable, it has an image of its own.
        images = self.follower.images()
        await self.store.save()
        self.events.emit("consistent", seq=seq)
        self.follower.release(images)

    # -- facets ------------------------------------------------------------------------------

    def check_range(self, volume: int, offset: int, length: int) -> None:
        """PeerError unless the range lies within a volume of ours."""
        if volume >= len(self.volumes) or not 0 < length <= self.volumes[volume].size - offset:
            raise PeerError(f"{length} bytes at {offset} of volume {volume}: out of bounds")

    def check_mark(self, record: Record) -> None:
        """PeerError unless a mark is one that may come now: what was changed beside the log comes
        as a resync, and no stream without one goes on behind it."""
        assert record.payload is not None
        mark = marks.decode(record.payload)
        if mark.volumes[-1] >= len(self.volumes):
            raise PeerError(f"mark {record.seq} is about volume {mark.volumes[-1]}")
        if mark.do in (marks.RESTORE, marks.CHANGED) and self.store.state["upstream"]["consistent"]:
            raise PeerError(f"record {record.seq} tells of a {mark.do} that was not resynchronised")

    def check_resyncing(self) -> None:
        """PeerError if no resync was agreed upon: regions then are not to be overwritten."""
        if self.store.state["upstream"]["consistent"]:
            raise PeerError("a region came outside a resync")

    def in_the_way(self, volume: int, extents: Iterable[Extent]) -> bool:
        """Whether a snapshot still needs what these extents would overwrite with data."""
        guard = self.volumes[volume].guard
        return guard is not None and any(
            data is not None and guard.holds(offset, length) for offset, length, data in extents
        )

    async def make_way(self, volume: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Has snapshots keep what is there, all of it with few syncs (X2). ``place`` does so too,
        for what is still needed when its turn comes."""
        guard = self.volumes[volume].guard
        if guard is not None:
            await guard.make_way(ranges)

    async def place(self, volume: int, offset: int, length: int, data: Buffer | None) -> None:
        """Puts a region copy, or zeros, into the facets; DiskFailed if one cannot take it."""
        facets = self.volumes[volume].facets
        if data is None and not any(
            True for f in facets for _ in f.file.data_ranges(offset, length)
        ):
            return
        while (guard := self.volumes[volume].guard) is not None and guard.holds(offset, length):
            await guard.make_way([(offset, length)])
        for facet in facets:
            try:
                if data is not None:
                    facet.pwrite(offset, data)
                else:
                    await facet.punch(offset, length)
            except OSError as error:
                failure = facet.fail("write", error)
                self.fail(failure)
                raise failure from error
        # Not sooner: a sync that began while a hole was punched does not cover it.
        self._placed += 1

    async def read(self, volume: int, offset: int, length: int) -> Buffer:
        """A range of a facet; DiskFailed if the disk cannot give it."""
        facet = self.volumes[volume].source()
        try:
            return await facet.read(offset, length)
        except OSError as error:
            raise self._read_failed(facet, error) from error

    async def hashes(self, volume: int, offset: int, length: int, step: int, key: bytes) -> bytes:
        """``codec.hashing.digests`` of a range; where facets differ, such as nothing has. Errors as
        for ``read``."""
        found = []
        for facet in self.volumes[volume].facets:
            try:
                found.append(await facet.file.hashes(offset, length, step, key))
            except OSError as error:
                raise self._read_failed(facet, error) from error
        return found[0] if len(found) == 1 else agreed(found)

    def _read_failed(self, facet: LocalFacet, error: OSError) -> DiskFailed:
        failure = facet.fail("read", error)
        self.fail(failure)
        return failure

    async def sync_placed(self) -> None:
        """Makes durable what was placed; nothing to do where nothing was. What came from the log
        is durable there, and what was there before a resync was synced when that began. And that
        there is more now than there was, so that no older copy of this node passes for it (I5)."""
        placed = self._placed
        if placed != self._placed_synced:
            await self.sync_facets()
            copies = self._count_copies()
            await self.store.save()
            self.copies = max(self.copies, copies)
            self._placed_synced = placed

    def _count_copies(self, known: int = 0) -> int:
        """Any copy of this node that there is by now says less; the caller saves, before a region
        is acknowledged. ``known``: what the primary was told once. A node that was set back goes on
        past that, for until then it is compared again whenever they meet."""
        copies = min(max(int(self.store.state.get("copies", 0)), known) + 1, fields.SEQ_MAX)
        self.store.state["copies"] = copies
        return copies

    async def sync_facets(self) -> None:
        """Makes durable all that was put into the facets; DiskFailed is final (O16)."""
        for volume in self.volumes:
            for facet in volume.facets:
                try:
                    await facet.sync()
                except DiskFailed as error:
                    self.fail(error)
                    raise

    def status(self) -> dict[str, Any]:
        """The ``upstream`` object of the status."""
        upstream = self.store.state["upstream"]
        name = upstream["name"] if upstream else None
        return {
            "name": name,
            "link": "connected" if self.current is not None else "disconnected",
            "consistent": bool(upstream and upstream["consistent"]),
            "received_seq": self.log.next_seq - 1,
            "durable_seq": self.log.durable_seq,
            "applied_seq": self.applied_seq,
            "apply": self.applier.status(),
            "next_action": "nbdmirror apply thaw" if self.applier.settings["frozen"] else None,
        }


async def _no_space() -> None:
    await asyncio.sleep(0.01)
