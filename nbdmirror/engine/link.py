"""One replication connection: frames in, frames out, one teardown path.

Used by both ends. A frame that breaks the protocol, a timeout or a failed handler all end in
``close(cause)``; the first cause stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from nbdmirror.codec import repl
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.config import Limits
from nbdmirror.errors import NbdmirrorError, PeerError
from nbdmirror.ports import Buffer


class Link(asyncio.BufferedProtocol):
    """A connection that carries frames; ``on_frame`` is called for each, in order."""

    def __init__(self, on_frame: Callable[[Frame], None], limits: Limits) -> None:
        self._on_frame = on_frame
        self._reader = repl.FrameReader(limits)
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self.session = 0
        self.hash_key = b""
        """The primary's for this connection (``codec.hashing``); a secondary learns it by frame."""
        self.cause: BaseException | None = None
        self.closed = asyncio.Event()
        self.bytes_sent = 0
        self.last_received = 0.0
        self.reading = True

    # -- transport callbacks -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        # A cast, not an assert: uvloop's transports are not subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        if self.cause is not None:  # there was no room for it
            self._transport.abort()
        self._writable.set()
        self.last_received = asyncio.get_running_loop().time()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport puts what comes in."""
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Handles every frame that is complete."""
        self.last_received = asyncio.get_running_loop().time()
        try:
            for frame in self._reader.received(nbytes):
                if self.cause is not None:
                    return
                if self.session and frame.session != self.session:
                    raise PeerError(f"frame of session {frame.session:x}, this is {self.session:x}")
                self._on_frame(frame)
        except NbdmirrorError as error:
            self.close(error)

    def eof_received(self) -> bool:
        """The peer hung up: close."""
        return False

    def pause_writing(self) -> None:
        """The transport's buffer is full."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The transport's buffer has room again."""
        self._writable.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is gone; wakes everybody who waits on it."""
        if self.cause is None:
            self.cause = exc or ConnectionResetError("the peer closed the connection")
        self._transport = None
        # Who heard it holds this link, and so does what a cause came by: cycles that are collected
        # late, with what they hold of the last frames (I6). A defect is still to be told in full.
        self._on_frame = _unheard
        if isinstance(self.cause, NbdmirrorError | OSError):
            self.cause.__traceback__ = None
        self._writable.set()
        self.closed.set()

    # -- use ---------------------------------------------------------------------------------

    def send(self, kind: Type, parts: list[Buffer], *, compress: bool = False) -> int:
        """Queues a frame; returns its size in bytes. ConnectionError if the link is gone."""
        if self._transport is None or self.cause is not None:
            raise ConnectionResetError(str(self.cause))
        frame = repl.encode(kind, self.session, parts, compress=compress)
        size = sum(map(len, frame))
        self._transport.writelines(frame)
        self.bytes_sent += size
        return size

    def send_json(self, kind: Type, value: dict[str, object]) -> None:
        """Queues a frame that carries a JSON object."""
        if self._transport is None or self.cause is not None:
            raise ConnectionResetError(str(self.cause))
        frame = b"".join(repl.encode_json(kind, self.session, value))
        self._transport.write(frame)
        self.bytes_sent += len(frame)

    async def room(self) -> bool:
        """Returns when the transport takes more, or the link is gone: whether it is there."""
        await self._writable.wait()
        return self.cause is None

    async def drain(self) -> None:
        """Returns when the transport takes more; ConnectionError if the link is gone."""
        if not await self.room():
            raise ConnectionResetError(str(self.cause))

    def begin(self, *, started: bool) -> None:
        """From the next frame on: those of the handshake, or of what follows it."""
        self._reader.begin(started=started)

    def set_reading(self, reading: bool) -> None:
        """Stops or resumes taking bytes from the peer: backpressure."""
        if reading == self.reading or self._transport is None:
            return
        self.reading = reading
        if reading:
            # Silence while nothing was read is ours, not the peer's.
            self.last_received = asyncio.get_running_loop().time()
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def close(self, cause: BaseException | None = None, *, flush: bool = False) -> None:
        """Ends the link; idempotent. ``flush`` lets what is queued out (a REFUSE)."""
        if self.cause is None:
            self.cause = cause or ConnectionResetError("closed")
        if self._transport is not None:
            if flush:
                self._transport.close()
            else:
                self._transport.abort()
        self._writable.set()

    async def watch(self, heartbeat: float, timeout: float) -> None:
        """Sends PING and ends the link when the peer is silent for ``timeout`` seconds."""
        loop = asyncio.get_running_loop()
        while self.cause is None:
            await asyncio.sleep(heartbeat)
            if self.cause is not None:
                return
            if self.reading and loop.time() - self.last_received > timeout:
                self.close(TimeoutError(f"nothing heard from the peer for {timeout:g} s"))
                return
            self.send(Type.PING, [])


def _unheard(frame: Frame) -> None:
    """In the place of who listened, once nothing comes any more."""
