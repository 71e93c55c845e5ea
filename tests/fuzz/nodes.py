"""Whole nodes for the fuzzer, on a simulated disk: bytes go into a real listener's protocol.

The engine is the product's, from its parser to its facets; only the transport is a recorder. A run
fails on whatever the loop would have logged, on a node that ends, and on data that changed though
nothing may change it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

from nbdmirror.codec import repl
from nbdmirror.codec.repl import Type
from nbdmirror.config import (
    MIB,
    AdminConfig,
    Config,
    LogConfig,
    NbdConfig,
    ReplicationConfig,
    VolumeConfig,
)
from nbdmirror.engine.create import create
from nbdmirror.engine.node import Node
from nbdmirror.ports import Env
from tests.fuzz import sealing
from tests.sim.clock import SimClock
from tests.sim.disk import SimDisk
from tests.sim.loop import SimLoop

SESSION = 0x5EED
SIZE = 256 << 10
Factory = Callable[[], asyncio.BufferedProtocol]

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
START = {"action": "reset", "seq": 1, "resync": True, "why": None, "apply_delay": 0.0}


class Recorder(asyncio.Transport):
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.closed = False

    def write(self, data: Any) -> None:
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
    """A network that keeps the listeners' factories."""

    def __init__(self) -> None:
        self.factories: dict[str, Factory] = {}
        self.address = ""

    async def connect(self, address: str, protocol: Factory) -> asyncio.Transport:
        raise ConnectionRefusedError(address)

    async def listen(self, address: str, protocol: Factory) -> Doorkeeper:
        self.factories[address] = protocol
        return self

    def close(self) -> None:
        """Nothing is open."""


def _config(role: str) -> Config:
    return Config(
        path="/etc/nbdmirror.toml",
        group="g",
        node="a" if role == "primary" else "b",
        state_dir="/state",
        nbd=NbdConfig(("unix:/nbd",) if role == "primary" else ()),
        admin=AdminConfig(socket="/admin"),
        log=LogConfig(size=MIB, extent_size=64 << 10, hot_extents=64),
        volumes=(VolumeConfig("v", SIZE, ("/facets/v",)),),
        replication=ReplicationConfig(listen=None if role == "primary" else "unix:/peer"),
    )


def run(role: str, address: str, pieces: list[bytes], *, may_write: bool) -> None:
    """Boots a node, opens one connection to a listener of it, and feeds it the pieces."""
    loop = SimLoop()
    try:
        loop.run_until_complete(_run(loop, role, address, pieces, may_write))
        assert loop.errors == [], loop.errors
    finally:
        loop.close()


async def _run(
    loop: SimLoop, role: str, address: str, pieces: list[bytes], may_write: bool
) -> None:
    disk, config, network = SimDisk("n", 0), _config(role), Doorkeeper()
    env = Env(disk, network, SimClock(loop, disk), random.Random(0))
    await create(env, config, role, force=False)
    node = Node(env, config)
    await node.start()
    assert node.failed is not None
    before = disk.content("/facets/v")
    protocol, transport = network.factories[address](), Recorder()
    protocol.connection_made(transport)
    for piece in pieces:
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


def secondary(data: bytes) -> None:
    """A peer: the first byte says how far it comes in good order, the rest are its frames."""
    stage = data[0] % 4 if data else 0
    pieces = []
    if stage >= 1:
        pieces.append(_json(Type.HELLO, HELLO))
    if stage >= 2:
        pieces.append(_json(Type.START, {**START, "resync": stage == 3}))
    pieces.append(sealing.frames(data[1:], SESSION))
    run("secondary", "unix:/peer", pieces, may_write=stage >= 2)


def raw_secondary(data: bytes) -> None:
    """A peer whose frames have no checksums that hold."""
    run("secondary", "unix:/peer", [data], may_write=False)


def _json(kind: Type, value: dict[str, Any]) -> bytes:
    return b"".join(map(bytes, repl.encode_json(kind, SESSION, value)))


GO = b"IHAVEOPT\0\0\0\7\0\0\0\7\0\0\0\1v\0\0"


def nbd(data: bytes) -> None:
    """A client: with an even first byte its requests, with an odd one its options."""
    head = b"\0\0\0\3"
    if data and data[0] % 2 == 0:
        structured = b"IHAVEOPT\0\0\0\x08\0\0\0\0" if data[0] & 2 else b""
        run("primary", "unix:/nbd", [head + structured + GO, data[1:]], may_write=True)
    else:
        run("primary", "unix:/nbd", [head + data[1:]], may_write=True)


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
            params = {"remote": text, "name": text, "until": text, "address": text}
        request = {"jsonrpc": "2.0", "id": 1, "method": names[data[0] % len(names)]}
        data = json.dumps({**request, "params": params}).encode() + b"\n"
    run("primary", "unix:/admin", [data], may_write=False)
