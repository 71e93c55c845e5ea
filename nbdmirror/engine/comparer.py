"""The secondary's answers to HASHES and VERIFY: what differs here, and its blocks' hashes (X1).

Works beside the handling of frames, one window after the other, so that records do not wait for
hashes. That a record, or a copy, comes between is harmless: every record that is newer than the
primary's hashes follows in the stream and is applied over whatever was found to be the same.

A VERIFY waits until the records that it names are applied; whether later ones came between, the
primary knows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from nbdmirror.codec import repl
from nbdmirror.codec.hashing import BLOCK, HASH_SIZE, different
from nbdmirror.codec.regions import Hashes, block_hashes_size
from nbdmirror.codec.repl import Type
from nbdmirror.config import FRAME_BYTES_MIN
from nbdmirror.engine.link import Link
from nbdmirror.engine.secondary import Secondary
from nbdmirror.errors import PeerError
from nbdmirror.ports import Buffer

WINDOW_BYTES_MAX = 64 << 20
"""Of one HASHES: what is read for it, and its answer, are bounded (I6); a primary's are shorter."""
QUEUE_MAX = 4096
"""Windows that wait; a primary that follows its own bounds has far fewer under way."""


class Comparer:
    """The comparisons of one connection."""

    def __init__(self, secondary: Secondary, link: Link) -> None:
        self._secondary = secondary
        self._link = link
        self._queue: deque[Hashes] = deque()
        self._arrived = asyncio.Event()
        self._applied = asyncio.Event()

    def put(self, hashes: Hashes) -> None:
        """Compares this in its turn; PeerError if that cannot be meant."""
        secondary = self._secondary
        secondary.check_range(hashes.volume, hashes.offset, hashes.length)
        region = secondary.volumes[hashes.volume].region_size
        if hashes.region_size != region or hashes.offset % region:
            raise PeerError(f"HASHES of regions of {hashes.region_size} bytes at {hashes.offset}")
        if hashes.length > WINDOW_BYTES_MAX:
            raise PeerError(f"HASHES of {hashes.length} bytes, the limit is {WINDOW_BYTES_MAX}")
        if len(self._queue) >= QUEUE_MAX:
            raise PeerError(f"more than {QUEUE_MAX} windows to compare")
        if not hashes.verify:
            secondary.check_resyncing()
        self._queue.append(hashes)
        self._arrived.set()

    def moved(self) -> None:
        """More records are applied."""
        self._applied.set()

    async def run(self, compared: Callable[[int], None]) -> None:
        """Until cancelled; DiskFailed if this node's disk cannot be read. ``compared`` is called
        with the token of each window."""
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            hashes = self._queue.popleft()
            await self._link.room()  # who does not read the answers gets no more of them
            if hashes.verify:
                await self._verify(hashes)
            elif await self._compare(hashes):
                compared(hashes.token)

    async def _verify(self, hashes: Hashes) -> None:
        secondary = self._secondary
        while secondary.applied_seq < hashes.seq:
            self._applied.clear()
            await self._applied.wait()
        ours = await secondary.hashes(
            hashes.volume, hashes.offset, hashes.length, hashes.region_size, hashes.key
        )
        if self._link.cause is None:
            flags = different(ours, hashes.hashes)
            self._link.send(Type.VERIFIED, [repl.TOKEN.pack(hashes.token), flags])

    async def _compare(self, hashes: Hashes) -> bool:
        """Whether there was somebody to answer."""
        secondary, volume, region = self._secondary, hashes.volume, hashes.region_size
        flags = bytearray(b"\1" * hashes.count)
        if hashes.hashes:
            ours = await secondary.hashes(volume, hashes.offset, hashes.length, region, hashes.key)
            flags = different(ours, hashes.hashes)
        answer: list[Buffer] = [repl.TOKEN.pack(hashes.token), flags]
        end = hashes.offset + hashes.length
        for first, last in _wanted(flags):
            at = hashes.offset + first * region
            length = min(hashes.offset + last * region, end) - at
            if block_hashes_size(length, region):
                answer.append(await secondary.hashes(volume, at, length, BLOCK, hashes.key))
        if self._link.cause is not None:
            return False
        self._link.send(Type.WANT, answer)
        return True


def _wanted(flags: bytearray) -> list[tuple[int, int]]:
    """(first, last + 1) stretches of regions that are wanted."""
    runs = []
    at = flags.find(1)
    while at >= 0:
        end = flags.find(0, at)
        end = len(flags) if end < 0 else end
        runs.append((at, end))
        at = flags.find(1, end)
    return runs


assert HASH_SIZE * WINDOW_BYTES_MAX // BLOCK + WINDOW_BYTES_MAX // BLOCK < FRAME_BYTES_MIN
