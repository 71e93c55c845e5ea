"""One simulated connection: two pipes and two transports with asyncio's semantics.

A pipe is one direction. It never loses or reorders bytes within itself; it cuts them into chunks,
takes its time, holds at most ``window`` bytes that the receiver has not read, and holds everything
while its direction is cut. A transport is one end; its callbacks run in the context of the node
that it belongs to, so that they stop when that node's life does.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import Context
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from tests.sim.loop import INCARNATION, SECOND_NS, Incarnation

if TYPE_CHECKING:
    from tests.sim.net import SimNet

HIGH_WATER = 64 * 1024


class Mark(Enum):
    """What travels besides bytes."""

    EOF = "eof"
    RESET = "reset"


Item = bytes | memoryview | Mark


@dataclass(slots=True)
class Link:
    """How one direction between two hosts is; seconds and bytes. Drawn between the two bounds."""

    latency: tuple[float, float] = (0.000_05, 0.001)  # of a connection
    jitter: tuple[float, float] = (0.0, 0.000_2)  # of a chunk, on top
    bandwidth: float | None = None  # bytes a second, shared by all connections
    chunk_max: int = 64 * 1024
    split: float = 0.1  # how likely a chunk is cut at a drawn place
    window: int = 256 * 1024
    refuse: float = 0.0  # how likely a connection is refused
    hang: float = 0.0  # how likely nobody answers
    busy_until_ns: int = 0


class Pipe:
    """One direction of a connection."""

    def __init__(self, net: SimNet, source: str, target: str, name: str) -> None:
        self.net = net
        self.source = source
        self.target = target
        self.link = net.link(source, target)
        self.random = random.Random(name)
        self.latency = self.random.uniform(*self.link.latency)
        self.backlog = bytearray()  # written and not yet sent: the transport's write buffer
        self.sender: SimTransport
        self.receiver: SimTransport
        self._flight = 0  # sent, and not yet read by the receiver
        self._owed = 0  # read, but the acknowledgement is held by a cut of the way back
        self._transit: deque[Item] = deque()
        self._held = 0  # of what is in transit: what has come as far as the cut
        self._kernel: deque[Item] = deque()  # arrived, and not yet taken by the receiver's process
        self._last_ns = 0

    def send(self, data: bytes) -> None:
        self.backlog += data
        self.pump()

    def pump(self) -> None:
        """Sends what the window allows."""
        link, backlog = self.link, self.backlog
        while backlog and self._flight < link.window:
            count = min(len(backlog), link.window - self._flight, link.chunk_max)
            if count > 1 and self.random.random() < link.split:
                count = self.random.randrange(1, count)
                self.net.fired["split"] += 1
            chunk = bytes(backlog[:count])
            del backlog[:count]
            self._flight += count
            self._depart(chunk, count)

    def mark(self, mark: Mark) -> None:
        """Sends an end behind everything that has been sent."""
        self._depart(mark, 0)

    def after(self, when_ns: int) -> None:
        """Nothing arrives before that time."""
        self._last_ns = max(self._last_ns, when_ns)

    def consumed(self, count: int) -> None:
        """The receiver has read so many bytes; the sender may send as many more."""
        if self.net.is_cut(self.target, self.source):
            self._owed += count
            return
        self._flight -= count
        if self.backlog or self.sender.paused:
            self.net.loop.call_soon(self.sender.writable, context=self.sender.context)

    def healed(self) -> None:
        """This direction carries again: what was held arrives, in order."""
        held, self._held = self._held, 0
        for _ in range(held):
            self._travel(0)

    def healed_back(self) -> None:
        """The other direction carries again, and with it the acknowledgements."""
        owed, self._owed = self._owed, 0
        self.consumed(owed)

    def _depart(self, item: Item, count: int) -> None:
        self._transit.append(item)
        self._travel(count)

    def _travel(self, count: int) -> None:
        net, link = self.net, self.link
        low, high = link.jitter
        delay = self.latency + low + (high - low) * self.random.random()
        start_ns = net.loop.now_ns
        if link.bandwidth is not None:
            start_ns = max(start_ns, link.busy_until_ns) + int(count / link.bandwidth * SECOND_NS)
            link.busy_until_ns = start_ns
        # Never at the same instant: within an instant the loop may shuffle.
        self._last_ns = max(self._last_ns + 1, start_ns + int(delay * SECOND_NS))
        net.loop.call_at_ns(self._last_ns, self._arrive, context=net.context)

    def _arrive(self) -> None:
        """Whatever is first in transit arrives: what a cut has held comes before what was still on
        its way when the cut was healed."""
        net, receiver = self.net, self.receiver
        if self._held or net.is_cut(self.source, self.target):
            self._held += 1
            net.fired["held"] += 1
            return
        item = self._transit.popleft()
        if not net.is_up(self.target):
            net.fired["lost with its host"] += 1
        elif not receiver.life.alive:
            self._hand_over(item)
        elif receiver.life.running and not self._kernel:
            receiver.context.run(self._hand_over, item)
        else:  # the kernel has it, for a process that is stopped
            self._kernel.append(item)
            net.loop.call_soon(self._take, context=receiver.context)

    def _take(self) -> None:
        """The process takes what came first, in whatever order the loop calls."""
        self._hand_over(self._kernel.popleft())

    def _hand_over(self, item: Item) -> None:
        receiver = self.receiver
        if not receiver.lost and receiver.life.alive:
            receiver.deliver(item)
        elif item is not Mark.RESET:  # nobody knows this connection: half-open
            self.net.fired["reset by no owner"] += 1
            receiver.out.mark(Mark.RESET)


class SimTransport(asyncio.Transport):
    """One end of a connection."""

    def __init__(
        self, net: SimNet, life: Incarnation, context: Context, inp: Pipe, out: Pipe, extra: Any
    ) -> None:
        super().__init__(extra)
        self.life = life
        self.context = context
        self.out = out
        self.inp = inp
        self.paused = False  # the protocol was told to stop writing
        self.lost = False  # the end is near: connection_lost has been called or soon will be
        self.gone: Callable[[], object] | None = None  # who watches for the other side's end
        self._net = net
        self._protocol: asyncio.BaseProtocol | None = None
        self._inbox: deque[Item] = deque()
        self._reading = True
        self._closing = False
        self._eof_written = False
        self._eof_sent = False
        self._high = HIGH_WATER
        self._low = HIGH_WATER // 4
        inp.receiver = self
        out.sender = self

    def made(self, factory: Callable[[], asyncio.BaseProtocol]) -> None:
        """The connection stands: makes the protocol and tells it (in the node's context)."""
        try:
            self._protocol = factory()
            self._protocol.connection_made(self)
        except Exception as error:
            self._fatal(error)
        else:
            self._feed()

    # asyncio.Transport

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._protocol is not None
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Writes what is buffered, then ends; reads no more."""
        self._check()
        if not self._closing:
            self._closing = True
            self._reading = False
            if not self.out.backlog:
                self._end(None)

    def abort(self) -> None:
        """Ends at once; what is buffered is gone."""
        self._check()
        if not self.lost:
            self.out.backlog.clear()
            self._end(None, reset=self.out.random.random() < 0.5)

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        self._check()
        if not self._closing:
            self._reading = False

    def resume_reading(self) -> None:
        self._check()
        if not self._closing and not self._reading:
            self._reading = True
            self._net.loop.call_soon(self._feed, context=self.context)

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self._check()
        assert not self._eof_written, "write after write_eof"
        if self._closing or not data:
            return
        self.out.send(bytes(data))
        if not self.paused and len(self.out.backlog) > self._high:
            self.paused = True
            self._net.fired["pause_writing"] += 1
            self._call("pause_writing")

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any]]) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._check()
        if not self._closing and not self._eof_written:
            self._eof_written = True
            if not self.out.backlog:
                self._send_eof()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        self._high = high
        self._low = high // 4 if low is None else low
        assert 0 <= self._low <= self._high

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        return len(self.out.backlog)

    # What the pipes and the network do to it.

    def deliver(self, item: Item) -> None:
        """Something has arrived for a living node."""
        if item is Mark.RESET:
            self._net.fired["reset seen"] += 1
            self.out.backlog.clear()
            self._inbox.clear()
            self._end(ConnectionResetError(errno.ECONNRESET, "simulated: reset by peer"), None)
        else:
            self._inbox.append(item)
            if item is Mark.EOF and self.gone is not None:
                self._net.fired["hung up"] += 1
                self.gone()
            self._feed()

    def writable(self) -> None:
        """The window has room again."""
        if self.lost:
            return
        self.out.pump()
        if self.paused and len(self.out.backlog) <= self._low:
            self.paused = False
            self._call("resume_writing")
        if not self.out.backlog and not self.lost:
            if self._closing:
                self._end(None)
            elif self._eof_written:
                self._send_eof()

    def vanish(self, *, silent: bool) -> None:
        """Its node is gone. The kernel of a host that is still up tells the peer."""
        if not self.lost:
            self.lost = self._closing = True
            self.out.backlog.clear()
            if not silent:
                self.out.mark(Mark.RESET if self._unread() else Mark.EOF)

    # Inside.

    def _check(self) -> None:
        self.life.check()
        INCARNATION.get().check()

    def _feed(self) -> None:
        """Hands what has arrived to the protocol, as much at once as its buffer takes."""
        while self._inbox and self._reading and not self._closing and self._protocol is not None:
            if self._inbox[0] is Mark.EOF:
                self._inbox.popleft()
                self._reading = False
                if not self._call("eof_received"):
                    self.close()
                return
            try:
                count = self._read(self._protocol)
            except Exception as error:
                self._fatal(error)
                return
            self.inp.consumed(count)

    def _read(self, protocol: asyncio.BaseProtocol) -> int:
        if not isinstance(protocol, asyncio.BufferedProtocol):
            assert isinstance(protocol, asyncio.Protocol)
            item = self._inbox.popleft()
            assert not isinstance(item, Mark)
            protocol.data_received(bytes(item))
            return len(item)
        buffer = memoryview(protocol.get_buffer(-1))
        assert len(buffer), "get_buffer returned an empty buffer"
        count = 0
        while self._inbox and count < len(buffer):
            item = self._inbox[0]
            if isinstance(item, Mark):
                break
            taken = min(len(item), len(buffer) - count)
            buffer[count : count + taken] = item[:taken]
            count += taken
            if taken == len(item):
                self._inbox.popleft()
            else:
                self._inbox[0] = memoryview(item)[taken:]
        protocol.buffer_updated(count)
        return count

    def _send_eof(self) -> None:
        if not self._eof_sent:
            self._eof_sent = True
            self.out.mark(Mark.EOF)

    def _unread(self) -> bool:
        return any(not isinstance(item, Mark) for item in self._inbox)

    def _call(self, name: str) -> Any:
        try:
            return getattr(self._protocol, name)()
        except Exception as error:
            self._fatal(error)
            return True

    def _fatal(self, error: Exception) -> None:
        self._net.loop.call_exception_handler(
            {"message": "exception in a protocol", "exception": error}
        )
        if not self.lost:
            self.out.backlog.clear()
            self._end(error)

    def _end(self, error: Exception | None, reset: bool | None = False) -> None:
        """The one way out; ``reset`` None sends the peer nothing: it is where the end came from.

        As in TCP, ending with unread bytes is a reset, and so is every byte that comes later.
        """
        if self.lost:
            return
        self.lost = self._closing = True
        self._reading = False
        if reset is not None:
            if reset or self._unread():
                self.out.mark(Mark.RESET)
            else:
                self._send_eof()
        self._net.loop.call_soon(self._connection_lost, error, context=self.context)

    def _connection_lost(self, error: Exception | None) -> None:
        if self._protocol is not None:
            self._protocol.connection_lost(error)
