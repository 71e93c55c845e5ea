"""One NBD connection: what a client is told, whatever becomes of its request (I8)."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, cast

import pytest

from nbdmirror.codec.nbdhandshake import Forbidden
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.config import Limits
from tests.fuzz.nodes import Recorder, go
from tests.sim.loop import SimLoop
from tests.unit.primary import Primary, primary

FLAGS = b"\0\0\0\3"
READ = struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 512)
WRITE = struct.pack(">IHHQQI", 0x25609513, 1, 1, 8, 0, 512) + b"w" * 512
DISC = struct.pack(">IHHQQI", 0x25609513, 0, 2, 9, 0, 0)


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
        told: list[Callable[[], object]] = []

        def watch(
            transport: asyncio.BaseTransport, gone: Callable[[], object]
        ) -> Callable[[], None]:
            told.append(gone)
            return told.clear

        server.watch = watch
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


@pytest.mark.parametrize("goodbye", [False, True])
def test_what_waits_when_a_connection_is_lost(
    monkeypatch: pytest.MonkeyPatch, goodbye: bool
) -> None:
    """NBD_CMD_DISC, I3, I6: behind a goodbye it is done, and it is counted until then."""

    async def test(world: Primary) -> None:
        volume, server = world.node.volumes[0], world.node.exports
        assert server is not None
        room, made = asyncio.Event(), asyncio.Event()

        async def write(*_: Any, **__: Any) -> None:
            await room.wait()
            made.set()

        monkeypatch.setattr(server.group, "write", write)
        protocol, wire = server.connection(), Wire()
        protocol.connection_made(wire)
        feed(protocol, FLAGS + go(b"v"))
        feed(protocol, WRITE + DISC * goodbye)
        await asyncio.sleep(0.1)
        protocol.connection_lost(None)
        await asyncio.sleep(0.1)
        assert bool(server.connections) == bool(server.budget.used) == bool(volume.clients)
        assert bool(volume.clients) == goodbye
        room.set()
        await asyncio.sleep(0.1)
        assert made.is_set() == goodbye
        assert not server.connections and not volume.clients and not server.budget.used

    primary(test)


def test_a_refusal_is_as_long_as_a_message_may_be() -> None:
    """4.1: it names what a certificate says, and that may be long."""
    session = ServerSession(lambda name: Forbidden("n" * 9000), list, Limits())
    data = FLAGS + go(b"v")
    session.get_buffer(-1)[: len(data)] = data
    session.received(len(data))
    assert 4096 < sum(map(len, session.take_output())) < 4200
