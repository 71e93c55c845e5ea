"""A resync, as the primary runs it: marked regions stream to the remote, unordered (V6, M16).

Runs beside the shipping of records, on the same link: new writes go through the log meanwhile, so
it converges at any write rate (X3). Regions are read under the range lock that writes take, and
queued before it is released, so every record that is newer than the copy follows it (O13). A bit
is cleared when the remote has the region on disk (O7), and never if it was marked again (O6).

Where it is doubtful that regions differ (``compare``), their hashes go first and only what the
remote wants follows. Holes travel as holes.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nbdmirror.codec import repl
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.config import ReplicationConfig
from nbdmirror.engine.link import Link
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.remote import Remote, ResyncProgress
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import PeerError, VolumeFailed

COPY_BYTES = 1 << 20
"""A stretch of marked regions is copied in pieces of at most this (or one region)."""
COMPARE_BYTES = 4 << 20
"""... and compared in pieces of at most this."""
HOLE_REGION_BYTES = 64
"""What a region of a hole counts for in the window of what is under way."""
RETRY_SECONDS = 10.0
"""Regions that the facet could not give are tried again so often."""
HOLE_BYTES = 1 << 30
"""... and cleared, where it is a hole, in pieces of at most this."""


@dataclass(slots=True)
class Window:
    """Consecutive regions that are on their way."""

    volume: Volume
    first: int
    count: int
    size: int
    hashed: bool


class Resync:
    """Copies what the remote's DCMs mark, until they are empty and the remote consistent."""

    def __init__(
        self,
        remote: Remote,
        link: Link,
        store: Store,
        tuning: ReplicationConfig,
        compress: bool,
    ) -> None:
        self.remote = remote
        self._link = link
        self._store = store
        self._tuning = tuning
        self._compress = compress
        self._compare = bool(remote.facts["compare"])
        self._windows: dict[int, Window] = {}
        self._in_flight = 0
        self._token = 0
        self._wanted: deque[tuple[Volume, int]] = deque()
        self._progressed = asyncio.Event()
        self._end_seq: int | None = None
        self._failed_reads: str | None = None
        kind = "full" if remote.facts["full"] else "dcm"
        self.progress = ResyncProgress(kind, remote.dirty_bytes)
        remote.progress = self.progress

    async def run(self) -> None:
        """Returns when the remote has confirmed, durably, that it is consistent."""
        remote = self.remote
        while True:
            for volume, dcm in zip(remote.group.volumes, remote.dcms, strict=True):
                await self._pass(volume, dcm)
            while self._windows or self._wanted:
                await self._send_wanted()
                await self._wait_progress(lambda: not self._windows or bool(self._wanted))
            if remote.dirty_regions == 0:
                break
            if self._failed_reads is not None:
                remote.stall, self._failed_reads = self._failed_reads, None
                await asyncio.sleep(RETRY_SECONDS)
        self._end_seq = remote.group.log.next_seq - 1
        self._link.send(Type.RESYNC_END, [repl.SEQ.pack(self._end_seq)])
        await self._wait_progress(lambda: self._end_seq is None)
        await self._finish()

    async def _finish(self) -> None:
        remote = self.remote
        remote.facts.update(full=False, compare=False, consistent=True, why=None)
        if remote.dirty_regions == 0:
            for dcm in remote.dcms:
                if dcm.map.default:
                    dcm.clear()
        remote.save_defaults()
        await remote.sync_maps()
        await self._store.save()
        remote.progress = remote.stall = None
        remote.notify()

    # -- walking -----------------------------------------------------------------------------

    async def _pass(self, volume: Volume, dcm: DcmFile) -> None:
        """One walk over a volume's marked regions, from its start to its end."""
        at = 0
        while True:
            run = next(dcm.map.runs(at), None)
            if run is None:
                return
            first, count = run
            at = first + await self._stretch(volume, first, count)

    async def _stretch(self, volume: Volume, first: int, count: int) -> int:
        """Handles the start of a marked stretch; returns how many regions that was."""
        await self._send_wanted()
        region = volume.region_size
        offset = first * region
        span = min(count * region, max(HOLE_BYTES, region), volume.size - offset)
        pieces = volume.allocation(offset, span)
        if pieces[0][2]:
            # Whole regions only: a region that is partly data is copied.
            hole = pieces[0][1] // region if pieces[0][1] < span else -(-span // region)
            if hole:
                await self._send_hole(volume, first, hole)
                return hole
        size_max = COMPARE_BYTES if self._compare else COPY_BYTES
        count = min(count, max(1, size_max // region))
        try:
            if self._compare:
                await self._send_hashes(volume, first, count)
            else:
                await self._send_copy(volume, first, count)
        except VolumeFailed as error:
            self._unreadable(error)
        return count

    def _unreadable(self, error: VolumeFailed) -> None:
        """The regions of the last window stay marked; the others go on (fault 14)."""
        window = self._windows.pop(self._token)
        self._in_flight -= window.size
        self._failed_reads = error.message

    def _open(self, volume: Volume, first: int, count: int, *, hashed: bool = False) -> int:
        """Registers a window that is about to be read; the caller holds the range lock."""
        self._token += 1
        length = self._length(volume, first, count)
        self._windows[self._token] = Window(volume, first, count, length, hashed)
        self._in_flight += length
        dcm = self.remote.dcms[volume.index].map
        for region in range(first, first + count):
            dcm.begin(region, self._token)
        return self._token

    @staticmethod
    def _length(volume: Volume, first: int, count: int) -> int:
        offset = first * volume.region_size
        return min(count * volume.region_size, volume.size - offset)

    async def _send_hole(self, volume: Volume, first: int, count: int) -> None:
        await self._wait_window()
        offset, length = first * volume.region_size, self._length(volume, first, count)
        async with volume.locked(offset, length, exclusive=False):
            if not all(piece[2] for piece in volume.allocation(offset, length)):
                return  # written to meanwhile: the walk comes by again
            token = self._open(volume, first, count)
            # It costs the link nothing, but memory here.
            self._windows[token].size = size = count * HOLE_REGION_BYTES
            self._in_flight += size - length
            head = repl.REGION.pack(token, volume.index, repl.ZEROS, offset, length)
            self._count(self._link.send(Type.REGION, [head]), length)
        await self._link.drain()

    async def _send_copy(self, volume: Volume, first: int, count: int) -> None:
        await self._wait_window()
        offset, length = first * volume.region_size, self._length(volume, first, count)
        async with volume.locked(offset, length, exclusive=False):
            token = self._open(volume, first, count)
            end = offset + length
            for at in range(offset, end, COPY_BYTES):
                size = min(COPY_BYTES, end - at)
                data = await volume.read(at, size)
                flags = repl.MORE if at + size < end else 0
                head = repl.REGION.pack(token, volume.index, flags, at, size)
                sent = self._link.send(Type.REGION, [head, data], compress=self._compress)
                self._count(sent, 0)
        await self._link.drain()

    async def _send_hashes(self, volume: Volume, first: int, count: int) -> None:
        await self._wait_window()
        region = volume.region_size
        offset, length = first * region, self._length(volume, first, count)
        hashes = []
        async with volume.locked(offset, length, exclusive=False):
            token = self._open(volume, first, count, hashed=True)
            for at in range(offset, offset + length, region):
                data = await volume.read(at, min(region, offset + length - at))
                hashes.append(hashlib.sha256(data).digest()[: repl.HASH_SIZE])
                await asyncio.sleep(0)  # hashing must not hold up requests
            head = repl.HASHES.pack(token, volume.index, region, offset, length)
            self._count(self._link.send(Type.HASHES, [head, *hashes]), 0)
        await self._link.drain()

    async def _send_wanted(self) -> None:
        """Copies regions whose hashes differed."""
        while self._wanted:
            volume, first = self._wanted.popleft()
            count = 1
            limit = max(1, COPY_BYTES // volume.region_size)
            while count < limit and self._wanted and self._wanted[0] == (volume, first + count):
                self._wanted.popleft()
                count += 1
            try:
                await self._send_copy(volume, first, count)
            except VolumeFailed as error:
                self._unreadable(error)

    def _count(self, sent: int, skipped: int) -> None:
        self.progress.sent_bytes += sent
        self.progress.skipped_bytes += skipped
        self.remote.bytes_sent += sent

    # -- bounds ------------------------------------------------------------------------------

    async def _wait_window(self) -> None:
        await self._wait_progress(lambda: self._in_flight < self._tuning.window_bytes)

    async def _wait_progress(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self._progressed.clear()
            await self._progressed.wait()

    # -- answers -----------------------------------------------------------------------------

    def on_frame(self, frame: Frame) -> None:
        """WANT, DONE and CONSISTENT from the remote; PeerError if they make no sense."""
        if frame.type is Type.WANT:
            self._on_want(frame)
        elif frame.type is Type.DONE:
            for (token,) in repl.TOKEN.iter_unpack(frame.payload[: len(frame.payload) // 8 * 8]):
                self._on_done(token)
        else:
            (seq,) = frame.unpack(repl.SEQ)
            if seq != self._end_seq:
                raise PeerError(f"CONSISTENT at {seq}, asked was {self._end_seq}")
            self._end_seq = None
        self._progressed.set()

    def _on_want(self, frame: Frame) -> None:
        (token,) = frame.unpack(repl.TOKEN)
        window = self._windows.get(token)
        flags = frame.payload[repl.TOKEN.size :]
        if window is None or not window.hashed or len(flags) != window.count:
            raise PeerError(f"WANT for window {token}, which is not open")
        window.hashed = False
        region = window.volume.region_size
        differing = 0
        for index, flag in enumerate(flags):
            if flag:
                self._wanted.append((window.volume, window.first + index))
                # The copy that follows finishes the region, not this comparison.
                self.remote.dcms[window.volume.index].map.begin(window.first + index, 0)
                differing += self._length(window.volume, window.first + index, 1)
        self.progress.skipped_bytes += self._length(
            window.volume, window.first, window.count
        ) - min(differing, window.count * region)

    def _on_done(self, token: int) -> None:
        window = self._windows.pop(token, None)
        if window is None:
            raise PeerError(f"DONE for window {token}, which is not open")
        if window.hashed:
            raise PeerError(f"DONE for window {token} before its WANT")
        self._in_flight -= window.size
        dcm = self.remote.dcms[window.volume.index]
        before = dcm.map.count
        for region in range(window.first, window.first + window.count):
            dcm.finish(region, token)
        done = (before - dcm.map.count) * window.volume.region_size
        self.progress.done_bytes += done
        self.progress.meter.add(asyncio.get_running_loop().time(), done)
