"""Online verify: every region of every volume compared by hash with a remote, under load (X6).

A region is hashed here under its range lock and compared there once every record up to that moment
is applied. A client may write it in between, so a difference counts only if the region was not
touched meanwhile, and was seen twice; what is touched is looked at again. Where this side has
several facets they are compared too, and the remote tells which of two is right: the one that is
alone is rotten, and can be repaired from its equal on this host.

The position is durable from time to time, so a verify goes on where it was after a lost link or a
restart, and with what it had found by then. What it found is in the remote's facts, under
``verified``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nbdmirror.codec import repl
from nbdmirror.codec.hashing import HASH_SIZE
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.core.bucket import Bucket
from nbdmirror.core.progress import Progress
from nbdmirror.core.remotestate import Stall
from nbdmirror.engine.answers import Answers
from nbdmirror.engine.copier import pay
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.facet import LocalFacet, to_the_end
from nbdmirror.engine.governor import Governor
from nbdmirror.engine.link import Link
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed, PeerError
from nbdmirror.ports import Clock

WINDOW_BYTES = 1 << 20
WINDOWS_MAX = 8
SAVE_SECONDS = 10.0
LOOKS_MAX = 30
"""A region that is written each time it is looked at is given up after so many looks."""
LOOK_AGAIN_SECONDS = 0.05
SEEN_MIN = 2
"""A difference is one when it was seen so often, the region untouched."""
FOUND_MAX = 1000
"""Differing regions that are remembered one by one."""
COUNTERS = {"differing": 0, "unsettled": 0, "more_here": 0, "more_there": 0}
"""Of regions; the last two, of those that differ, past ``FOUND_MAX``: rotten in a facet of this
host, and at the remote."""


@dataclass(slots=True)
class Look:
    """Some regions whose hashes are on their way; ``touched`` are those written since."""

    volume: Volume
    first: int
    count: int
    hashes: list[bytes]
    """Of each facet in service, the one that was sent first."""
    facets: list[LocalFacet]
    seq: int
    """The last record that is in them: the remote has to apply it first."""
    touched: dict[int, None] = field(default_factory=dict)


@dataclass(slots=True)
class Doubt:
    """A region to look at again."""

    volume: Volume
    region: int
    looks: int = 0
    seen: int = 0
    """Differences in a row, with each of its facets."""
    alone: int = 0
    """Looks in a row in which the remote agreed with the facet asked, and others did not."""
    turn: int = 0
    """Which facet's hash is sent."""


class Verify:
    """One verify of one remote, over one connection."""

    def __init__(
        self,
        remote: Remote,
        link: Link,
        events: EventLog,
        clock: Clock,
        governor: Governor,
        save: Callable[[], Any],
    ) -> None:
        self.remote = remote
        self._link = link
        self._events = events
        self._clock = clock
        self._governor = governor
        self._save = save
        self._bucket = Bucket(remote.facts.get("verify_rate"))
        self._state: dict[str, Any] = remote.facts["verify"]
        self._told = self._go_back()
        self._looks: dict[int, Look] = {}
        self._doubts: deque[Doubt] = deque()
        self._doubt_of: dict[tuple[int, int], Doubt] = {}
        self._token = 0
        self._answers = Answers(remote, self._awaited)
        self._answers.stalled = self._stalled
        total = sum(volume.size for volume in remote.group.volumes)
        self.progress = Progress("verify", total, phase="verify")

    async def run(self) -> None:
        """Returns when all was looked at, and what was found is durable."""
        remote = self.remote
        remote.progress = self.progress
        remote.group.trackers.append(self)
        try:
            await self._walk()
            await self._settle(0)
            await self._finish()
        finally:
            remote.group.trackers.remove(self)
            if remote.progress is self.progress:
                remote.progress = remote.stall = None

    def mark(self, volume: int, offset: int, length: int) -> None:
        """A client's change (see ``group.Tracker``): what is being looked at is looked at again."""
        for look in self._looks.values():
            if look.volume.index == volume:
                region = look.volume.region_size
                low = max(offset // region, look.first)
                high = min((offset + length - 1) // region, look.first + look.count - 1)
                look.touched.update(dict.fromkeys(range(low, high + 1)))

    def _go_back(self) -> dict[tuple[int, int], None]:
        """What was found behind the position that is durable is looked at, and found, again: it
        does not count yet. Returns the regions of which it was told."""
        state = self._state
        noted = state.get("noted")
        if noted is None:  # of a version that did not keep it
            state.update({key: state.get(key, 0) for key in COUNTERS})
            return {}
        found = state["found"]
        told = {(index, region): None for index, region, _ in found[noted["found"] :]}
        state.update({**noted, "found": found[: noted["found"]]})
        return told

    def _note(self, volume: int, region: int) -> None:
        """All before this position is settled."""
        state = self._state
        noted = {key: state[key] for key in COUNTERS}
        state.update(volume=volume, region=region, noted={**noted, "found": len(state["found"])})

    # -- looking -----------------------------------------------------------------------------

    async def _walk(self) -> None:
        state, volumes = self._state, self.remote.group.volumes
        loop = asyncio.get_running_loop()
        done = sum(v.size for v in volumes[: state["volume"]])
        if state["volume"] < len(volumes):
            done += state["region"] * volumes[state["volume"]].region_size
        self.progress.moved(loop.time(), done, self.progress.total_bytes - done)
        saved_at = loop.time()
        for volume in volumes[state["volume"] :]:
            for first in range(state["region"], volume.regions, self._step(volume)):
                count = min(self._step(volume), volume.regions - first)
                await self._settle(WINDOWS_MAX)
                await self._look(volume, first, count, 0)
                if loop.time() - saved_at > SAVE_SECONDS:
                    saved_at = loop.time()
                    await self._settle(0)
                    self._note(volume.index, first + count)
                    await self._save()
            await self._settle(0)
            self._note(volume.index + 1, 0)

    @staticmethod
    def _step(volume: Volume) -> int:
        return max(1, WINDOW_BYTES // volume.region_size)

    async def _settle(self, looks_max: int) -> None:
        """Returns when fewer looks are out, and, for 0, every doubt is settled."""
        while True:
            while self._doubts and len(self._looks) < WINDOWS_MAX:
                doubt = self._doubts.popleft()
                if doubt.looks > 1:
                    await asyncio.sleep(LOOK_AGAIN_SECONDS)
                await self._look(doubt.volume, doubt.region, 1, doubt.turn)
            if len(self._looks) < max(1, looks_max) and (looks_max or not self._doubts):
                return
            await self._answer()

    async def _answer(self) -> None:
        """Returns when one of the looks that are out is answered."""
        out = len(self._looks)
        await self._answers.wait(lambda: len(self._looks) < out)

    def _awaited(self) -> tuple[str, int]:
        """What is under way, for people; and which records have to be applied for it."""
        looks = self._looks.values()
        return f"{len(looks)} windows are to be verified", max(look.seq for look in looks)

    def _stalled(self, stall: Stall | None) -> None:
        self.remote.stall = stall
        if stall is not None:
            self._events.emit("verify-stalled", remote=self.remote.name, why=stall.why)
        self.remote.notify()

    async def _look(self, volume: Volume, first: int, count: int, turn: int) -> None:
        region = volume.region_size
        offset = first * region
        length = min(count * region, volume.size - offset)
        self._token += 1
        async with volume.locked(offset, length, exclusive=False):
            began = self._governor.now_ns()
            look = await self._hashed(volume, first, count, turn)
            if look is None:
                return
            self._looks[self._token] = look
            key = self._link.hash_key
            head = repl.VERIFY.pack(
                self._token, volume.index, region, offset, length, key, look.seq
            )
            sent = self._link.send(Type.VERIFY, [head, look.hashes[0]])
        self.progress.sent_bytes += sent
        await self._governor.rest(self._governor.now_ns() - began)
        await self._link.drain()
        await pay(self._bucket, length)

    async def _hashed(self, volume: Volume, first: int, count: int, turn: int) -> Look | None:
        """The hashes of each facet, from the ``turn``-th on, an empty one for what cannot be read,
        those that can first; ``None`` if none can: said, and the others go on (fault 14). The range
        is locked."""
        region = volume.region_size
        offset = first * region
        length = min(count * region, volume.size - offset)
        read: list[tuple[LocalFacet, bytes]] = []
        unread: list[tuple[LocalFacet, bytes]] = []
        for facet in volume.serving(turn):
            try:
                read.append(
                    (facet, await facet.file.hashes(offset, length, region, self._link.hash_key))
                )
            except OSError:
                facet.errors += 1
                unread.append((facet, b""))
        if not read:
            self._state["unsettled"] += count
            for one in range(first, first + count):
                self._doubt_of.pop((volume.index, one), None)
            self._events.emit("verify-unreadable", volume=volume.name, offset=offset, length=length)
            return None
        both = read + unread
        hashes, seq = [hashes for _, hashes in both], self.remote.group.log.next_seq - 1
        return Look(volume, first, count, hashes, [facet for facet, _ in both], seq)

    def on_frame(self, frame: Frame) -> None:
        """VERIFIED from the remote; PeerError if it makes no sense."""
        (token,) = frame.unpack(repl.TOKEN)
        look = self._looks.pop(token, None)
        flags = frame.payload[repl.TOKEN.size :]
        if look is None or len(flags) != look.count:
            raise PeerError(f"VERIFIED for window {token}, which is not open")
        done = 0
        for index in range(look.count):
            region = look.first + index
            known = (look.volume.index, region) in self._doubt_of
            if self._judge(look, region, index, bool(flags[index])) and not known:
                done += 1
        size = look.volume.region_size
        now = asyncio.get_running_loop().time()
        left = max(0, self.progress.total_bytes - self.progress.done_bytes - done * size)
        self.progress.moved(now, done * size, left)
        self.progress.skipped_bytes += done * size
        self._answers.came()

    def _judge(self, look: Look, region: int, index: int, differs: bool) -> bool:
        """Whether the region is settled; if not, it is looked at again."""
        key = (look.volume.index, region)
        at = slice(index * HASH_SIZE, (index + 1) * HASH_SIZE)
        alone = [hashes[at] != look.hashes[0][at] for hashes in look.hashes]
        doubt = self._doubt_of.get(key)
        if not differs and not any(alone):
            self._doubt_of.pop(key, None)
            return True
        if doubt is None:
            doubt = self._doubt_of[key] = Doubt(look.volume, region)
        doubt.looks += 1
        steady = all(facet.in_service for facet in look.facets)
        if look.count > 1 or region in look.touched or not steady:
            # Looked at by itself, and untouched, before it counts; and what a facet holds whose
            # sync has failed meanwhile is not for a verify to tell.
            doubt.seen = doubt.alone = 0
        elif differs:
            doubt.alone = 0
            doubt.seen += 1
            doubt.turn += 1
        else:
            # The remote agrees with this facet: those that do not are rotten, if they stay: of one
            # that is about to fail what was not synced may be gone already.
            doubt.alone += 1
            if doubt.alone >= SEEN_MIN:
                del self._doubt_of[key]
                rotten = [f for f, odd in zip(look.facets, alone, strict=True) if odd]
                self._found(look.volume, region, [facet.path for facet in rotten])
                return True
        if doubt.seen >= SEEN_MIN * len(look.facets):
            del self._doubt_of[key]
            self._found(look.volume, region, [])
            return True
        if doubt.looks >= LOOKS_MAX:
            del self._doubt_of[key]
            self._state["unsettled"] += 1
            return True
        self._doubts.append(doubt)
        return False

    def _found(self, volume: Volume, region: int, facets: list[str]) -> None:
        state = self._state
        state["differing"] += 1
        if len(state["found"]) >= FOUND_MAX:
            state["more_here" if facets else "more_there"] += 1
            return
        state["found"].append([volume.index, region, facets])
        if (volume.index, region) in self._told:
            return
        _, offset, length = self._place(volume.index, region)
        self._events.emit(
            "verify-differs",
            remote=self.remote.name,
            volume=volume.name,
            offset=offset,
            length=length,
            rotten=facets or None,
        )

    # -- the end -----------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Facets of this host that stood alone are repaired from their equals, then what the remote
        is to be sent is marked: to its end, though that may end the session."""
        mended = await self._mend_all() if self._state["repair"] else 0
        await to_the_end(asyncio.ensure_future(self._conclude(mended)))

    async def _mend_all(self) -> int:
        """Returns the number of regions."""
        mended = 0
        for index, region, paths in self._state["found"]:
            if paths:
                mended += await self._mend(*self._place(index, region), paths)
        return mended

    async def _conclude(self, mended: int) -> None:
        remote, state = self.remote, self._state
        repaired = mended + (await self._mark_found() if state["repair"] else 0)
        remote.facts["verified"] = {
            "finished_ns": self._clock.time_ns(),
            "started_ns": state["started_ns"],
            "differing": state["differing"],
            "unsettled": state["unsettled"],
            "repaired": repaired,
            "found": state["found"],
        }
        remote.facts["verify"] = None
        await self._save()
        self._events.emit(
            "verified",
            remote=remote.name,
            differing=state["differing"],
            unsettled=state["unsettled"],
            repaired=repaired,
        )
        remote.notify()

    async def _mark_found(self) -> int:
        """Regions of the remote are marked, and the resync that follows sends the blocks that
        differ. Returns their number."""
        remote, state = self.remote, self._state
        theirs = [(index, region) for index, region, paths in state["found"] if not paths]
        for index, region in theirs:
            remote.mark(index, *self._place(index, region)[1:])
        marked = len(theirs)
        more = state["more_there"]
        if more and not state["more_here"]:
            remote.drop.set()  # before the log may be released that the session reads
            await remote.fill("a verify found more that differs than it could remember")
            marked += more
        elif marked:
            # Where facets of this host hold more that is rotten, not all can be compared with them:
            # what was not remembered is left to the next verify.
            remote.doubt(f"a verify found {marked} regions that differ")
            await remote.sync_maps()
        if marked or remote.dirty_regions:
            remote.drop.set()  # the next handshake begins the resync
        return marked

    def _place(self, index: int, region: int) -> tuple[Volume, int, int]:
        """The volume, offset and length of a region."""
        volume = self.remote.group.volumes[index]
        offset = region * volume.region_size
        return volume, offset, min(volume.region_size, volume.size - offset)

    async def _mend(self, volume: Volume, offset: int, length: int, paths: list[str]) -> bool:
        """Rewrites a range of facets that are rotten from one that is not; whether all of them
        took it. One that did not leaves service, as after any failed write (M12)."""
        async with volume.locked(offset, length, exclusive=True):
            data = None
            for facet in volume.serving():
                if facet.path not in paths and data is None:
                    with contextlib.suppress(OSError):
                        found = await facet.file.read(offset, length)
                        data = found if facet.in_service else None
            if data is None:
                return False
            lost = []
            for facet in volume.serving():
                if facet.path in paths:
                    try:
                        facet.pwrite(offset, data)
                        await facet.sync()
                    except OSError as error:
                        facet.fail("write", error)
                        lost.append(facet)
                    except DiskFailed:
                        lost.append(facet)
        for facet in lost:
            await self.remote.group.facet_lost(volume, facet)
        return not lost


def is_due(remote: Remote, now_ns: int) -> bool:
    """Whether a verify was asked for, or the interval is over; and the facets hold, here and there,
    what clients read."""
    facts = remote.facts
    if not facts["consistent"] or remote.put_off:
        return False
    if any(volume.overlay for volume in remote.group.volumes):
        return False
    interval = facts.get("verify_interval") or 0.0
    if facts.get("verify") is None and interval:
        last = (facts.get("verified") or {}).get("finished_ns", 0)
        # One that ended while the clock was far ahead does not put off the next for so long.
        if abs(now_ns - last) >= interval * 1e9:
            facts["verify"] = request(bool(facts.get("verify_repair")), now_ns)
    return facts.get("verify") is not None


def request(repair: bool, now_ns: int) -> dict[str, Any]:
    """The facts of a verify that is to begin."""
    return {
        "volume": 0,
        "region": 0,
        "repair": repair,
        "started_ns": now_ns,
        "found": [],
        **COUNTERS,
        "noted": {**COUNTERS, "found": 0},
    }
