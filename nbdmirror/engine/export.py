"""One NBD connection: requests from ``codec.nbdserver`` to the group, replies back.

All complete requests of one receive are a batch. Writes of a batch go to the group together and
are answered together; reads that are in memory are answered in the same step. What has to wait
becomes a task of its own, bounded in number; a client that does not read its replies is not read
from either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, cast

from nbdmirror.codec import nbd, record
from nbdmirror.codec.batch import Writes, singly
from nbdmirror.codec.nbd import Request
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.codec.nbdslab import SLAB_BYTES
from nbdmirror.config import Limits
from nbdmirror.engine import operations
from nbdmirror.engine.access import Rules
from nbdmirror.engine.admission import Gate, Room
from nbdmirror.engine.arrival import Arrival
from nbdmirror.engine.batch import Batch, Changes, Received
from nbdmirror.engine.blockstatus import block_status
from nbdmirror.engine.budget import Budget, Holder
from nbdmirror.engine.catalogue import Catalogue
from nbdmirror.engine.governor import Governor
from nbdmirror.engine.group import Group
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.snapshotexport import SnapshotExports, Writer
from nbdmirror.engine.underway import REQUEST_BYTES, Underway
from nbdmirror.engine.volume import Change, Volume
from nbdmirror.errors import VolumeFailed
from nbdmirror.ports import TlsServer

SPARSE_READ_MIN = 64 << 10
"""Structured reads from here on are answered with holes where the facet has them."""
LATE_BYTES_MAX = 8 << 20
"""What is received, and kept, of who has hung up: about what a socket's buffer holds."""
_LOOKS = (nbd.READ, nbd.BLOCK_STATUS, nbd.CACHE)
"""What changes nothing, and is nothing without its reply."""


class ExportServer(Catalogue):
    """What all NBD connections of a node share: the exports and the limits."""

    def __init__(
        self,
        group: Group | None,
        remotes: list[Remote],
        limits: Limits,
        snapshots: SnapshotExports,
        *,
        rules: Mapping[str, Rules] | None = None,
        room: Room | None = None,
        tls: TlsServer | None = None,
        refused: Callable[[str, str, str], None] = lambda listener, address, why: None,
        watch: Callable[[asyncio.BaseTransport, Callable[[], object]], Callable[[], None]],
    ) -> None:
        """``rules`` by volume name; ``refused`` is told of every client that is turned away;
        ``watch`` as in ``ports.Network``."""
        super().__init__(group, remotes, snapshots, rules or {})
        self.limits = limits
        self.connections: list[ExportConnection] = []
        self.stopping = False
        self.tls = tls
        self.refused = refused
        self.watch = watch
        self.gate = Gate.of(room or Room(), limits.connections_max, limits)
        self.budget = Budget(limits.memory_bytes_max, limits.handshake_seconds)
        self.batches = 0
        """Receives that held requests: whether clients are active."""
        self.governor: Governor | None = None

    @property
    def session_limits(self) -> Limits:
        """A client that lists the exports asks for each of them, and means no harm by it."""
        exports = self.snapshots.count_max + (len(self.group.volumes) if self.group else 0)
        return replace(self.limits, options_max=self.limits.options_max + 4 * exports)

    def connection(self) -> asyncio.BufferedProtocol:
        """The protocol for an accepted connection (see ``ports.Network.listen``)."""
        return ExportConnection(self, None)

    def secured(self) -> asyncio.BufferedProtocol:
        """The same where nothing but TLS is spoken."""
        assert self.tls is not None
        return ExportConnection(self, self.tls)

    async def stop(self, seconds: float) -> None:
        """Lets requests in flight finish, refuses all others, then closes every connection."""
        self.stopping = True
        for connection in list(self.connections):
            connection.shutdown()
        if busy := [task for c in self.connections for task in c.underway.tasks]:
            await asyncio.wait(busy, timeout=seconds)
        if self.group is not None:
            self.group.end()
        for connection in list(self.connections):
            connection.close()


class ExportConnection(asyncio.BufferedProtocol):
    """One client."""

    def __init__(self, server: ExportServer, tls: TlsServer | None) -> None:
        self._server = server
        self._arrival = arrival = Arrival(server, tls, self._abort)
        self._session = ServerSession(
            arrival.find, arrival.exports, server.session_limits, tls=tls is not None
        )
        self._budget = server.budget
        self._held = Holder(self._budget, self._abort, self._room_again)
        self._long = self._starved = False  # the request being received: is it, has it no room
        self._transport: asyncio.Transport | None = None
        self._plain: asyncio.Transport | None = None  # what lies under TLS
        self._volume: Volume | None = None
        self._group: Writer | None = None
        self.underway = Underway(server, self._session, self._held, self._ended)
        self._backlog: list[Request | Writes] = []
        self._writable = self._reading = True
        self._leaving = self._gone = self._departed = False
        self._late = 0  # bytes kept of what was received since it has gone
        self._unwatch: Callable[[], None] = lambda: None
        self._looking = asyncio.Lock()

    # -- transport callbacks -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greets, unless there are too many connections already."""
        self._transport = cast(asyncio.Transport, transport)
        if not self._arrival.admit(self._transport):
            self._transport.abort()
            return
        self._server.connections.append(self)
        self._unwatch = self._server.watch(transport, self._hung_up)
        self._transport.write(self._session.greeting)

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport puts what comes in."""
        return self._session.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        """Executes everything that is complete, and sends what can be answered at once."""
        session = self._session
        requests = session.received(nbytes) if not self._leaving else []
        if self._volume is None:
            self._haggle()
        if self._gone:
            self._backlog += requests
            self._late += nbytes + len(requests) * REQUEST_BYTES
            self._wind_up()
        elif requests:
            self._execute(requests)
        if session.need > SLAB_BYTES or self._long:
            self._hold_long(session.need)
        self._send()

    def _haggle(self) -> None:
        """What the handshake has come to: an export, TLS, an end, or nothing yet."""
        session = self._session
        if session.export is not None:
            self._begin(session.name)
        elif session.tls_wanted:
            assert self._transport is not None
            self._transport.writelines(session.take_output())
            self._arrival.secure(self._transport, self, self._secured)
        elif session.closing_reason is not None:
            self._arrival.refused(session.closing_reason)

    def _secured(self, transport: asyncio.Transport) -> None:
        if self._transport is None:  # it was over meanwhile
            transport.abort()
        else:
            self._plain, self._transport = self._transport, transport
            self._session.secured()

    def _hold_long(self, need: int) -> None:
        """A request longer than the usual buffer is received only where there is memory for it."""
        self._session.shrink()
        self._long = need > SLAB_BYTES
        self._starved = not self._held.receiving(need if self._long else 0)

    def _room_again(self) -> None:
        if self._volume is not None:
            if self._starved:
                self._hold_long(self._session.need)
            self._work_off()
            self._throttle()

    def _begin(self, name: str) -> None:
        """By the name that the client found it by: of two that share a number, a uuid names one."""
        self._arrival.chosen()
        self._volume = self._server.volume(name)
        assert self._volume is not None
        self._group = self._server.writer(self._volume)
        self._volume.clients += 1

    def _send(self) -> None:
        transport, session, tasks = self._transport, self._session, self.underway.tasks
        output = session.take_output()
        if transport is None:
            if self._volume is not None and not tasks:
                self._leave()
            return
        if output:
            if len(output) == 1:
                transport.write(output[0])
            else:
                transport.writelines(output)
            if not self._writable:
                self._held.unread(transport.get_write_buffer_size())
        done = session.disconnect_requested and not tasks and not self._backlog
        if session.closing or done:
            transport.close()
        else:
            self._throttle()

    @property
    def _vanished(self) -> bool:
        """It has hung up, and no goodbye has been found."""
        return self._gone and not self._session.disconnect_requested

    def pause_writing(self) -> None:
        """The client does not read its replies."""
        self._writable = False
        if self._transport is not None:
            self._held.unread(self._transport.get_write_buffer_size())
        self._throttle()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writable = True
        self._held.unread(0)
        self._work_off()
        self._throttle()

    def _throttle(self) -> None:
        """Takes more from the client only while its replies go out, its requests are few, and there
        is memory for what waits; what it has room for already, it may send to its end. Who has hung
        up sends no more: that is received, for the goodbye in it, whatever becomes of replies.
        Behind a goodbye nothing is read: an end that is seen there cuts the replies off. TLS by
        itself would read on, and with an end drop all that it has."""
        tasks = self.underway.tasks
        if self._backlog and not tasks and self._writable:
            asyncio.get_running_loop().call_soon(self._work_off)
        few = len(tasks) < self._server.limits.requests_max or self._long
        able = not self._starved and not self._leaving
        reading = able and self._writable and few and (not self._backlog or self._long)
        reading = reading and not self._session.disconnect_requested
        if reading and self._budget.free <= 0 and self._held.bytes and not self._long:
            self._held.wait()
            reading = False
        if self._vanished and not reading:
            reading = able and self._late <= LATE_BYTES_MAX
            if not reading:
                self._abort()
        if reading != self._reading and self._transport is not None:
            self._reading = reading
            for transport in (self._plain, self._transport):
                if transport is not None and not transport.is_closing():
                    (transport.resume_reading if reading else transport.pause_reading)()

    def _hung_up(self) -> None:
        """What it had sent is received to its end, as far as there is room: a goodbye may be there.
        Until then nothing more is begun. One still unread when a reply fails is not found."""
        self._gone = True
        self._wind_up()
        self._send()

    def _wind_up(self) -> None:
        """Changes of who has said goodbye and gone are begun at once, and so before what others
        begin later (I3): as many more as may be under way, if there is memory. What is beyond is
        not made (I6). It may read still: reads have their turn. Until all is done it counts as a
        client, for no restore may come under it, and as a connection, which bounds what waits; but
        it takes no place of those that the volume has for clients."""
        if not (self._gone and self._session.disconnect_requested):
            return
        if self._volume is not None and not self._departed:
            self._departed = True
            self._volume.departed += 1
        if self._backlog:
            waiting, self._backlog = self._backlog, [r for r in self._backlog if r.type in _LOOKS]
            if self._budget.free > 0 or not self._held.bytes:
                changes = [r for r in waiting if r.type not in _LOOKS]
                self._execute(changes[: self._server.limits.requests_max], at_once=True)

    def eof_received(self) -> None:
        """No goodbye comes any more, and it may leave replies unread, and stay, for long (I6)."""
        if self._vanished:
            self._backlog = []

    def connection_lost(self, exc: Exception | None) -> None:
        """What is not made yet is not made any more: the client has none of it confirmed, sends it
        again elsewhere, and what it writes after that must not be under it (I3). Who has said
        goodbye does not: its changes are made, though nobody hears of it."""
        self._transport, self._gone = None, True
        self._unwatch()
        self._wind_up()
        self._backlog = []
        self._held.unread(0)
        if not self._session.disconnect_requested or not self.underway.tasks:
            self._leave()

    def _leave(self) -> None:
        self.underway.leave()
        self._arrival.leave()
        if self._volume is not None:
            self._volume.clients -= 1
            self._volume.departed -= self._departed
            self._volume = None
        if self in self._server.connections:
            self._server.connections.remove(self)

    def shutdown(self) -> None:
        """Takes no more requests. They are not refused: the kernel's client makes I/O errors of
        that, while what has no reply it sends again over its next connection (X7)."""
        self._session.shutdown()
        if self._volume is not None:
            self._leaving, self._backlog = True, []
            self._throttle()

    def close(self) -> None:
        """Sends what is answered and closes."""
        if self._transport is not None:
            self._send()
            if self._transport is not None:
                self._transport.close()
        self._leave()

    # -- requests ----------------------------------------------------------------------------

    def _execute(self, requests: list[Request | Writes], *, at_once: bool = False) -> None:
        volume, group = self._volume, self._group
        assert volume is not None and group is not None
        self._server.batches += 1
        writes: list[Request | Writes] = []
        changes: list[Change] = []
        answered = 0
        for index, request in enumerate(requests):
            kind = request.type
            if isinstance(request, Writes):
                self._write_now(volume, group, Received(request), [request])
            elif kind == nbd.WRITE and request.length:
                change = Change(record.WRITE, 0, request.offset, request.length, request.payload)
                if request.flags & nbd.FUA:
                    self.underway.start([request], self._write(volume, group, request, change))
                else:
                    writes.append(request)
                    changes.append(change)
            elif not request.length and kind != nbd.FLUSH:
                self._session.reply(request)
            elif not at_once and self._full(answered):
                self._backlog = requests[index:]
                if self._budget.free <= 0:
                    self._held.wait()
                break
            elif kind == nbd.READ:
                answered += request.length
                self._read_now(volume, request)
            else:
                self.underway.start([request], self._other(volume, group, request))
        if changes:
            self._write_now(volume, group, Changes(changes), writes)

    def _full(self, answered: int) -> bool:
        """Whether no more may be begun: tasks, and bytes of replies, are bounded (I6)."""
        limits = self._server.limits
        return (
            answered + self.underway.reply_bytes >= limits.reply_bytes_max
            or len(self.underway.tasks) >= limits.requests_max
            or not self._writable
            or (self._budget.free <= 0 and answered + self._held.bytes > 0)
        )

    def _work_off(self) -> None:
        """Goes on with requests that had to wait for others to be answered."""
        if self._backlog and self._volume is not None and not self._vanished:
            if not self._full(0):
                requests, self._backlog = self._backlog, []
                self._execute(requests)
                self._send()
            elif self._budget.free <= 0:
                self._held.wait()

    def _write_now(
        self, volume: Volume, group: Writer, batch: Batch, writes: list[Request | Writes]
    ) -> None:
        try:
            rest = group.write_batch(volume, batch)
        except VolumeFailed as error:
            for request in singly(writes):
                self._session.reply(request, error.errno, error.message)
            return
        if rest is None:
            self._session.reply_many(writes)
        else:
            requests = list(singly(writes))
            self.underway.start(requests, self._complete(rest, requests))

    async def _complete(self, rest: Coroutine[Any, Any, None], writes: list[Request]) -> None:
        await rest
        self._session.reply_many(writes)

    async def _write(self, volume: Volume, group: Writer, request: Request, change: Change) -> None:
        if (rest := group.write(volume, [change], durable=True)) is not None:
            await rest
        self._session.reply_many([request])

    def _read_now(self, volume: Volume, request: Request) -> None:
        if request.length <= SPARSE_READ_MIN or request.flags & nbd.DF:
            try:
                data = volume.try_read(request.offset, request.length)
            except VolumeFailed as error:
                self._session.reply(request, error.errno, error.message)
                return
            if data is not None:
                self._session.reply_read(request, data)
                return
        self.underway.start([request], self._read(volume, request))

    async def _read(self, volume: Volume, request: Request) -> None:
        if request.flags & nbd.DF or request.length <= SPARSE_READ_MIN:
            self._session.reply_read(request, await volume.read(request.offset, request.length))
            return
        pieces = await operations.read(volume, request.offset, request.length)
        self._session.reply_read_extents(request, pieces)

    async def _other(self, volume: Volume, group: Writer, request: Request) -> None:
        kind, flags, where = request.type, request.flags, (request.offset, request.length)
        durable, keep = bool(flags & nbd.FUA), bool(flags & nbd.NO_HOLE)
        if kind == nbd.FLUSH:
            await group.flush()
        elif kind == nbd.TRIM:
            await operations.trim(group, volume, *where, durable=durable)
        elif kind == nbd.WRITE_ZEROES:
            await operations.zero(group, volume, *where, keep_space=keep, durable=durable)
        else:
            async with self._looking:  # one after the other, and others in between
                await asyncio.sleep(0)
                if kind == nbd.BLOCK_STATUS:
                    asked = self._session.contexts, self._server.remotes
                    found = await block_status(volume, *asked, *where)
                    self._session.reply_block_status(request, found)
                    return
                await operations.cache(volume, *where)
        self._session.reply(request)

    def _ended(self) -> None:
        self._send()
        self._work_off()
