"""Reads through a remote, for when no local facet can serve (M5, M11).

A remote answers with what its facets hold and with the seq up to which they are known to hold
everything. What the log has after that is laid over the answer, in order: a record that was in
already changes nothing. So the log is kept from there on while somebody depends on this
(``engine.housekeeper``).
"""

from __future__ import annotations

import asyncio
import itertools

from nbdmirror.codec import repl
from nbdmirror.codec.record import MARK
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.engine.link import Link
from nbdmirror.engine.log import Cursor, Log
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import PeerError
from nbdmirror.ports import Buffer

READ_BYTES_MAX = 1 << 20
"""A longer read is asked for in pieces."""


class RemoteReads:
    """The reads under way on one session's link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._tokens = itertools.count(1)
        self._waiting: dict[int, tuple[int, asyncio.Future[tuple[int, memoryview]]]] = {}

    async def read(self, volume: int, offset: int, length: int) -> tuple[int, memoryview]:
        """(seq, bytes): what the remote's facets hold, with every record up to seq.

        ConnectionError if the link is gone, OSError if the remote cannot read it."""
        token = next(self._tokens)
        future: asyncio.Future[tuple[int, memoryview]] = asyncio.get_running_loop().create_future()
        self._waiting[token] = length, future
        try:
            self._link.send(Type.READ, [repl.READ.pack(token, volume, 0, offset, length)])
            return await future
        finally:
            del self._waiting[token]

    def on_frame(self, frame: Frame) -> None:
        """An answer; PeerError if nobody asked for it."""
        token, seq, number = frame.unpack(repl.DATA)
        data = frame.payload[repl.DATA.size :]
        length, future = self._waiting.get(token, (0, None))
        if future is None or future.done():
            return  # who asked does not wait any more
        if number:
            _fail(future, OSError(number, "the remote's disk failed"))
        elif len(data) != length:
            raise PeerError(f"DATA of {len(data)} bytes for a read of {length}")
        else:
            future.set_result((seq, data))

    def close(self) -> None:
        """The link is gone."""
        for _, future in self._waiting.values():
            if not future.done():
                _fail(future, ConnectionResetError("the link to the remote is lost"))


def _fail(future: asyncio.Future[tuple[int, memoryview]], error: OSError) -> None:
    future.set_exception(error)
    future.exception()  # who is cancelled by now never looks


class Behind(Exception):
    """The remote's facets are older than what the log holds: a little later they are not, unless
    its applying is held back."""


async def read_through(remote: Remote, volume: Volume, offset: int, length: int) -> Buffer:
    """The range as it is after the last record of the log, from one remote.

    Behind, ConnectionError and OSError say that it cannot be had there now."""
    parts = []
    for at in range(offset, offset + length, READ_BYTES_MAX):
        size = min(READ_BYTES_MAX, offset + length - at)
        if remote.reads is None:
            raise ConnectionResetError("the link to the remote is lost")
        seq, data = await remote.reads.read(volume.index, at, size)
        parts.append(await overlay(remote.group.log, volume.index, at, data, seq))
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def overlay(log: Log, volume: int, offset: int, data: Buffer, seq: int) -> Buffer:
    """``data`` with all that the log holds after ``seq`` done to it; Behind if that is not all."""
    cursor = Cursor(seq + 1)
    result: bytearray | None = None
    end = offset + len(data)
    while cursor.seq < log.next_seq:
        if cursor.seq < log.ring.tail_seq:
            raise Behind("it has yet to apply what the log does not hold any more")
        for record in (await log.read(cursor)).parsed():
            start, stop = max(record.offset, offset), min(record.offset + record.length, end)
            if record.volume != volume or start >= stop or record.kind == MARK:
                continue
            if result is None:
                result = bytearray(data)
            piece: Buffer = bytes(stop - start)
            if record.payload is not None:
                piece = memoryview(record.payload)[start - record.offset : stop - record.offset]
            result[start - offset : stop - offset] = piece
    return data if result is None else result
