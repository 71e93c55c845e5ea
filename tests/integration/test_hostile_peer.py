"""What a lying node can do: nothing. It is hung up on, the data stays, the right peer goes on.

Row "hostile compromised peer" of reliability.md 4.1, I9, X6, O8, O9. The liar has everything but a
proof: the links here are open ones, so that it gets as far as any peer can.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror.codec import repl
from nbdmirror.codec.repl import Type
from tests.integration import hostile
from tests.integration.cluster import FAST, MIB, Cluster, Json
from tests.integration.hostile import GREETINGS, LIES, Conversation, Liar
from tests.integration.process import wait_until
from tests.integration.tools import connect, pattern

SIZE = 8 * MIB


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def first_frame(data: bytes) -> Json:
    """The JSON of the first frame in what went over a wire."""
    (length,) = (int.from_bytes(data[8:12], "little"),)
    found: Json = json.loads(data[repl.HEADER_SIZE : repl.HEADER_SIZE + length])
    return found


class Scene:
    """A group in sync, the primary's HELLO, and what the secondary holds."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        taken = bytearray()
        cluster.proxy.tap = taken.extend
        cluster.start()
        connect(cluster.primary.uri()).pwrite(pattern(4 * MIB, 1), 0)
        cluster.wait_in_sync()
        cluster.proxy.tap = None
        self.hello = first_frame(bytes(taken))
        self.beta = cluster.secondary
        self.address = ("127.0.0.1", self.beta.replication_port)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One for all lies; it must be well at the end."""
    from tests.integration.cluster import Volume

    tuning = {**FAST, "timeout_seconds": 1.0}
    with Cluster(
        tmp_path_factory.mktemp("scene"), volumes=[Volume(size=SIZE)], tuning=tuning
    ) as cluster:
        made = Scene(cluster)
        yield made
        cluster.check_in_sync()


@contextlib.contextmanager
def alone(scene: Scene) -> Iterator[Path]:
    """The right primary is away; what the facet holds must be the same afterwards."""
    cluster, pid = scene.cluster, scene.beta.daemon.pid
    cluster.proxy.refuse()
    scene.cluster.primary.until("is away", lambda r: r["link"] == "disconnected")
    wait_until("beta is alone", lambda: scene.beta.status()["upstream"]["link"] != "connected")
    facet = scene.beta.facets("data")[0]
    before, open_before = digest(facet), descriptors(pid)
    try:
        yield facet
        assert scene.beta.alive, "a lie ended the daemon"
        wait_until("its descriptor is back", lambda: descriptors(pid) <= open_before)
        assert digest(facet) == before, "a lie changed the data"
    finally:
        cluster.proxy.heal()
    cluster.check_in_sync()


def test_lies_of_a_primary(scene: Scene) -> None:
    """Each ends its session; none reaches the facet."""
    with alone(scene):
        for name, lie in LIES.items():
            with Conversation.open(scene.address) as talk:
                lie(Liar(talk, scene.hello))
                assert talk.hung_up(), name


def test_greetings(scene: Scene) -> None:
    """Whoever says anything but a HELLO is gone after the deadline at the latest."""
    pid = scene.beta.daemon.pid
    with alone(scene):
        before = rss(pid)
        for name, data in GREETINGS.items():
            with Conversation.open(scene.address) as talk:
                talk.raw(data)
                assert talk.hung_up(), name
        assert rss(pid) - before < 64 * MIB


def test_a_replay_is_skipped(scene: Scene) -> None:
    """O8: a record at or below the durable position has no effect, whatever it holds."""
    with alone(scene), Conversation.open(scene.address) as talk:
        liar = Liar(talk, scene.hello)
        talk.send(Type.RECORDS, liar.record(seq=liar.seq - 1))
        talk.send(Type.RECORDS, liar.record(seq=1))
        talk.send(Type.RECORDS, liar.record(seq=liar.seq + 7))
        assert talk.hung_up()


@pytest.mark.parametrize(
    "start",
    [
        {"action": "reset", "seq": 0},
        {"action": "reset", "seq": 2**63},
        {"action": "continue", "seq": 1},
        {"action": "erase"},
        {"apply_delay": 1e9},
        {"apply_delay": "x"},
    ],
)
def test_terms_that_cannot_be(scene: Scene, start: Json) -> None:
    """START is checked before anything is made durable."""
    with alone(scene), Conversation.open(scene.address) as talk:
        with pytest.raises(Exception, match="not let in"):
            Liar(talk, scene.hello, **start)
        assert talk.hung_up()


@pytest.mark.parametrize(
    "change",
    [
        {"uuid": "0" * 32},
        {"group": "web"},
        {"versions": [99, 100]},
        {"volumes": []},
        {"history": [["x", -1]]},
        {"forks": "x"},
        {"epoch": 2**40},
        {"node": "\0"},
        {"node": ["alpha"]},
        {"run": 7},
    ],
)
def test_hellos_that_do_not_fit(scene: Scene, change: Json) -> None:
    """REFUSE with a reason, and nothing else."""
    with alone(scene), Conversation.open(scene.address) as talk:
        talk.say(Type.HELLO, {**scene.hello, **change})
        answer = talk.receive()
        assert answer is not None and answer.type is Type.REFUSE
        assert answer.json()["why"]
        assert talk.hung_up()


def test_many_strangers_and_the_right_primary(scene: Scene) -> None:
    """Fault 36 on the replication port: a hundred stalled connections keep nobody out."""
    cluster = scene.cluster
    with contextlib.ExitStack() as stack:
        cluster.proxy.refuse()
        cluster.primary.until("is away", lambda r: r["link"] == "disconnected")
        for _ in range(100):
            with contextlib.suppress(OSError):
                talk = stack.enter_context(Conversation.open(scene.address))
                talk.raw(hostile._head(Type.HELLO, 1000))
        cluster.proxy.heal()
        cluster.check_in_sync()
    connections = scene.beta.status()["connections"]["replication"]
    assert connections["open"] <= 32 + 1


# -- a lying secondary ---------------------------------------------------------------------------

WELCOME: Json = {
    "version": repl.PROTOCOL_VERSIONS[1],
    "node": "beta",
    "initialised": True,
    "consistent": True,
    "history": [],
}


@pytest.mark.parametrize(
    "lie",
    [
        "silence",
        "garbage",
        "flood",
        "ahead",
        "version",
        "types",
        "ack",
        "want",
        "done",
        "copies",
        "records",
        "half",
    ],
)
def test_lies_of_a_secondary(make_cluster: object, tmp_path: Path, lie: str) -> None:
    """The primary's clients go on, nothing is released or cleared, and the right one catches up."""
    tuning = {**FAST, "timeout_seconds": 1.0}
    with Cluster(tmp_path / "c", proxied=False, tuning=tuning) as cluster:
        cluster.create()
        handle = None
        with socket.create_server(("127.0.0.1", cluster.secondary.replication_port)) as server:
            server.settimeout(30)
            cluster.primary.start()
            handle = connect(cluster.primary.uri())
            for _ in range(2):
                peer, _address = server.accept()
                with Conversation(peer) as talk:
                    _lie(talk, lie)
                    handle.pwrite(pattern(4096, 3), 8192)
                    assert talk.hung_up(), lie
            entry = cluster.primary.remote()
            assert entry["state"] not in ("synchronised", "resyncing")
        cluster.secondary.start()
        assert handle.pread(4096, 8192) == pattern(4096, 3)
        cluster.primary.ok("resync", "beta")
        cluster.check_in_sync()


def _lie(talk: Conversation, lie: str) -> None:
    hello = talk.receive()
    assert hello is not None and hello.type is Type.HELLO
    talk.session = hello.session
    said = hello.json()
    welcome = {
        **WELCOME,
        "uuid": said["uuid"],
        "generation": said["generation"],
        "epoch": said["epoch"],
        "run": said["run"],
        "durable_seq": 0,
    }
    match lie:
        case "silence":
            return
        case "garbage":
            talk.raw(b"\0" * 4096)
            return
        case "half":
            talk.raw(hostile._head(Type.WELCOME, 4000, session=talk.session) + b"{")
            return
        case "flood":
            for _ in range(1000):
                talk.say(Type.WELCOME, welcome)
            return
        case "ahead":
            talk.say(Type.WELCOME, {**welcome, "durable_seq": 2**40})
            return
        case "version":
            talk.say(Type.WELCOME, {**welcome, "version": 1})
            return
        case "types":
            talk.say(Type.WELCOME, {**welcome, "durable_seq": "7", "history": 3})
            return
    talk.say(Type.WELCOME, welcome)
    start = talk.receive()
    assert start is not None and start.type is Type.START, start and start.json()
    talk.send(Type.READY, b"{}")
    match lie:
        case "ack":
            talk.send(Type.ACK, repl.ACK.pack(2**40, 2**40, 2**40))
        case "want":
            talk.send(Type.WANT, repl.TOKEN.pack(99) + b"\1" * 50)
        case "done":
            talk.send(Type.DONE, repl.TOKEN.pack(99))
        case "copies":
            talk.send(Type.COPIES, repl.COPIES.pack(2**63))
        case "records":
            talk.send(Type.RECORDS, b"x" * 100)
