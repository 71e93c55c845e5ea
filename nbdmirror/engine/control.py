"""The control socket: one connection's lines in, calls on the node, lines out.

Owns the life of admin connections; what can be called is in ``methods``. Decides nothing about
replication: that is the ``NodeApi`` behind it. ``engine.node`` makes one ``ControlServer`` and
gives its ``connection`` to ``Network.listen``.

A connection has one request at work; a few more may be sent ahead. A client that hangs up ends its
``wait`` and its ``events``; every other request is carried out to its end. Whatever changes
something becomes an event with the user id of the peer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from nbdmirror.codec.admin import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    Json,
    LineFramer,
    RpcError,
    encode_error,
    encode_notification,
    encode_result,
    parse_request,
)
from nbdmirror.config import Limits
from nbdmirror.engine.admission import Gate, Guest, Room
from nbdmirror.engine.methods import METHODS, Call, Method, NodeApi, check_params
from nbdmirror.errors import FormatError, NbdmirrorError

__all__ = ["ControlConnection", "ControlServer", "NodeApi", "PeerUid"]

PeerUid = Callable[[asyncio.BaseTransport], int | None]

RECEIVE_BYTES = 16 * 1024
SHOWN_MAX = 500


class ControlServer:
    """All admin connections of a node; ``connection`` is the protocol factory for a listener."""

    def __init__(
        self,
        node: NodeApi,
        limits: Limits,
        peer_uid: PeerUid,
        *,
        room: Room | None = None,
        owners: Sequence[int] | None = None,
        refused: Callable[[str, str, str], None] = lambda listener, who, why: None,
    ) -> None:
        """``owners``: the users whose changes are carried out; None: everybody's. ``refused`` is
        told of who wanted a change without being one, as ``Refusals.tell``."""
        self._owners = owners
        self.refused = refused
        most = limits.admin_connections_max
        self.gate = Gate(room or Room(), most, most, most)
        self.node = node
        self.limits = limits
        self.peer_uid = peer_uid
        self.connections: list[ControlConnection] = []

    def connection(self) -> ControlConnection:
        """A protocol for one connection that was just accepted."""
        return ControlConnection(self)

    def owns(self, uid: int | None) -> bool:
        """Whether this user may change something."""
        return self._owners is None or uid in self._owners

    def admit(self, uid: int | None) -> Guest | None:
        """A place for a connection of this user. None: there is none; but an owner gets that of
        somebody who may only look, the oldest, of those first who have nothing under way."""
        guest = self.gate.enter("", lambda: None)
        viewers = [one for one in self.connections if not self.owns(one.uid)]
        if guest is None and viewers and self.owns(uid):
            min(viewers, key=lambda one: one.busy).give_way()
            guest = self.gate.enter("", lambda: None)
        return guest

    async def close(self) -> None:
        """Drops every connection and ends what they were at; the listener is closed before."""
        tasks = [task for connection in self.connections if (task := connection.drop())]
        await asyncio.gather(*tasks, return_exceptions=True)


class ControlConnection(asyncio.BufferedProtocol):
    """One admin connection. It lives until its transport is gone and its request has ended."""

    def __init__(self, server: ControlServer) -> None:
        self._server = server
        self._node = server.node
        self._framer = LineFramer(server.limits.admin_line_bytes_max)
        self._buffer = bytearray(RECEIVE_BYTES)
        self._transport: asyncio.Transport | None = None
        self.uid: int | None = None
        self._lines: deque[bytes] = deque()
        self._task: asyncio.Task[None] | None = None
        self._waiting = False
        self._hung_up = False
        self._closing = False
        self._room: asyncio.Future[None] | None = None
        self._guest: Guest | None = None

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, not an assert: uvloop's transports are not subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self.uid = self._server.peer_uid(transport)
        self._guest = self._server.admit(self.uid)
        if self._guest is None:
            now = self._server.gate.guests
            self._refuse(NbdmirrorError(f"there are {now} admin connections already"))
            return
        self._guest.known()  # the socket's mode has let it in
        self._server.connections.append(self)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._closing:
            return
        try:
            self._lines.extend(self._framer.feed(memoryview(self._buffer)[:nbytes]))
        except FormatError as error:
            self._refuse(RpcError(INVALID_REQUEST, error.message))
            return
        requests_max = self._server.limits.admin_requests_max
        if len(self._lines) > requests_max:
            self._refuse(RpcError(INVALID_REQUEST, f"more than {requests_max} requests sent ahead"))
            return
        if self._lines and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    def eof_received(self) -> bool:
        self._hung_up = True
        self._end_waiting()
        # A client that only sends, as ``nc -N`` does, still gets its answers.
        return self._task is not None

    def connection_lost(self, exc: Exception | None) -> None:
        self._hung_up = self._closing = True
        self._lines.clear()
        self.resume_writing()
        self._end_waiting()
        if self._task is None:
            self._leave()

    def pause_writing(self) -> None:
        assert self._room is None
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    # What the server calls.

    @property
    def busy(self) -> bool:
        """Whether it has a request under way."""
        return self._task is not None

    def give_way(self) -> None:
        """Its place is needed; of who may only look, so nothing is cut short that changes."""
        self.drop()
        self._leave()

    def drop(self) -> asyncio.Task[None] | None:
        """Closes at once and cancels the request; returns the task that is still ending."""
        assert self._transport is not None
        self._transport.abort()
        if self._task is not None:
            self._task.cancel()
        return self._task

    # The one task that works off the lines.

    async def _work(self) -> None:
        try:
            while self._lines:
                await self._answer(self._lines.popleft())
        finally:
            self._task = None
            self._waiting = False
            assert self._transport is not None
            if self._hung_up:
                self._transport.close()
                self._leave()

    async def _answer(self, line: bytes) -> None:
        try:
            request = parse_request(line)
        except RpcError as error:
            await self._send(encode_error(error.request_id, error))
            return
        request_id, answered = request.id, request.answered
        try:
            method = METHODS.get(request.method)
            if method is None:
                hint = f"methods: {', '.join(METHODS)}"
                problem = f"there is no method {request.method!r}"
                raise RpcError(METHOD_NOT_FOUND, problem, hint=hint)
            call = Call(self._node, check_params(request.method, request.params), self._notify)
            result = await self._run(request.method, method, call)
        except NbdmirrorError as error:
            if answered:
                await self._send(encode_error(request_id, error))
            return
        if answered:
            await self._send(encode_result(request_id, result))
        if method.stream is not None:
            self._begin_waiting()
            try:
                await method.stream(call, result)
            finally:
                self._waiting = False

    async def _run(self, name: str, method: Method, call: Call) -> Any:
        """The result of a call; a defect in the node is reported and becomes an error as well."""
        self._check_owner(name, method)
        if method.waiting:
            self._begin_waiting()
        failure: str | None = "not carried out to its end"
        try:
            result = await method.handler(call)
            failure = None
            return result
        except NbdmirrorError as error:
            failure = error.message
            raise
        except Exception as error:
            failure = f"internal error: {error!r}"
            context = {"message": f"admin method {name} failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            hint = "this is a defect of nbdmirror; the daemon's log has the details"
            raise RpcError(INTERNAL_ERROR, failure, hint=hint) from error
        finally:
            self._waiting = False
            if method.changing:
                params = {key: _shortened(value) for key, value in call.params.items()}
                self._node.events.emit(
                    "admin", method=name, params=params, uid=self.uid, error=failure
                )

    def _check_owner(self, name: str, method: Method) -> None:
        """Whoever may open the socket may look; changing something is for its owners."""
        if not method.changing or self._server.owns(self.uid):
            return
        why = f"uid {self.uid} may look, not change: {name} is for the daemon's user and root"
        self._server.refused("admin", f"uid {self.uid}", why)
        raise NbdmirrorError(why, hint="run it with sudo")

    def _begin_waiting(self) -> None:
        if self._hung_up:
            raise asyncio.CancelledError
        self._waiting = True

    def _end_waiting(self) -> None:
        if self._waiting and self._task is not None:
            self._task.cancel()

    async def _notify(self, events: list[Json]) -> None:
        if events:
            await self._send(b"".join(encode_notification("event", event) for event in events))

    async def _send(self, data: bytes) -> None:
        """Writes, and returns when the transport takes more."""
        assert self._transport is not None
        if self._transport.is_closing():
            return
        self._transport.write(data)
        if self._room is not None:
            await self._room

    def _refuse(self, error: NbdmirrorError) -> None:
        """Says why, and closes: the stream is of no more use."""
        assert self._transport is not None
        self._closing = True
        self._transport.write(encode_error(None, error))
        self._transport.close()

    def _leave(self) -> None:
        if self._guest is not None:
            self._guest.leave()
        if self in self._server.connections:
            self._server.connections.remove(self)


def _shortened(value: Any) -> Any:
    """As an event keeps it: who may only look has his refused calls told too (I6)."""
    text = str(value)
    return value if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."
