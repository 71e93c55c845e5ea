"""Whole nodes for the fuzzer, on a simulated disk: bytes go into a real listener's protocol.

The engine is the product's, from its parser to its facets; only the transport is a recorder. A run
fails on whatever the loop would have logged, on a defect, on a node that ends, on an event without
measure, and on data that changed though nothing may change it.
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nbdmirror.codec import mark, record, repl
from nbdmirror.codec.repl import Type
from nbdmirror.config import (
    MIB,
    AdminConfig,
    Config,
    LogConfig,
    NbdConfig,
    RemoteConfig,
    ReplicationConfig,
    VolumeConfig,
)
from nbdmirror.engine.create import create
from nbdmirror.engine.events import Event
from nbdmirror.engine.node import Node
from nbdmirror.ports import Env
from tests.fuzz import sealing
from tests.sim.clock import SimClock
from tests.sim.disk import SimDisk
from tests.sim.loop import SimLoop

SESSION = 0x5EED
SIZE = 256 << 10
EVENT_MAX = 8 << 10
"""Of an event as text: ten thousand of them are kept."""
Factory = Callable[[], asyncio.BufferedProtocol]
Pieces = Callable[[int], Iterable[bytes]]

HELLO = {
    "versions": list(repl.PROTOCOL_VERSIONS),
    "group": "g",
    "uuid": "u" * 32,
    "node": "a",
    "remote": "b",
    "generation": "1" * 16,
    "history": [],
    "epoch": 1,
    "run": "2" * 16,
    "forks": [],
    "volumes": [{"name": "v", "uuid": "w" * 32, "size": SIZE, "region_size": 65536}],
}
START = {
    "action": "reset",
    "seq": 1,
    "resync": True,
    "why": None,
    "apply_delay": 0.0,
    "copies": 3,
}
WELCOME = {
    "version": repl.PROTOCOL_VERSIONS[1],
    "node": "b",
    "initialised": False,
    "uuid": None,
    "generation": None,
    "history": [],
    "epoch": 0,
    "run": None,
    "durable_seq": 0,
    "consistent": False,
    "copies": 0,
    "altered": False,
}


MARK = mark.Mark(mark.SNAPSHOT, "5" * 32, (0,), 7).encode()


def _record(kind: int, seq: int, payload: bytes, volume: int = 0) -> bytes:
    one = record.Record(kind, 0, 1, volume, seq, 0, len(payload), 1, payload)
    return b"".join(map(bytes, record.encode(one)))


RECORD = _record(record.WRITE, 1, b"data")
RECORDS = RECORD + _record(record.MARK, 2, MARK)
"""A write, and the marker of a snapshot behind it."""
STRAY = _record(record.MARK, 1, MARK, volume=5)
"""A marker that is about no volume; a fuzzer found that one was let in, and applied."""


class Recorder(asyncio.Transport):
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.first = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.first = self.first or bytes(data[:64])
        self.written += len(data)

    def writelines(self, parts: Any) -> None:
        for part in parts:
            self.write(part)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        """Everything is given anyway: more than a real transport would."""

    def resume_reading(self) -> None:
        """See ``pause_reading``."""

    def get_write_buffer_size(self) -> int:
        return 0


class Doorkeeper:
    """A network that keeps the listeners' factories, and what it was asked to connect first."""

    def __init__(self) -> None:
        self.factories: dict[str, Factory] = {}
        self.address = ""
        self.called: asyncio.Future[tuple[asyncio.BufferedProtocol, Recorder]]
        self.called = asyncio.get_running_loop().create_future()

    async def connect(self, address: str, protocol: Factory) -> asyncio.Transport:
        if self.called.done():
            raise ConnectionRefusedError(address)
        made, transport = protocol(), Recorder()
        made.connection_made(transport)
        self.called.set_result((made, transport))
        return transport

    async def listen(self, address: str, protocol: Factory) -> Doorkeeper:
        self.factories[address] = protocol
        return self

    def watch(self, transport: Any, gone: Any) -> Callable[[], None]:
        return self.close

    def close(self) -> None:
        """Nothing is open."""


def config_of(role: str) -> Config:
    """The configuration of a node: ``a``, the primary, sends to ``b``."""
    primary = role == "primary"
    return Config(
        path="/etc/nbdmirror.toml",
        group="g",
        node="a" if primary else "b",
        state_dir="/state",
        nbd=NbdConfig(("unix:/nbd",) if primary else ()),
        admin=AdminConfig(socket="/admin"),
        log=LogConfig(size=MIB, extent_size=64 << 10, hot_extents=64),
        volumes=(VolumeConfig("v", SIZE, ("/facets/v",)),),
        remotes=(RemoteConfig("b", "unix:/b"),) if primary else (),
        replication=ReplicationConfig(listen=None if primary else "unix:/peer"),
    )


def run(role: str, address: str | None, pieces: Pieces, *, may_write: bool) -> None:
    """Boots a node, opens one connection to a listener of it (None: takes the one that it opens),
    and feeds it the pieces, given the session that its first frame named."""
    loop = SimLoop()
    try:
        loop.run_until_complete(_run(loop, role, address, pieces, may_write))
        assert loop.errors == [], loop.errors
    finally:
        loop.close()


async def _run(
    loop: SimLoop, role: str, address: str | None, pieces: Pieces, may_write: bool
) -> None:
    disk, config, network = SimDisk("n", 0), config_of(role), Doorkeeper()
    env = Env(disk, network, SimClock(loop, disk), random.Random(0))
    await create(env, config, role, force=False)
    node, told = Node(env, config), list[Event]()
    node.events.listen(told.append)
    await node.start()
    assert node.failed is not None
    if role == "primary":
        # The snapshots v@1, and v@2, which takes writes.
        for number in (1, 2):
            await node.people.create(None, False)
            await node.people.export(str(number), number == 2)
    before = disk.content("/facets/v")
    if address is None:
        protocol, transport = await network.called
    else:
        protocol, transport = network.factories[address](), Recorder()
        protocol.connection_made(transport)
    (session,) = struct.unpack_from("<Q", transport.first.ljust(24, b"\0"), 16)
    for piece in pieces(session):
        view = memoryview(piece)
        while view and not transport.closed:
            room = memoryview(protocol.get_buffer(-1))
            assert len(room), "no room to read into"
            count = min(len(room), len(view))
            room[:count] = view[:count]
            protocol.buffer_updated(count)
            view = view[count:]
        await asyncio.sleep(0.2)
    if not protocol.eof_received():
        transport.close()
    protocol.connection_lost(None)
    await asyncio.sleep(1.0)
    assert not node.failed.done(), node.failed.result()
    assert may_write or disk.content("/facets/v") == before
    await node.stop()
    for event in told:
        assert event["kind"] != "defect", event
        assert len(repr(event)) < EVENT_MAX, "an event keeps all that somebody said"


def secondary(data: bytes) -> None:
    """A peer: the first byte says how far it comes in good order, the rest are its frames."""
    stage = data[0] % 4 if data else 0

    def pieces(_: int) -> Iterator[bytes]:
        if stage >= 1:
            yield json_frame(Type.HELLO, SESSION, HELLO)
        if stage >= 2:
            yield json_frame(Type.START, SESSION, {**START, "resync": stage == 3})
        yield sealing.frames(data[1:], SESSION)

    run("secondary", "unix:/peer", pieces, may_write=stage >= 2)


def raw_secondary(data: bytes) -> None:
    """A peer whose frames have no checksums that hold."""
    run("secondary", "unix:/peer", lambda _: [data], may_write=False)


def primary(data: bytes) -> None:
    """What a primary connected to: the first byte says how far it comes in good order."""
    stage = data[0] % 4 if data else 0

    def pieces(session: int) -> Iterator[bytes]:
        if stage == 3:
            yield data[1:]  # no checksum holds
            return
        if stage >= 1:
            yield json_frame(Type.WELCOME, session, WELCOME)
        if stage >= 2:
            yield json_frame(Type.READY, session, {})
        yield sealing.frames(data[1:], session)

    run("primary", None, pieces, may_write=False)


def json_frame(kind: Type, session: int, value: dict[str, Any]) -> bytes:
    """A frame that carries a JSON object."""
    return b"".join(map(bytes, repl.encode_json(kind, session, value)))


def go(name: bytes) -> bytes:
    """NBD_OPT_GO for an export, without information requests."""
    return struct.pack(">8sIII", b"IHAVEOPT", 7, 6 + len(name), len(name)) + name + b"\0\0"


GO = go(b"v")
EXPORTS = (b"v", b"v@2")


def nbd(data: bytes) -> None:
    """A client: with an even first byte its requests, of the volume or (4) of a snapshot that may
    be written, with an odd one its options."""
    head = b"\0\0\0\3"
    if data and data[0] % 2 == 0:
        structured = b"IHAVEOPT\0\0\0\x08\0\0\0\0" if data[0] & 2 else b""
        snapshot = bool(data[0] & 4)
        pieces = [head + structured + go(EXPORTS[snapshot]), data[1:]]
        run("primary", "unix:/nbd", lambda _: pieces, may_write=not snapshot)
    else:
        run("primary", "unix:/nbd", lambda _: [head + data[1:]], may_write=True)


def admin(data: bytes) -> None:
    """Somebody at the admin socket: lines, or the parameters of a method by its number."""
    from nbdmirror.engine.methods import METHODS

    names = list(METHODS)
    if data and data[0] < 2 * len(names):
        text = data[1:].decode(errors="replace")
        params: Any = text
        try:
            params = json.loads(text)
        except (ValueError, RecursionError):
            known = METHODS[names[data[0] % len(names)]].params
            params = {key: text for key, param in known.items() if param.kind is str}
        request = {"jsonrpc": "2.0", "id": 1, "method": names[data[0] % len(names)]}
        data = json.dumps({**request, "params": params}).encode() + b"\n"
    run("primary", "unix:/admin", lambda _: [data], may_write=False)
