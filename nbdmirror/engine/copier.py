"""Regions on their way to a remote: read, compared, sent, acknowledged (M16, O6, O7, O13).

A window is some consecutive regions under one token. Regions are read under the range lock that
writes take, and queued before it is released, so every record that is newer than the copy follows
it (O13). A bit is cleared when the remote has the region on disk (O7), and never if it was marked
again meanwhile (O6). What is under way is bounded.

A window is either copied at once, or compared first: the remote answers with which regions differ
and with the hashes of their blocks, and only blocks that differ travel. Zeros travel as holes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nbdmirror.codec import repl
from nbdmirror.codec.hashing import BLOCK, different, zero_runs
from nbdmirror.codec.regions import EXTENTS_MAX, Extent, block_hashes_size, pack_region
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.core.bucket import Bucket
from nbdmirror.core.payoff import Payoff
from nbdmirror.core.progress import Progress
from nbdmirror.engine.answers import Answers
from nbdmirror.engine.governor import Governor
from nbdmirror.engine.link import Link
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import PeerError, VolumeFailed
from nbdmirror.ports import Buffer

COPY_BYTES = 1 << 20
"""Regions are copied in windows of at most this (or one region) ..."""
COMPARE_BYTES = 16 << 20
"""... and compared in windows of this: what a thread costs to be asked is the same ..."""
YIELDING_BYTES = 128 << 10
"""... both of this while clients are active ..."""
SMALL_BYTES = 16 << 10
"""Reads up to this are not worth a thread."""
COPY_SECONDS = 0.25
"""... and of what is acknowledged in so long: a slow link that is lost again makes progress;"""
COMPARE_SECONDS = 0.1
"""... or compared in so long: a client that comes may have to wait for the range."""
HASHED_COST = 4
"""A window that is compared counts for this part of its size in what is under way."""
HOLE_COST = 64
"""What a region of a hole counts for."""


@dataclass(slots=True)
class Window:
    """Consecutive regions that are on their way. ``cost`` counts against the bound."""

    volume: Volume
    first: int
    count: int
    cost: int
    hashed: bool
    done: int
    """Bytes of the volume that are done with when it is acknowledged."""


Wanted = tuple[Volume, int, Buffer | None]
"""A region to copy, with the block hashes of what the remote has, if it sent them."""


class Copier:
    """The windows of one resync."""

    def __init__(
        self,
        remote: Remote,
        link: Link,
        window_bytes: int,
        governor: Governor,
        compress: bool,
        progress: Progress,
    ) -> None:
        self.remote = remote
        self.progress = progress
        self.answers = Answers(remote, self._awaited)
        self.failed_reads: str | None = None
        self.waited_seconds = 0.0
        """How long the link, or the remote behind it, was what all waited for."""
        self.compare_pays = Payoff()
        self._packing_pays = Payoff()
        self._link = link
        self._window_bytes = window_bytes
        self._governor = governor
        self._compress = compress
        self._windows: dict[int, Window] = {}
        self._in_flight = 0
        self._token = 0
        self._wanted: deque[Wanted] = deque()
        self._unpaid = 0

    # -- bounds ------------------------------------------------------------------------------

    def size(self, region_size: int, limit: int = COPY_BYTES, seconds: float = COPY_SECONDS) -> int:
        """Regions that a window should have now."""
        return max(1, self.window_size(limit, seconds) // region_size)

    def window_size(self, limit: int = COPY_BYTES, seconds: float = COPY_SECONDS) -> int:
        """Bytes of the volume that a window should have now: one region, if that is more."""
        size = limit
        if self._governor.active() or not self.progress.done_bytes:
            size = YIELDING_BYTES
        rate = self.progress.rate(asyncio.get_running_loop().time())
        return min(size, int(rate * seconds)) if rate else size

    async def drained(self) -> None:
        """Returns when nothing is under way."""
        while self._windows or self._wanted:
            await self.send_wanted()
            await self.wait(lambda: not self._windows or bool(self._wanted))

    async def _room(self) -> None:
        await self.wait(lambda: self._in_flight < self._window_bytes)

    async def _drain(self) -> None:
        with self._waiting():
            await self._link.drain()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """What is awaited within is the link, or the remote behind it."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            self.waited_seconds += loop.time() - began

    async def wait(self, ready: Callable[[], bool]) -> None:
        """Returns when an answer has made ``ready`` true."""
        with self._waiting():
            await self.answers.wait(ready)

    def _awaited(self) -> tuple[str, int]:
        """What is under way, for people; and which records have to be applied for it."""
        if self._in_flight:
            return f"{self._in_flight} bytes are under way", 0
        return "all is copied", self.remote.group.log.next_seq - 1

    # -- windows -----------------------------------------------------------------------------

    @staticmethod
    def length(volume: Volume, first: int, count: int) -> int:
        """The bytes of some regions; the volume's last one may be short."""
        return min(count * volume.region_size, volume.size - first * volume.region_size)

    def _open(self, volume: Volume, first: int, count: int, cost: int, *, hashed: bool) -> int:
        """Registers a window that is about to be read; the caller holds the range lock."""
        self._token += 1
        length = self.length(volume, first, count)
        self._windows[self._token] = Window(volume, first, count, cost, hashed, length)
        self._in_flight += cost
        self.remote.dcms[volume.index].map.begin(first, count, self._token)
        return self._token

    def _unreadable(self, error: VolumeFailed) -> None:
        """The regions of the last window stay marked; the others go on (fault 14)."""
        window = self._windows.pop(self._token)
        self._in_flight -= window.cost
        self.failed_reads = error.message

    async def hole(self, volume: Volume, first: int, count: int) -> None:
        """Regions that are a hole here: zeros there, whatever their number."""
        await self._room()
        offset, length = first * volume.region_size, self.length(volume, first, count)
        async with volume.locked(offset, length, exclusive=False):
            if not all(piece[2] for piece in volume.allocation(offset, length)):
                return  # written to meanwhile: the walk comes by again
            # It costs the link nothing, but memory here.
            token = self._open(volume, first, count, count * HOLE_COST, hashed=False)
            payload = pack_region(token, volume.index, [(offset, length, None)], more=False)
            self._sent(self._link.send(Type.REGION, payload))
            self.progress.skipped_bytes += length
        await self._drain()

    async def compare(self, volume: Volume, first: int, count: int, *, ask: bool) -> None:
        """Sends the hashes of regions; with ``ask`` none: they are known to differ, and only the
        hashes of the remote's blocks are wanted."""
        await self._room()
        region = volume.region_size
        offset, length = first * region, self.length(volume, first, count)
        async with volume.locked(offset, length, exclusive=False):
            began = self._governor.now_ns()
            cost = max(1, length // HASHED_COST)
            token = self._open(volume, first, count, cost, hashed=True)
            hashes: Buffer = b""
            key = self._link.hash_key
            if not ask:
                try:
                    hashes = await volume.hashes(offset, length, region, key)
                except VolumeFailed as error:
                    self._unreadable(error)
                    return
            head = repl.HASHES.pack(token, volume.index, region, offset, length, key)
            self._sent(self._link.send(Type.HASHES, [head, hashes]))
        await self._governor.rest(self._governor.now_ns() - began)
        await self._drain()
        await self.pay()

    async def copy(self, volume: Volume, first: int, theirs: list[Buffer | None]) -> None:
        """Sends a region for each entry of ``theirs``: its blocks that differ from those hashes,
        or all of it."""
        await self._room()
        offset = first * volume.region_size
        length = self.length(volume, first, len(theirs))
        async with volume.locked(offset, length, exclusive=False):
            began = self._governor.now_ns()
            token = self._open(volume, first, len(theirs), length, hashed=False)
            try:
                runs = await self._runs(volume, offset, length, theirs)
                await self._send(token, volume, runs)
            except VolumeFailed as error:
                self._unreadable(error)
                return
        await self._governor.rest(self._governor.now_ns() - began)
        await self._drain()
        await self.pay()

    async def _runs(
        self, volume: Volume, offset: int, length: int, theirs: list[Buffer | None]
    ) -> list[tuple[int, int]]:
        """The (offset, length) runs that have to travel."""
        known = [hashes for hashes in theirs if hashes is not None]
        if len(known) < len(theirs):
            return [(offset, length)]
        ours = await volume.hashes(offset, length, BLOCK, self._link.hash_key)
        flags = different(ours, b"".join(known))
        runs: list[tuple[int, int]] = []
        at = flags.find(1)
        while at >= 0:
            end = flags.find(0, at)
            end = len(flags) if end < 0 else end
            runs.append((offset + at * BLOCK, min(end * BLOCK, length) - at * BLOCK))
            at = flags.find(1, end)
        travels = sum(size for _, size in runs)
        self.progress.skipped_bytes += length - travels
        self.compare_pays.result(travels <= length * 3 // 4)
        return runs

    async def _send(self, token: int, volume: Volume, runs: list[tuple[int, int]]) -> None:
        """Reads the runs and queues them as few frames, of which the last ends the token."""
        extents: list[Extent] = []
        size = 0
        for offset, length in runs:
            for at in range(offset, offset + length, COPY_BYTES):
                count = min(COPY_BYTES, offset + length - at)
                data: Buffer | None = volume.try_read(at, count) if count <= SMALL_BYTES else None
                if data is None:
                    data = await volume.read_aside(at, count)
                if size and (size + count > COPY_BYTES or len(extents) > EXTENTS_MAX // 2):
                    self._send_extents(token, volume, extents, more=True)
                    extents, size = [], 0
                view = memoryview(data)
                for start, part, zeros in zero_runs(view):
                    extents.append((at + start, part, None if zeros else view[start:][:part]))
                size += count
        self._send_extents(token, volume, extents, more=False)

    def _send_extents(
        self, token: int, volume: Volume, extents: list[Extent], *, more: bool
    ) -> None:
        payload = pack_region(token, volume.index, extents, more=more)
        compress = self._compress and self._packing_pays.worth()
        sent = self._link.send(Type.REGION, payload, compress=compress)
        if compress:
            self._packing_pays.result(sent < sum(map(len, payload)))
        self.progress.skipped_bytes += sum(size for _, size, data in extents if data is None)
        self._sent(sent)

    async def send_wanted(self) -> None:
        """Copies regions that were found to differ."""
        while self._wanted:
            volume, first, hashes = self._wanted.popleft()
            theirs = [hashes]
            limit = self.size(volume.region_size)
            while len(theirs) < limit and self._wanted:
                following, region, hashes = self._wanted[0]
                if following is not volume or region != first + len(theirs):
                    break
                self._wanted.popleft()
                theirs.append(hashes)
            await self.copy(volume, first, theirs)

    def _sent(self, size: int) -> None:
        self.progress.sent_bytes += size
        self.remote.bytes_sent += size
        self._unpaid += size

    async def pay(self) -> None:
        """Waits as long as the remote's ``max_rate`` asks for."""
        size, self._unpaid = self._unpaid, 0
        with self._waiting():
            await pay(self.remote.bucket, size)

    # -- answers -----------------------------------------------------------------------------

    def on_want(self, frame: Frame) -> None:
        """Which regions of a HASHES differ; PeerError if it makes no sense."""
        (token,) = frame.unpack(repl.TOKEN)
        window = self._windows.get(token)
        answer = frame.payload[repl.TOKEN.size :]
        if window is None or not window.hashed or len(answer) < window.count:
            raise PeerError(f"WANT for window {token}, which is not open")
        window.hashed = False
        at = window.count
        dcm = self.remote.dcms[window.volume.index].map
        for index, flag in enumerate(answer[: window.count]):
            if not flag:
                continue
            region = window.first + index
            length = self.length(window.volume, region, 1)
            size = block_hashes_size(length, window.volume.region_size)
            hashes = answer[at : at + size] if size else None
            at += size
            self._wanted.append((window.volume, region, hashes))
            # The copy that follows finishes the region, not this comparison.
            dcm.begin(region, 1, 0)
            window.done -= length
        if at != len(answer):
            raise PeerError(f"WANT of {len(answer)} bytes, not {at}")
        self.progress.skipped_bytes += window.done
        paid = window.done * 4 >= self.length(window.volume, window.first, window.count)
        if paid or at == window.count:  # else it depends on the blocks
            self.compare_pays.result(paid)

    def on_done(self, token: int) -> None:
        """The remote has the window on disk; PeerError if there is no such window."""
        window = self._windows.pop(token, None)
        if window is None:
            raise PeerError(f"DONE for window {token}, which is not open")
        if window.hashed:
            raise PeerError(f"DONE for window {token} before its WANT")
        self._in_flight -= window.cost
        self.remote.dcms[window.volume.index].finish(window.first, window.count, token)
        now = asyncio.get_running_loop().time()
        self.progress.moved(now, window.done, self.remote.dirty_bytes)


async def pay(bucket: Bucket, size: int) -> None:
    """Waits as long as a cap asks for after ``size`` bytes."""
    seconds = bucket.take(asyncio.get_running_loop().time(), size)
    if seconds > 0:
        await asyncio.sleep(seconds)
