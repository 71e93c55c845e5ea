"""Gives log space back: syncs facets in the background, moves the tail, forces remotes out.

The only one that releases records. A record is needed until every remote that reads the log has
it durably and every facet was synced past it (O5); the tail is durable before its space is used
again. When that is not enough for a waiting write, the policy decides (M7): the remote furthest
behind moves to DCM logging (``dcm``), or the write goes on waiting (``block``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from nbdmirror.engine.events import EventLog
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.facets import Facets
from nbdmirror.engine.log import Log
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.rescue import REACH_SECONDS, Rescue
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed, FormatError, NbdmirrorError

INTERVAL_SECONDS = 5.0
"""The log is looked after at least this often."""
SYNC_SECONDS = 20.0
SYNC_AT = 0.5
"""Facets are synced after so long, or when so much of the log is in use: seldom, because random
pages cost a disk more than the log does, and redo from the log is quick."""
LANDING_SECONDS = 1.0
"""A log in memory waits at most so long for a record on its way before facets are synced again."""
SETTLE_SECONDS = 0.05
HIGH_WATER = 0.9
"""Of the log: a remote that holds more is forced out before writes have to wait for it."""

FacetLost = Callable[[Volume, LocalFacet], Coroutine[Any, Any, None]]


class Holder(Protocol):
    """Whoever the log may be kept for, and can do with a map instead."""

    @property
    def name(self) -> str:
        """What events call it."""

    @property
    def tracking(self) -> bool:
        """Whether the log is not kept for it."""

    @property
    def durable_seq(self) -> int:
        """It has everything up to this seq, durably."""

    async def overflow(self, why: str) -> None:
        """Marks what is pending in its map, piece by piece, and then needs the log no more."""


async def _ignore(volume: Volume, facet: LocalFacet) -> None:
    return None


class Housekeeper:
    """The background work of a node on its log."""

    def __init__(
        self,
        volumes: Sequence[Volume],
        log: Log,
        store: Store,
        events: EventLog,
        applied_seq: Callable[[], int],
    ) -> None:
        self._volumes = volumes
        self._log = log
        self._store = store
        self._events = events
        self._applied_seq = applied_seq
        self.remotes: list[Remote] = []
        self.on_full = "dcm"
        self.failed: NbdmirrorError | None = None
        self.on_failed: Callable[[NbdmirrorError], None] = lambda error: None
        self.facet_lost: FacetLost = _ignore
        """Awaited when a facet failed: makes that durable (O16)."""
        self.facets: Facets | None = None
        """On a primary: facets out of service hold the log too, and have maps."""
        self.rescue: Rescue | None = None
        """On a primary: whether remotes stand in for local facets."""
        self._kick = asyncio.Event()
        self._released = asyncio.Event()
        self.releasing = asyncio.Lock()
        self._waiting = 0
        self._synced_at = 0.0
        self._stalled = False
        self._stalled_at = 0.0
        self._forcing: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the background task."""
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """Ends it; what it had begun is left as a crash would leave it, which is safe."""
        tasks = [task for task in (self._task, self._forcing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def kick(self) -> None:
        """There is reason to look now."""
        self._kick.set()

    def remote_moved(self) -> None:
        """A remote acknowledged more: worth a look if somebody waits for space."""
        if self._waiting:
            self._kick.set()

    async def need_space(self) -> None:
        """The log is full: returns when some of it was released; raises if that cannot be."""
        if self.failed is not None:
            raise self.failed
        self._waiting += 1
        try:
            self._released.clear()
            self._kick.set()
            await self._released.wait()
            if self.failed is not None:
                raise self.failed
        finally:
            self._waiting -= 1

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(INTERVAL_SECONDS):
                    await self._kick.wait()
            except TimeoutError:
                pass
            self._kick.clear()
            try:
                await self.cycle()
            except NbdmirrorError as error:
                if self._log.failed is None:
                    self.fail(error)
                    return
            except Exception as error:
                self._defect(error)
                return

    def _defect(self, error: Exception) -> None:
        """With nobody to give space back, writes would wait for ever (I8): the node ends; told."""
        self._events.emit("defect", why=repr(error))
        why = f"housekeeping of the log failed: {error!r}"
        self.fail(NbdmirrorError(why, hint="this is a defect of nbdmirror; restart the node"))

    def fail(self, error: NbdmirrorError) -> None:
        """Nothing is released any more, for the node ends: who waits for space is told."""
        if self.failed is None:
            self.failed = error
            self._released.set()
            self.on_failed(error)

    async def cycle(self) -> None:
        """Syncs what is dirty, releases what is not needed, and applies the policy if that does
        not leave room."""
        if self.failed is not None:
            return  # the node ends
        if self._log.failed is not None or self._log.frozen:
            return  # it is being replaced
        await self._pass_on()
        await self._release()
        now = asyncio.get_running_loop().time()
        # Their syncs free what is kept for a redo, and nothing else.
        full = self._waiting or self._log.ring.used > self._log.capacity * SYNC_AT
        pressed = full and self._log.redone
        if pressed or now - self._synced_at >= SYNC_SECONDS:
            self._synced_at = now
            await self.sync_facets()
            await self._release()
        self._police()

    def wake(self) -> None:
        """The log was replaced: whoever waits for space looks again."""
        self._released.set()
        self._released.clear()
        self._kick.set()

    async def sync_log(self) -> int:
        """For a log in memory: syncs the facets, and returns the seq up to which they have all.
        DiskFailed if a volume's last one has failed, now or before."""
        await self._first_landed()
        upto = self._log.next_seq - 1
        await self.sync_facets()
        for volume in self._volumes:
            for facet in volume.facets:
                if facet.unnoted:  # somebody else's sync saw it fail: not before that is durable
                    await self.facet_lost(volume, facet)
            if not volume.in_service() and not self._goes_on(volume):
                failed = (facet.failed for facet in volume.facets if facet.failed is not None)
                raise next(failed, None) or DiskFailed(volume.no_facet().message)
            away = not volume.in_service() and self.rescue is not None
            if away and self.rescue is not None and not await self.rescue.durable(volume, upto):
                return await self.sync_log()  # a facet is back, which has it: to be synced
        if await self._pass_on():
            return await self.sync_log()  # at the next start what is flushed would be nowhere
        if self.rescue is not None and self.rescue.leaning():
            # Whom a start goes by, who no more: what another is about to save is not durable yet.
            await self._store.save()
        return min([upto, *(f.floor(upto) for v in self._volumes for f in v.writable())])

    async def _first_landed(self) -> None:
        """While the first record that is not durable is on its way into a facet, no sync makes it
        so: waits until some of what is on its way is there; not for long, for that may wait for
        this very sync (a facet that has failed makes that durable first)."""
        first = self._log.durable_seq + 1
        if any(first in facet.pending for v in self._volumes for facet in v.writable()):
            waiters = [waiter for volume in self._volumes for waiter in volume.on_their_way()]
            if waiters:
                first_of = asyncio.FIRST_COMPLETED
                await asyncio.wait(waiters, timeout=LANDING_SECONDS, return_when=first_of)

    async def _pass_on(self) -> list[Volume]:
        """Once all who stand in for a volume's facets have all that the last of them had, the
        volume comes back from there; durably. Until then it comes back from that facet: should the
        log be gone with its memory, nobody else has what was flushed to it (I3, M13). Returns the
        volumes that still do."""
        rescue, left = self.rescue, list[Volume]()
        if rescue is None or not rescue.leaning():
            return left
        passed = False
        for volume in rescue.leaning():
            entries = self._store.state["volumes"][volume.index]["facets"]
            had = max((facet.written_seq for facet in volume.facets), default=0)
            if rescue.holds(volume, had):
                for entry in entries:
                    passed = passed or bool(entry["last"])
                    entry["last"] = False
            elif any(entry["last"] for entry in entries):
                left.append(volume)
        if passed:
            await self._store.save()
        return left

    async def sync_facets(self, *, everything: bool = False) -> None:
        """Syncs what is dirty; who fails goes out of service. DiskFailed if a volume's last did.
        ``everything``: also what was written beside the log. A disk that hangs is waited for only
        where something was written to it (I8)."""
        dirty = [
            (volume, facet)
            for volume in self._volumes
            for facet in volume.writable()
            if (facet.unsynced if everything else facet.dirty)
        ]
        syncs = (facet.sync() for _, facet in dirty)
        results = await asyncio.gather(*syncs, return_exceptions=True)
        for (volume, facet), result in zip(dirty, results, strict=True):
            if isinstance(result, DiskFailed):
                await self.facet_lost(volume, facet)
                if not volume.in_service() and not self._goes_on(volume):
                    self.fail(result)  # nobody else holds what was promised, whoever asked
                    raise result
            elif isinstance(result, BaseException):
                raise result

    def _goes_on(self, volume: Volume) -> bool:
        return self.rescue is not None and self.rescue.goes_on(volume)

    def _floor(self) -> int:
        applied = self._applied_seq()
        facets = [facet for volume in self._volumes for facet in volume.facets]
        redone = self._log.redone
        floors = [facet.floor(applied) for facet in facets if redone or not facet.writable]
        floors += [remote.floor(applied) for remote in self.remotes]
        floors += [self._place(remote) for remote in self.remotes if not remote.tracking]
        return min([applied, *floors])

    def _place(self, one: Holder) -> int:
        """The log is kept for it after this seq."""
        leaning = self.rescue is not None and bool(self.rescue.leaning())
        if leaning and isinstance(one, Remote) and not one.tracking:
            # What its facets lack is laid over what is read from it.
            return min(one.durable_seq, one.applied_seq)
        return one.durable_seq

    async def settle(self, seq: int, relieve: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Returns when records up to ``seq`` are in the facets, durably, and released: no redo
        comes by them any more, whatever happens. ``relieve``: takes out of the log who holds it."""
        while True:
            await relieve()
            await self.sync_facets()
            await self._release()
            if self._store.state["tail"]["seq"] > seq:
                return
            await asyncio.sleep(SETTLE_SECONDS)

    async def _release(self) -> None:
        # One at a time: what one has released the next must not look for records in.
        async with self.releasing:
            ring = self._log.ring
            while (floor := self._floor()) >= ring.tail_seq:
                seq, position = await releasable(self._log, floor + 1)
                if ring is not self._log.ring:
                    return  # the log was reset meanwhile
                if self._floor() >= seq - 1:  # else somebody needs it since: a facet that has left
                    self._let_go(seq, position)
                    break
            if ring.durable_tail < ring.tail:
                await self._confirm()

    def _let_go(self, seq: int, position: int) -> None:
        self._log.release(seq, position)
        for volume in self._volumes:
            for facet in volume.writable():
                # Where nothing is redone the floor says nothing of them.
                has = seq - 1 if self._log.redone else facet.floor(seq - 1)
                facet.synced_seq = max(facet.synced_seq, has)

    async def _confirm(self) -> None:
        """Makes the tail durable; only then is the space free (O5)."""
        ring = self._log.ring
        for remote in list(self.remotes):
            if remote.tracking:
                await remote.sync_maps()  # what was pending is in the DCM before it goes (O12)
        if self.facets is not None:
            await self.facets.sync_maps()
        if self._log.ring is not ring:
            return  # the log was reset meanwhile
        position = ring.tail
        self._store.state["tail"] = {"position": position, "seq": ring.tail_seq}
        # In this save it goes with the tail; in any other before that one is durable, what was in
        # memory only would be missed by a start.
        self._store.state["durable_seq"] = max(self._log.kept_seq, ring.tail_seq - 1)
        await self._store.save()
        if self._log.ring is ring:
            self._log.confirm_tail(position)
        self._released.set()
        self._released.clear()
        self._stalled = False

    # -- policy ------------------------------------------------------------------------------

    def _police(self) -> None:
        """Forces out the remote furthest behind, if the log is full because of it (M7)."""
        ring = self._log.ring
        # What is released already only waits for its tail to be durable: it holds up nobody.
        full = ring.used > self._log.capacity * HIGH_WATER or (
            self._waiting > 0 and ring.durable_tail == ring.tail
        )
        if not full or (self._forcing is not None and not self._forcing.done()):
            return
        behind = self._furthest_behind()
        if behind is None or self._place(behind) + 1 > ring.tail_seq:
            self._wait_for_reach()
            return  # it is not a remote that holds the tail
        if not isinstance(behind, Remote):
            self._forcing = asyncio.ensure_future(self._force(behind))
            return
        needed = self.rescue is not None and self.rescue.needed(behind)
        if self.on_full == "block" or needed:
            if self._waiting:
                self._stall(behind.name, needed=needed)
            return
        if behind.tracking:
            behind.cancel_start()
            self._kick.set()
        else:
            self._forcing = asyncio.ensure_future(self._force(behind))

    def _wait_for_reach(self) -> None:
        """The log may be full of what a facet out of service lacks: where a remote is all that its
        volume has, and is out of reach, there is nobody to copy that from."""
        away = self._out_of_reach()
        if self._waiting and self.rescue is not None and away:
            following = next((remote.name for remote in self.rescue.following(away[0])), None)
            self._stall(following, needed=True)

    def _out_of_reach(self) -> list[Volume]:
        """The volumes that nobody can be asked for now."""
        rescue = self.rescue
        return [] if rescue is None else [v for v in rescue.leaning() if not rescue.in_reach(v)]

    def _stall(self, remote: str | None, *, needed: bool) -> None:
        """Writes wait for a remote. Where it is all that a volume has, and out of reach, they wait
        no longer than reads do: then nobody holds the volume, and the node ends."""
        now = asyncio.get_running_loop().time()
        if not self._stalled:
            self._stalled, self._stalled_at = True, now
            self._events.emit("log-full", remote=remote, policy="block", needed=needed)
        away = self._out_of_reach()
        if not away:
            self._stalled_at = now
        elif needed and now - self._stalled_at >= REACH_SECONDS:
            self.fail(away[0].no_facet())

    def _furthest_behind(self) -> Holder | None:
        holding: list[Holder] = [r for r in self.remotes if not r.tracking or r.starting]
        if self.facets is not None:
            holding += self.facets.holding()
        return min(holding, key=self._place, default=None)

    async def _force(self, one: Holder) -> None:
        work = asyncio.ensure_future(one.overflow("the log was full"))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=0.05)
                if self._log.failed is None:
                    await self._release()
            work.result()
            await self._release()
        except NbdmirrorError as error:
            self.fail(error)
        except Exception as error:
            self._defect(error)
        finally:
            work.cancel()
            self._kick.set()  # another remote may hold the same tail

    def status(self) -> dict[str, Any]:
        """The ``log`` object of the status."""
        ring = self._log.ring
        return {
            "size": self._log.capacity,
            "used": ring.used,
            "first_seq": ring.tail_seq,
            "next_seq": ring.next_seq,
            "durable_seq": self._log.durable_seq,
            "waiting_writes": self._waiting,
            "full": self._stalled,
        }


async def releasable(log: Log, seq: int) -> tuple[int, int]:
    """(seq, position) of that record, or of one before it: where a header on the way to it has
    rotted, it is out of reach until the log has grown. Who needs what rotted finds out when it
    reads that (fault 15)."""
    ring = log.ring
    try:
        return seq, await log.position_of(seq)
    except FormatError:
        return ring.locate(seq)
