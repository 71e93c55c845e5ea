"""Requests of one NBD connection that wait for something: a task for each, and what it holds (I6).

Owns the tasks, what is answered when one goes wrong, and the memory that the connection's
``Holder`` is charged with for them; what is done for a request is ``engine.export``'s. A write that
waits keeps all of the buffer that it was received in, with others or alone: it is counted once,
while any of them is under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nbdmirror.codec import nbd
from nbdmirror.codec.nbd import Request
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.engine.budget import Holder
from nbdmirror.errors import NbdmirrorError

if TYPE_CHECKING:
    from nbdmirror.engine.export import ExportServer

REQUEST_BYTES = 1 << 10
"""What a request costs that waits, besides its payload: it may be of one byte."""


class _Buffer:
    """What payloads were received in."""

    __slots__ = ("memory", "size", "users")

    def __init__(self, memory: object, size: int) -> None:
        self.memory = memory
        self.size = size
        self.users = 0
        """Tasks whose payloads lie in it."""


class _Part(NamedTuple):
    """What one task holds."""

    reply: int
    own: int
    buffer: _Buffer | None


class Underway:
    """The tasks of one connection; ``ended`` is called behind the end of each."""

    def __init__(
        self,
        server: ExportServer,
        session: ServerSession,
        held: Holder,
        ended: Callable[[], None],
    ) -> None:
        self._server = server
        self._session = session
        self._held = held
        self._on_end = ended
        self.tasks: dict[asyncio.Task[None], _Part] = {}
        self.reply_bytes = 0
        """What reads under way will answer with."""
        self._buffer: _Buffer | None = None
        self._left = False

    def start(self, requests: Sequence[Request], work: Coroutine[Any, Any, None]) -> None:
        """Does the work for requests of one receive in a task of its own."""
        first = requests[0]
        reply = first.length if first.type == nbd.READ else 0
        part = _Part(reply, reply + len(requests) * REQUEST_BYTES, self._buffer_of(first))
        task = asyncio.ensure_future(self._guard(requests, work))
        self.tasks[task] = part
        self.reply_bytes += reply
        self._held.work(part.own)
        task.add_done_callback(self._ended)

    def _buffer_of(self, request: Request) -> _Buffer | None:
        if request.payload is None:
            return None
        memory, buffer = request.payload.obj, self._buffer
        if buffer is None or buffer.memory is not memory:
            self._buffer = buffer = _Buffer(memory, memoryview(memory).nbytes)
            self._held.work(buffer.size)
        buffer.users += 1
        return buffer

    async def _guard(self, requests: Sequence[Request], work: Coroutine[Any, Any, None]) -> None:
        """Whatever goes wrong with a request is its reply, never silence (I8)."""
        governor = self._server.governor
        try:
            if governor is None:
                await work
            else:
                began = governor.now_ns()
                await work
                governor.observe(governor.now_ns() - began)
        except NbdmirrorError as error:
            number = getattr(error, "errno", 5)
            for request in requests:
                self._session.reply(request, number, error.message)
        except Exception:
            for request in requests:
                self._session.reply(request, 5, "a defect of nbdmirror: see the daemon's log")
            raise

    def _ended(self, task: asyncio.Task[None]) -> None:
        part = self.tasks.pop(task)
        self.reply_bytes -= part.reply
        if not self._left:  # else all that it held was given back
            self._give_back(part)
        self._on_end()
        if not task.cancelled():
            task.result()

    def _give_back(self, part: _Part) -> None:
        size, buffer = part.own, part.buffer
        if buffer is not None:
            buffer.users -= 1
            if not buffer.users:
                size += buffer.size
                if buffer is self._buffer:
                    self._buffer = None
        self._held.work(-size)

    def leave(self) -> None:
        """The client is gone: nothing is done that has not been done."""
        self._left = True
        self._buffer = None
        for task in self.tasks:
            asyncio.get_running_loop().call_soon(task.cancel)  # once it has begun
        self._held.leave()
