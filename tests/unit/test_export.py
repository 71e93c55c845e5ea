"""One NBD connection: what a client is told, whatever becomes of its request (I8)."""

from __future__ import annotations

import asyncio
import errno
import struct
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from nbdmirror.codec.nbd import ExportInfo
from nbdmirror.codec.nbdhandshake import Forbidden
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.config import AccessConfig, Limits, NbdConfig
from nbdmirror.engine.access import Client, Rules
from nbdmirror.engine.budget import Holder
from nbdmirror.engine.export import ExportServer
from nbdmirror.engine.node import Node
from nbdmirror.engine.volume import Change
from tests.fuzz.nodes import Recorder, go
from tests.sim.clone import Nobody
from tests.sim.loop import SimLoop
from tests.unit.primary import Primary, primary

FLAGS = b"\0\0\0\3"
READ = struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 512)
WRITE = struct.pack(">IHHQQI", 0x25609513, 1, 1, 8, 0, 512) + b"w" * 512
DISC = struct.pack(">IHHQQI", 0x25609513, 0, 2, 9, 0, 0)


def request(kind: int, offset: int = 0) -> bytes:
    """With FUA."""
    length = 0 if kind == 3 else 512
    data = b"w" * length if kind == 1 else b""
    return struct.pack(">IHHQQI", 0x25609513, 1, kind, offset, offset, length) + data


class Wire(Recorder):
    """Keeps what was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

    def write(self, data: Any) -> None:
        super().write(data)
        self.sent += bytes(data)


def feed(protocol: asyncio.BufferedProtocol, data: bytes) -> None:
    room = memoryview(protocol.get_buffer(-1))
    room[: len(data)] = data
    protocol.buffer_updated(len(data))


def watched(server: ExportServer) -> list[Callable[[], object]]:
    """What is called when a client hangs up."""
    told: list[Callable[[], object]] = []

    def watch(transport: asyncio.BaseTransport, gone: Callable[[], object]) -> Callable[[], None]:
        told.append(gone)
        return lambda: told.remove(gone)

    server.watch = watch
    return told


def test_a_request_that_meets_a_defect_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: its client would wait for ever. The loop is told of the defect."""

    async def test(world: Primary) -> None:
        async def read(offset: int, length: int) -> bytes:
            raise AssertionError("nobody thought of this")

        volume, server = world.node.volumes[0], world.node.exports
        assert server is not None
        monkeypatch.setattr(volume, "try_read", lambda *_: None, raising=False)
        monkeypatch.setattr(volume, "read", read, raising=False)
        protocol, wire = server.connection(), Wire()
        protocol.connection_made(wire)
        feed(protocol, FLAGS + go(b"v"))
        wire.sent = b""
        feed(protocol, READ)
        await asyncio.sleep(0.1)
        assert wire.sent == struct.pack(">IIQ", 0x67446698, 5, 7)
        errors = cast(SimLoop, asyncio.get_running_loop()).errors
        assert len(errors) == 1 and "nobody thought of this" in str(errors)
        errors.clear()
        protocol.connection_lost(None)

    primary(test)


@pytest.mark.parametrize("goodbye", [False, True])
def test_what_is_read_of_who_has_hung_up_waits_for_its_goodbye(goodbye: bool) -> None:
    """NBD_CMD_DISC, I3: it comes last, if it comes. Without it nothing is begun."""

    async def test(world: Primary) -> None:
        volume, server = world.node.volumes[0], world.node.exports
        assert server is not None
        told = watched(server)
        protocol, wire = server.connection(), Wire()
        protocol.connection_made(wire)
        feed(protocol, FLAGS + go(b"v"))
        told[0]()
        feed(protocol, WRITE)
        await asyncio.sleep(0.1)
        assert not wire.closed and bytes(await volume.read(0, 1)) == b"\0"
        if goodbye:
            feed(protocol, DISC)
            await asyncio.sleep(0.1)
            assert wire.closed
        protocol.connection_lost(None)
        await asyncio.sleep(0.1)
        assert bytes(await volume.read(0, 1)) == (b"w" if goodbye else b"\0")
        assert not server.connections and not volume.clients and not server.budget.used

    primary(test)


@pytest.mark.parametrize("more", [100, 10_000])
def test_a_goodbye_is_looked_for_though_replies_are_unread(more: int) -> None:
    """NBD_CMD_DISC, I6: its client may yet read, as libnbd's does that sends no more. What is kept
    of it until the goodbye is found is bounded in bytes, not by how many may be under way."""

    async def test(world: Primary) -> None:
        volume, server = world.node.volumes[0], world.node.exports
        assert server is not None
        server.limits = replace(server.limits, requests_max=2)
        told = watched(server)
        protocol, wire = server.connection(), Wire()
        protocol.connection_made(wire)
        feed(protocol, FLAGS + go(b"v"))
        protocol.pause_writing()
        told[0]()
        wire.sent = b""
        for _ in range(more // 100):
            feed(protocol, READ * 100)
        assert wire.closed == (more > 100)
        if not wire.closed:
            feed(protocol, WRITE + DISC)
            protocol.resume_writing()
            await asyncio.sleep(0.1)
            assert len(wire.sent) == more * (16 + 512) + 16
            assert bytes(await volume.read(0, 1)) == b"w"
        protocol.connection_lost(None)
        assert not server.connections and not volume.clients and not server.budget.used

    primary(test)


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("goodbye", [False, True])
def test_what_waits_when_a_connection_is_lost(
    monkeypatch: pytest.MonkeyPatch, goodbye: bool, seen: bool
) -> None:
    """NBD_CMD_DISC, I3, I6: behind a goodbye it is done, and it is counted until then, but it takes
    no place of those that the volume has for clients. ``seen``: that it has hung up is seen, and
    while nothing is read or written that is all of its end that is."""

    async def test(world: Primary) -> None:
        volume, server = world.node.volumes[0], world.node.exports
        assert server is not None
        room, made = asyncio.Event(), asyncio.Event()

        async def write(*_: Any, **__: Any) -> None:
            await room.wait()
            made.set()

        monkeypatch.setattr(server.group, "write", write)
        server.rules = {"v": Rules(AccessConfig(connections_max=1))}
        told = watched(server)
        protocol, wire = server.connection(), Wire()
        protocol.connection_made(wire)
        feed(protocol, FLAGS + go(b"v"))
        feed(protocol, WRITE + DISC * goodbye)
        await asyncio.sleep(0.1)
        if seen:
            told[0]()
            assert isinstance(server.find_for(Client(), "v"), ExportInfo) == goodbye
        protocol.connection_lost(None)
        await asyncio.sleep(0.1)
        assert bool(server.connections) == bool(server.budget.used) == bool(volume.clients)
        assert bool(volume.clients) == goodbye
        assert isinstance(server.find_for(Client(), "v"), ExportInfo)
        room.set()
        await asyncio.sleep(0.1)
        assert made.is_set() == goodbye and not volume.departed
        assert not server.connections and not volume.clients and not server.budget.used

    primary(test)


@pytest.mark.parametrize("seen", [False, True])
def test_what_waits_for_its_turn_is_begun_when_its_client_goes(
    monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    """NBD_CMD_DISC, I3: before anything that another client begins then, though more is under way
    than may be. ``seen``: that it has gone is noticed while its requests are still received."""

    async def test(world: Primary) -> None:
        volume, server = world.node.volumes[0], world.node.exports
        assert server is not None
        server.limits = replace(server.limits, requests_max=4)
        told = watched(server)
        begun: list[tuple[str, int]] = []
        room = asyncio.Event()

        async def wait(what: str, change: Change) -> None:
            begun.append((what, change.offset))
            await room.wait()

        async def flush() -> None:
            begun.append(("flush", 0))

        def write(volume: object, changes: list[Change], *, durable: bool = False) -> object:
            return wait("write", changes[0])

        async def clear(volume: object, change: Change, *, durable: bool = False) -> None:
            await wait("clear", change)

        for name, stub in (("write", write), ("clear", clear), ("flush", flush)):
            monkeypatch.setattr(server.group, name, stub)
        protocol, wire = server.connection(), Wire()
        protocol.connection_made(wire)
        feed(protocol, FLAGS + go(b"v"))
        feed(protocol, request(1, 0) * 4 + READ)
        if seen:
            told[0]()
        feed(protocol, request(4, 512) + request(1, 1024) + request(3) + request(6, 1536) + DISC)
        protocol.connection_lost(None)
        again = server.connection()
        again.connection_made(Wire())
        feed(again, FLAGS + go(b"v"))
        feed(again, request(1, 0))
        await asyncio.sleep(0.1)
        first = [("clear", 512), ("write", 1024), ("flush", 0), ("clear", 1536)]
        assert begun == [("write", 0)] * 4 + first + [("write", 0)] and volume.clients == 2
        room.set()
        await asyncio.sleep(0.1)
        assert volume.clients == 1
        again.connection_lost(None)
        assert not server.connections and not volume.clients and not server.budget.used

    primary(test)


@pytest.mark.parametrize("spent", [False, True])
def test_a_goodbye_opens_no_way_past_the_limits(
    monkeypatch: pytest.MonkeyPatch, spent: bool
) -> None:
    """I6: one receive holds thousands of requests, and they may wait for long. As many more are
    begun as may be under way, and none where others have all the memory."""

    async def test(world: Primary) -> None:
        volume, server = world.node.volumes[0], world.node.exports
        assert server is not None
        server.limits = replace(server.limits, requests_max=2)
        begun: list[int] = []
        room = asyncio.Event()

        async def clear(volume: object, change: Change, *, durable: bool = False) -> None:
            begun.append(change.offset)
            await room.wait()

        monkeypatch.setattr(server.group, "clear", clear)
        protocol = server.connection()
        protocol.connection_made(Wire())
        feed(protocol, FLAGS + go(b"v"))
        feed(protocol, b"".join(request(4, number * 512) for number in range(100)) + DISC)
        other = Holder(server.budget, lambda: None, lambda: None)
        if spent:
            other.work(server.budget.free)
        protocol.connection_lost(None)
        await asyncio.sleep(0.1)
        assert begun == [number * 512 for number in range(2 if spent else 4)]
        room.set()
        await asyncio.sleep(0.1)
        other.leave()
        assert not server.connections and not volume.clients and not server.budget.used

    primary(test)


def test_what_waits_for_a_goodbye_is_given_up_when_none_can_come() -> None:
    """I6: nobody counts it, and who sends no more may have replies unread for as long as it
    likes."""

    async def test(world: Primary) -> None:
        server = world.node.exports
        assert server is not None
        told = watched(server)
        protocol = server.connection()
        protocol.connection_made(Wire())
        feed(protocol, FLAGS + go(b"v"))
        told[0]()
        feed(protocol, WRITE)
        (waiting,) = cast(Any, protocol)._backlog
        kept = weakref.ref(waiting.payload)
        del waiting
        assert kept() is not None
        assert not protocol.eof_received()
        assert kept() is None
        protocol.connection_lost(None)

    primary(test)


def test_who_has_gone_waits_for_no_room_for_replies() -> None:
    """I6: it said goodbye behind more reads than there may be replies to, and read none of them.
    What changes the volume is made, and nothing of it is kept."""

    async def test(world: Primary) -> None:
        volume, server = world.node.volumes[0], world.node.exports
        assert server is not None
        server.limits = replace(server.limits, reply_bytes_max=4096)
        protocol, wire = server.connection(), Wire()
        protocol.connection_made(wire)
        feed(protocol, FLAGS + go(b"v"))
        wire.get_write_buffer_size = lambda: 4096  # type: ignore[method-assign]
        feed(protocol, READ * 100 + WRITE + DISC)
        protocol.pause_writing()
        await asyncio.sleep(0.1)
        assert server.budget.used and volume.clients
        protocol.connection_lost(None)
        await asyncio.sleep(0.1)
        assert not server.connections and not volume.clients and not server.budget.used
        assert bytes(await volume.read(0, 1)) == b"w"

    primary(test)


def test_a_refusal_is_as_long_as_a_message_may_be() -> None:
    """4.1: it names what a certificate says, and that may be long."""
    session = ServerSession(lambda name: Forbidden("n" * 9000), list, Limits())
    data = FLAGS + go(b"v")
    session.get_buffer(-1)[: len(data)] = data
    session.received(len(data))
    assert 4096 < sum(map(len, session.take_output())) < 4200


class OnePort(Nobody):
    """A network where the first listener can be had, and has a client at once."""

    def __init__(self) -> None:
        self.wire = Wire()

    async def listen(self, address: str, protocol: Any) -> Nobody:
        if self.wire.written:
            raise OSError(errno.EADDRINUSE, "Address in use", address)
        client = protocol()
        client.connection_made(self.wire)
        feed(client, FLAGS + go(b"v"))
        return self


def test_a_start_that_cannot_listen_everywhere_ends_who_is_in() -> None:
    """I3: the state says that the stop was clean, so no write may be answered after it; and X7: nor
    with an error, for the next start serves this client."""

    async def test(world: Primary) -> None:
        await world.node.stop()
        network = OnePort()
        config = replace(world.config, nbd=NbdConfig(("unix:/nbd", "tcp:127.0.0.1:10809")))
        node = Node(replace(world.node.env, network=network), config)
        with pytest.raises(OSError, match="in use"):
            await node.start()
        assert network.wire.written and network.wire.closed
        assert node.primary is not None and node.primary.group.failed is not None
        assert node.store.state["clean"] is True
        await world.start()

    primary(test)
