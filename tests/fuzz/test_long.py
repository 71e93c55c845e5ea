"""What a peer that knows the group says, or asks for: longer than fuzzers try (I6, I9)."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from nbdmirror.codec import repl
from nbdmirror.codec.repl import Type
from nbdmirror.engine.comparer import WINDOW_BYTES_MAX
from nbdmirror.engine.create import create
from nbdmirror.engine.node import Node
from nbdmirror.engine.readserver import READ_BYTES_MAX
from nbdmirror.ports import Env
from tests.fuzz import nodes
from tests.fuzz.nodes import HELLO, SESSION, START, Doorkeeper, Recorder, config_of, json_frame
from tests.sim.clock import SimClock
from tests.sim.disk import SimDisk
from tests.sim.loop import SimLoop

READS = 1000
VOLUME = {"name": "v", "uuid": "w" * 32, "size": nodes.SIZE, "region_size": 65536}


def frame(kind: Type, payload: bytes, session: int = SESSION) -> bytes:
    """With its checksums right."""
    return b"".join(map(bytes, repl.encode(kind, session, [payload])))


def hello(**said: Any) -> bytes:
    """Not escaped: as long as it may be."""
    return frame(Type.HELLO, json.dumps({**HELLO, **said}, ensure_ascii=False).encode())


@pytest.mark.parametrize(
    "said",
    [
        {"group": "\x7f" * 1_000_000},
        {"node": "n" * 1_000_000},
        {"versions": [10**4000, 10**4000]},
        {"volumes": [{"name": "v" * 500_000}]},
        {"volumes": [{**VOLUME, "size": "\x7f" * 900_000}]},
        {"history": [["\U0001f4be" * 64, number] for number in range(1000)]},
        {"history": [["h" * 64, number] for number in range(1000)]},
    ],
    ids=["group", "node", "versions", "names", "size", "history", "history that fits"],
)
def test_a_primary_says_much(said: dict[str, Any]) -> None:
    """It is refused, or let in: the node goes on, and keeps no more of it than it needs."""
    pieces = [hello(**said), json_frame(Type.START, SESSION, START)]
    nodes.run("secondary", "unix:/peer", lambda _: pieces, may_write=True)


def test_a_primary_is_refused_at_length() -> None:
    """And what a secondary says of why."""

    def pieces(session: int) -> list[bytes]:
        return [frame(Type.REFUSE, json.dumps({"why": "w" * 1_000_000}).encode(), session)]

    nodes.run("primary", None, pieces, may_write=False)


@pytest.mark.parametrize("ask", [True, False])
def test_hashes_of_much(monkeypatch: pytest.MonkeyPatch, ask: bool) -> None:
    """All of it would be read, and the answer outgrow a frame."""
    size = 800 << 20
    assert size > WINDOW_BYTES_MAX
    monkeypatch.setattr(nodes, "SIZE", size)
    volume = {**VOLUME, "size": size}
    hashes = repl.HASHES.pack(1, 0, 65536, 0, size, b"k" * 16)
    pieces = [
        hello(volumes=[volume]),
        json_frame(Type.START, SESSION, START),
        frame(Type.HASHES, hashes + (b"" if ask else bytes(size // 65536 * 16))),
    ]
    nodes.run("secondary", "unix:/peer", lambda _: pieces, may_write=True)


def test_a_primary_asks_and_does_not_read() -> None:
    """No more is read for it than a transport, and the reads under way, take."""
    loop = SimLoop()
    try:
        loop.run_until_complete(_ask(loop))
        assert loop.errors == []
    finally:
        loop.close()


async def _ask(loop: SimLoop) -> None:
    disk, network = SimDisk("n", 0), Doorkeeper()
    env, config = Env(disk, network, SimClock(loop, disk), random.Random(0)), config_of("secondary")
    await create(env, config, "secondary", force=False)
    node = Node(env, config)
    await node.start()
    protocol, transport = network.factories["unix:/peer"](), Recorder()
    protocol.connection_made(transport)

    async def feed(data: bytes) -> None:
        view = memoryview(data)
        while view:
            room = memoryview(protocol.get_buffer(-1))
            count = min(len(room), len(view))
            room[:count] = view[:count]
            protocol.buffer_updated(count)
            view = view[count:]
        await asyncio.sleep(0.01)

    await feed(json_frame(Type.HELLO, SESSION, HELLO))
    await feed(json_frame(Type.START, SESSION, START))
    for full in (True, False):
        if full:
            protocol.pause_writing()
        before = transport.written
        for number in range(READS):
            await feed(frame(Type.READ, repl.READ.pack(number, 0, 0, 0, nodes.SIZE)))
            await feed(frame(Type.HASHES, repl.HASHES.pack(number, 0, 65536, 0, 65536, bytes(16))))
        await asyncio.sleep(1.0)
        taken = transport.written - before
        assert taken <= READ_BYTES_MAX if full else taken > READS * nodes.SIZE
        protocol.resume_writing()
        await asyncio.sleep(1.0)
    protocol.connection_lost(None)
    await node.stop()
