"""Answers a primary that has no local facet left: what this secondary's facets hold (M11)."""

from __future__ import annotations

import asyncio

from nbdmirror.codec import repl
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.config import FRAME_BYTES_MIN
from nbdmirror.engine.link import Link
from nbdmirror.engine.secondary import Secondary
from nbdmirror.errors import PeerError

READS_MAX = 64
READ_BYTES_MAX = 16 << 20
"""Reads under way at a time, and what they read; the connection waits beyond that (I6)."""
EIO = 5


class ReadServer:
    """The reads of one connection."""

    def __init__(self, secondary: Secondary, link: Link) -> None:
        self._secondary = secondary
        self._link = link
        self._under_way: dict[asyncio.Task[None], int] = {}
        """How much each reads."""

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """What runs; to be ended with the connection."""
        return list(self._under_way)

    async def on_frame(self, frame: Frame) -> None:
        """A READ; PeerError if it is out of bounds."""
        token, volume, _, offset, length = frame.unpack(repl.READ)
        self._secondary.check_range(volume, offset, length)
        if length > FRAME_BYTES_MIN - repl.DATA.size:
            raise PeerError(f"READ of {length} bytes")
        while len(self._under_way) >= READS_MAX or self._bytes() > READ_BYTES_MAX - length:
            await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.ensure_future(self._answer(token, volume, offset, length))
        self._under_way[task] = length
        task.add_done_callback(lambda done: self._under_way.pop(done, None))

    def _bytes(self) -> int:
        return sum(self._under_way.values())

    async def _answer(self, token: int, volume: int, offset: int, length: int) -> None:
        secondary = self._secondary
        if not await self._link.room():  # who does not read the answers gets no more of them
            return
        # Known before the read: records that come in beside it may be in the answer or not.
        seq, number, parts = secondary.applied_seq, 0, []
        try:
            parts = [await secondary.volumes[volume].source().read(offset, length)]
        except OSError as error:
            number = error.errno or EIO
        if self._link.cause is None:
            self._link.send(Type.DATA, [repl.DATA.pack(token, seq, number), *parts])
