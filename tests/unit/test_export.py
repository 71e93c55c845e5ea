"""One NBD connection: what a client is told, whatever becomes of its request (I8)."""

from __future__ import annotations

import asyncio
import struct
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


def test_a_refusal_is_as_long_as_a_message_may_be() -> None:
    """4.1: it names what a certificate says, and that may be long."""
    session = ServerSession(lambda name: Forbidden("n" * 9000), list, Limits())
    data = FLAGS + go(b"v")
    session.get_buffer(-1)[: len(data)] = data
    session.received(len(data))
    assert 4096 < sum(map(len, session.take_output())) < 4200
