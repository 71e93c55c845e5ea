"""A TCP proxy that misbehaves on request: the network between two nodes, in one thread.

Owns: a listening port, its connections, the faults, byte counts per direction. Never reads
meaning into the bytes. Used between a primary and a secondary (faults 31-35 of the matrix:
cut, one-way cut, reset, delay, narrow link, flipped byte) and by ``tests.bench``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

CHUNK = 64 << 10
T = TypeVar("T")


@dataclass
class Direction:
    """One way through the proxy: what it does to bytes, and how many it passed on."""

    name: str
    open: bool = True
    delay_s: float = 0.0
    rate: float | None = None
    flip_at: int | None = None
    passed_bytes: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    def damage(self, data: bytes) -> bytes:
        """Flips one bit of the byte at ``flip_at``, counted from when it was asked for."""
        if self.flip_at is None or self.flip_at >= len(data):
            if self.flip_at is not None:
                self.flip_at -= len(data)
            return data
        broken = bytearray(data)
        broken[self.flip_at] ^= 0x10
        self.flip_at = None
        return bytes(broken)


class Proxy:
    """Forwards loopback connections to ``target`` (``HOST:PORT`` or ``unix:PATH``); thread-safe to
    steer."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusing = False
        self.meddle: Callable[[bytes], bytes] | None = None
        """Is given every piece towards the target, and returns what is passed on instead."""
        self.tap: Callable[[bytes], object] | None = None
        """Is shown every piece that passes, in either direction: who listens on the way."""
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.address = f"tcp:127.0.0.1:{self.port}"
        self._run(self._start())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` in the proxy's loop and returns what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _do(self, action: Callable[[], None]) -> None:
        async def run() -> None:
            action()
            for way in (self.up, self.down):
                way.moved.set()

        self._run(run())

    async def _start(self) -> None:
        self.up = Direction("up")
        self.down = Direction("down")
        self._server = await asyncio.start_server(self._accept, sock=self._listener, limit=CHUNK)

    # -- steering --------------------------------------------------------------------------------

    def cut(self) -> None:
        """Silence both ways: connections stay open, new ones open, nothing is passed on."""
        self._do(lambda: self._set_open(up=False, down=False))

    def stall(self, direction: str) -> None:
        """Silence one way: ``up`` is towards the target, ``down`` back from it."""
        self._do(lambda: self._set_open(up=direction != "up", down=direction != "down"))

    def reset(self) -> None:
        """Every open connection ends with a TCP reset; new ones are served."""
        self._do(self._abort_all)

    def refuse(self) -> None:
        """Resets what is open and every new connection, until ``heal``: the peer is gone."""

        def action() -> None:
            self._refusing = True
            self._abort_all()

        self._do(action)

    def heal(self) -> None:
        """A faultless network from now on; bytes held back by a cut are passed on."""

        def action() -> None:
            self._refusing = False
            self._set_open(up=True, down=True)
            for way in (self.up, self.down):
                way.delay_s, way.rate, way.flip_at = 0.0, None, None

        self._do(action)

    def shape(self, *, delay_s: float = 0.0, rate: float | None = None) -> None:
        """Adds ``delay_s`` to each chunk and limits to ``rate`` bytes per second, each way."""

        def action() -> None:
            for way in (self.up, self.down):
                way.delay_s, way.rate = delay_s, rate

        self._do(action)

    def flip(self, after_bytes: int, direction: str = "up") -> None:
        """One bit of the byte ``after_bytes`` from now on is passed on wrong."""

        def action() -> None:
            (self.up if direction == "up" else self.down).flip_at = after_bytes

        self._do(action)

    @property
    def sent_bytes(self) -> int:
        """Bytes passed on towards the target since the proxy began."""
        return self.up.passed_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes passed back from the target since the proxy began."""
        return self.down.passed_bytes

    def close(self) -> None:
        """Ends every connection and the thread."""
        self._run(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # -- in the loop -----------------------------------------------------------------------------

    def _set_open(self, *, up: bool, down: bool) -> None:
        self.up.open, self.down.open = up, down

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            self._abort(writer)

    def _abort(self, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def _shut(self) -> None:
        self._server.close()
        self._abort_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, rest = self._target.rpartition(":")
        if host == "unix":
            return await asyncio.open_unix_connection(rest, limit=CHUNK)
        return await asyncio.open_connection(host, int(rest), limit=CHUNK)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            self._abort(writer)
            return
        try:
            far_reader, far_writer = await self._connect()
        except OSError:
            self._abort(writer)
            return
        self._writers.add(far_writer)
        pumps = [
            asyncio.ensure_future(self._pump(reader, far_writer, self.up)),
            asyncio.ensure_future(self._pump(far_reader, writer, self.down)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._writers.discard(far_writer)
            self._abort(far_writer)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction
    ) -> None:
        while data := await reader.read(CHUNK):
            if way.delay_s:
                await asyncio.sleep(way.delay_s)
            if way.rate:
                await asyncio.sleep(len(data) / way.rate)
            while not way.open:
                way.moved.clear()
                await way.moved.wait()
            data = way.damage(data)
            if self.meddle is not None and way is self.up:
                data = self.meddle(data)
            way.passed_bytes += len(data)
            if self.tap is not None:
                self.tap(data)
            writer.write(data)
            await writer.drain()
        while not way.open:  # an end of stream does not pass a cut either
            way.moved.clear()
            await way.moved.wait()
        with contextlib.suppress(OSError):
            writer.write_eof()
