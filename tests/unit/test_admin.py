"""The admin protocol: framing at any split, requests, replies, and their dispatch (I9)."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from nbdmirror.codec import admin
from nbdmirror.config import Limits
from nbdmirror.engine.methods import METHODS
from nbdmirror.errors import (
    ConfigError,
    FormatError,
    NbdmirrorError,
    NoDaemon,
    Refused,
    TimedOut,
    UsageError,
)

from .adminsession import ask, receive, run_session, send
from .fake_node import FakeNode

STREAM = b'{"a":1}\n\n{"b":"\xc3\xa9"}\r\n  \nlast\n'
LINES = [b'{"a":1}', b'{"b":"\xc3\xa9"}', b"last"]


def test_framing_is_the_same_at_every_split() -> None:
    for first in range(len(STREAM) + 1):
        for second in range(first, len(STREAM) + 1):
            framer = admin.LineFramer(20)
            lines: list[bytes] = []
            for piece in (STREAM[:first], STREAM[first:second], STREAM[second:]):
                lines += framer.feed(piece)
            assert lines == LINES


def test_framing_byte_by_byte() -> None:
    framer = admin.LineFramer(20)
    assert [line for byte in STREAM for line in framer.feed(bytes([byte]))] == LINES


@pytest.mark.parametrize("tail", [b"", b"\n"])
def test_a_line_at_the_limit_passes_and_one_past_it_does_not(tail: bytes) -> None:
    framer = admin.LineFramer(8)
    assert framer.feed(b"12345678") == []
    assert framer.feed(b"\n") == [b"12345678"]
    with pytest.raises(FormatError, match="longer than 8 bytes"):
        framer.feed(b"123456789" + tail)


BAD_REQUESTS = [
    (b"", admin.PARSE_ERROR, None),
    (b"nonsense", admin.PARSE_ERROR, None),
    (b"\xff\xfe", admin.PARSE_ERROR, None),
    (b"[" * 60_000, admin.PARSE_ERROR, None),
    (b'{"id":' + b"9" * 5000 + b"}", admin.PARSE_ERROR, None),
    (b'{"id":1,"params":{"timeout":NaN}}', admin.PARSE_ERROR, None),
    (b"[]", admin.INVALID_REQUEST, None),
    (b'[{"jsonrpc":"2.0","method":"status","id":1}]', admin.INVALID_REQUEST, None),
    (b"7", admin.INVALID_REQUEST, None),
    (b'{"jsonrpc":"2.0","method":"status","id":true}', admin.INVALID_REQUEST, None),
    (b'{"jsonrpc":"2.0","method":"status","id":[1]}', admin.INVALID_REQUEST, None),
    (b'{"method":"status","id":1}', admin.INVALID_REQUEST, 1),
    (b'{"jsonrpc":"1.0","method":"status","id":"x"}', admin.INVALID_REQUEST, "x"),
    (b'{"jsonrpc":"2.0","id":1}', admin.INVALID_REQUEST, 1),
    (b'{"jsonrpc":"2.0","method":5,"id":1}', admin.INVALID_REQUEST, 1),
    (b'{"jsonrpc":"2.0","method":"status","params":[1],"id":1}', admin.INVALID_PARAMS, 1),
]


@pytest.mark.parametrize(("line", "code", "request_id"), BAD_REQUESTS)
def test_bad_requests_are_refused(line: bytes, code: int, request_id: admin.Id) -> None:
    with pytest.raises(admin.RpcError) as caught:
        admin.parse_request(line)
    assert caught.value.code == code
    assert caught.value.request_id == request_id


def test_requests_and_replies_survive_the_line() -> None:
    line = admin.encode_request("resync", {"remote": "b\n\u2028\ud800", "full": True}, 7)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    request = admin.parse_request(line)
    assert request == admin.Request("resync", {"remote": "b\n\u2028\ud800", "full": True}, 7)
    assert not admin.parse_request(b'{"jsonrpc":"2.0","method":"status"}').answered
    assert admin.parse_reply(admin.encode_result(7, {"x": 1})) == admin.Reply(7, {"x": 1})
    notification = admin.parse_reply(admin.encode_notification("event", {"kind": "link"}))
    assert notification == admin.Notification("event", {"kind": "link"})


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (NbdmirrorError("m", hint="h"), NbdmirrorError, 1001),
        (UsageError("m", hint="h"), UsageError, 1002),
        (ConfigError("m", hint="h"), UsageError, 1002),
        (TimedOut("m", hint="h"), TimedOut, 1003),
        (Refused("m", hint="h"), Refused, 1004),
        (NoDaemon("m", hint="h"), NoDaemon, 1005),
        (admin.RpcError(admin.METHOD_NOT_FOUND, "m", hint="h"), UsageError, -32601),
        (admin.RpcError(admin.INTERNAL_ERROR, "m", hint="h"), NbdmirrorError, -32603),
    ],
)
def test_an_error_is_raised_again_on_the_other_side(
    error: NbdmirrorError, kind: type[NbdmirrorError], code: int
) -> None:
    reply = admin.parse_reply(admin.encode_error(3, error))
    assert isinstance(reply, admin.Reply) and reply.error is not None
    assert reply.error["code"] == code
    assert reply.error["data"] == {"exit_code": error.exit_code, "hint": "h"}
    with pytest.raises(kind) as caught:
        admin.raise_error(reply.error)
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint) == ("m", "h")


@pytest.mark.parametrize("line", [b"x", b"[]", b"{}", b'{"id":1}', b'{"id":1,"error":5}'])
def test_what_is_no_reply_is_refused(line: bytes) -> None:
    with pytest.raises(FormatError):
        admin.parse_reply(line)


# Dispatch, over a real socket.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.sock"


def test_only_owners_change_anything(path: Path) -> None:
    """Whoever may open the socket may look; changes by others are refused, and told of: not in the
    history of changes, which they could flood (I6)."""
    refused: list[tuple[str, str, str]] = []

    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        assert "result" in await ask(reader, writer, "status")
        for name, method in METHODS.items():
            if not method.changing:
                continue
            required = [key for key, param in method.params.items() if param.required]
            params: dict[str, Any] = dict.fromkeys(required, "x")
            params |= {"address": "tcp:b:1"} if "address" in params else {}
            params |= {"path": "/x"} if "path" in params else {}
            params |= {"ranges": [[0, 512]]} if "ranges" in params else {}
            answer = await ask(reader, writer, name, **params)
            assert "may look, not change" in answer["error"]["message"], name
        await ask(reader, writer, "snapshot.delete", snapshot="1" * 9000)
        assert not [event for event in node.events.since(0).events if event["kind"] == "admin"]
        changing = [name for name, method in METHODS.items() if method.changing]
        assert len(refused) == len(changing) + 1
        for name, (listener, who, why) in zip(changing, refused, strict=False):
            assert (listener, who) == ("admin", "uid 1000") and name in why
        assert len(str(refused[-1])) < 2000
        assert not [call for call in node.calls if call[0] not in ("status", "wait")]

    def tell(listener: str, who: str, why: str) -> None:
        refused.append((listener, who, why))

    assert run_session(path, session, owners=(0, 999), refused=tell) == []


def test_viewers_do_not_keep_an_owner_out(path: Path) -> None:
    """4.1: with every place taken, an owner gets that of the oldest viewer with nothing under way;
    another viewer is refused, and owners keep their places."""

    async def session(node: FakeNode, first: Any, writer: Any) -> None:
        places = [(first, writer)]
        places += [await asyncio.open_unix_connection(str(path)) for _ in range(2)]
        send(writer, "wait", until="in-sync")  # the first viewer waits for something
        for reader, one in places[1:]:
            assert "result" in await ask(reader, one, "status")
        reader, viewer = await asyncio.open_unix_connection(str(path))
        assert "3 admin connections" in (await receive(reader))["error"]["message"]
        owners = [await asyncio.open_unix_connection(str(path)) for _ in range(3)]
        for reader, one in owners:
            assert "result" in await ask(reader, one, "status")
        for reader, _ in places:
            assert await reader.read() == b""
        reader, fourth = await asyncio.open_unix_connection(str(path))
        assert "3 admin connections" in (await receive(reader))["error"]["message"]
        for one in (viewer, fourth, *(one for _, one in (*places, *owners))):
            one.close()

    uids = iter((1000, 1000, 1000, 1000, 0, 0, 0, 0))
    limits = Limits(admin_connections_max=3)
    assert run_session(path, session, limits, owners=(0,), uids=uids) == []


def test_every_method_reaches_the_node(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        node.in_sync.set()
        assert (await ask(reader, writer, "status"))["result"] == node.state
        assert (await ask(reader, writer, "wait", until="in-sync"))["result"]["until"] == "in-sync"
        await ask(reader, writer, "wait", until="connected", remote="beta", timeout=3)
        reply = await ask(reader, writer, "resync", remote="beta", full=True)
        assert reply["result"] == {"remote": "beta", "kind": "full"}
        assert (await ask(reader, writer, "pause", remote="beta"))["result"] == {}
        reply = await ask(reader, writer, "resume", remote="beta")
        assert reply["result"] == {"state": "behind"}
        assert (await ask(reader, writer, "remote.list"))["result"][0]["name"] == "beta"
        await ask(reader, writer, "remote.add", name="gamma", address="tcp:c:1")
        assert node.calls == [
            ("wait", "in-sync", None, None),
            ("wait", "connected", "beta", 3),
            ("resync", "beta", True),
            ("resync done", "beta", True),
            ("pause", "beta"),
            ("resume", "beta"),
            ("remote_add", "gamma", "tcp:c:1", "async"),
        ]

    assert run_session(path, session) == []


BAD_CALLS = [
    ("nothing", {}, admin.METHOD_NOT_FOUND, "no method 'nothing'"),
    ("status", {"x": 1}, admin.INVALID_PARAMS, "no parameter 'x'"),
    ("wait", {}, admin.INVALID_PARAMS, "'until' is missing"),
    ("wait", {"until": "soon"}, admin.INVALID_PARAMS, "in-sync or connected or consistent"),
    ("wait", {"until": "in-sync", "timeout": -1}, admin.INVALID_PARAMS, "timeout must be 0"),
    ("wait", {"until": "in-sync", "timeout": 1e300}, admin.INVALID_PARAMS, "timeout must be 0"),
    ("wait", {"until": "in-sync", "timeout": True}, admin.INVALID_PARAMS, "must be a number"),
    ("resync", {"remote": 5}, admin.INVALID_PARAMS, "remote must be a string"),
    ("resync", {"remote": "beta", "full": 1}, admin.INVALID_PARAMS, "must be true or false"),
    ("remote.add", {"name": "a b", "address": "tcp:c:1"}, admin.INVALID_PARAMS, "not a name"),
    ("remote.add", {"name": "a", "address": "c:1"}, admin.INVALID_PARAMS, "tcp:HOST:PORT"),
    (
        "remote.add",
        {"name": "a", "address": "tcp:c:1", "mode": "checkpoint"},
        admin.INVALID_PARAMS,
        "mode must be async or sync",
    ),
    (
        "remote.add",
        {"name": "a", "address": "tcp:c:1", "on_link_loss": "hold"},
        admin.INVALID_PARAMS,
        "on_link_loss is for a remote of mode sync",
    ),
    ("facet.offline", {"path": "data.img"}, admin.INVALID_PARAMS, "an absolute path"),
    ("facet.add", {"path": "/x"}, admin.INVALID_PARAMS, "'volume' is missing"),
    ("log.replace", {}, admin.INVALID_PARAMS, "'path' is missing"),
    ("events", {"since": -1}, admin.INVALID_PARAMS, "since must be 0"),
    ("events", {"since": 1.5}, admin.INVALID_PARAMS, "must be an integer"),
    ("pause", {"remote": "nobody"}, 1001, "there is no remote nobody"),
    ("remote.remove", {"name": "beta"}, 1004, "not in sync"),
]


@pytest.mark.parametrize(("method", "params", "code", "problem"), BAD_CALLS)
def test_bad_calls_get_an_error_and_the_connection_lives(
    path: Path, method: str, params: dict[str, Any], code: int, problem: str
) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        reply = await ask(reader, writer, method, **params)
        assert reply["id"] == 1
        assert reply["error"]["code"] == code
        assert problem in reply["error"]["message"]
        assert node.calls == []
        assert "result" in await ask(reader, writer, "status")

    assert run_session(path, session) == []


def test_infinity_is_no_timeout(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        assert json.loads("1e999") == math.inf
        writer.write(
            b'{"jsonrpc":"2.0","id":1,"method":"wait",'
            b'"params":{"until":"in-sync","timeout":1e999}}\n'
        )
        assert (await receive(reader))["error"]["code"] == admin.INVALID_PARAMS

    run_session(path, session)


def test_a_line_that_is_no_request_is_answered_with_id_null(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        writer.write(b"hello\n")
        reply = await receive(reader)
        assert reply["id"] is None
        assert reply["error"]["code"] == admin.PARSE_ERROR
        assert "result" in await ask(reader, writer, "status")

    run_session(path, session)


def test_a_line_past_the_limit_is_refused_and_the_connection_closed(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        writer.write(b"x" * 2000)
        assert "longer than 1024 bytes" in (await receive(reader))["error"]["message"]
        assert await reader.read() == b""

    run_session(path, session, Limits(admin_line_bytes_max=1024))


def test_requests_sent_ahead_are_answered_in_order_one_at_a_time(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        send(writer, "wait", 1, until="in-sync")
        send(writer, "resync", 2, remote="beta")
        send(writer, "status", 3)
        send(writer, "status", 4)
        await asyncio.get_running_loop().run_in_executor(None, node.waiting.wait, 10)
        assert len(node.calls) == 1
        node.in_sync.set()
        assert [(await receive(reader))["id"] for _ in range(4)] == [1, 2, 3, 4]

    run_session(path, session)


def test_too_many_requests_sent_ahead_close_the_connection(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        for number in range(10):
            send(writer, "wait", number, until="in-sync")
        assert "more than 4 requests" in (await receive(reader))["error"]["message"]
        assert await reader.read() == b""

    run_session(path, session, Limits(admin_requests_max=4))


def test_too_many_connections_are_refused(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        await ask(reader, writer, "status")
        other, other_writer = await asyncio.open_unix_connection(str(path))
        assert "1 admin connections already" in (await receive(other))["error"]["message"]
        assert await other.read() == b""
        other_writer.close()
        assert "result" in await ask(reader, writer, "status")

    run_session(path, session, Limits(admin_connections_max=1))


def test_a_client_that_hangs_up_ends_its_wait(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        send(writer, "wait", until="in-sync")
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, node.waiting.wait, 10)
        writer.close()
        assert await loop.run_in_executor(None, node.cancelled.wait, 10)

    assert run_session(path, session) == []


def test_a_change_is_carried_out_though_the_client_hangs_up(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        node.resync_gate = asyncio.Event()
        send(writer, "resync", remote="beta")
        while not node.calls:
            await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()
        node.resync_gate.set()
        page = await node.events.follow(0)
        assert page.events[0]["error"] is None
        assert node.calls[-1] == ("resync done", "beta", False)

    assert run_session(path, session) == []


def test_a_change_is_carried_out_that_follows_a_stream_which_has_ended(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        node.resync_gate = asyncio.Event()
        send(writer, "events", 1, follow=False)
        send(writer, "resync", 2, remote="beta")  # sent ahead
        while not node.calls:
            await asyncio.sleep(0)
        writer.close()
        # By the time that somebody else is answered the end of this connection was seen.
        others_reader, other = await asyncio.open_unix_connection(str(path))
        await ask(others_reader, other, "status")
        other.close()
        node.resync_gate.set()
        page = await node.events.follow(0)
        assert page.events[0]["error"] is None
        assert node.calls[-1] == ("resync done", "beta", False)

    assert run_session(path, session) == []


def test_a_client_that_only_sends_is_answered(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        send(writer, "status", 1)
        send(writer, "remote.list", 2)
        writer.write_eof()
        replies = [json.loads(line) for line in (await reader.read()).splitlines()]
        assert [reply["id"] for reply in replies] == [1, 2]

    run_session(path, session)


def test_a_request_without_id_is_carried_out_and_not_answered(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        writer.write(b'{"jsonrpc":"2.0","method":"resume","params":{"remote":"beta"}}\n')
        reply = await ask(reader, writer, "status", remote="x")
        assert reply["error"]["code"] == admin.INVALID_PARAMS
        assert node.calls == [("resume", "beta")]

    run_session(path, session)


def test_changes_become_events_with_the_uid_of_the_peer(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        await ask(reader, writer, "status")
        await ask(reader, writer, "pause", remote="beta")
        await ask(reader, writer, "remote.remove", name="beta")
        events = node.events.since(0).events
        assert [
            (event["kind"], event["method"], event["params"], event["uid"], event["error"])
            for event in events
        ] == [
            ("admin", "pause", {"remote": "beta"}, 1000, None),
            ("admin", "remote.remove", {"name": "beta"}, 1000, "beta is not in sync"),
        ]

    run_session(path, session)


def test_a_defect_of_the_node_is_told_to_both_sides(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        reply = await ask(reader, writer, "remote.remove", name="bug")
        assert reply["error"]["code"] == admin.INTERNAL_ERROR
        assert reply["error"]["data"]["exit_code"] == 1
        assert "result" in await ask(reader, writer, "status")

    defects = run_session(path, session)
    assert isinstance(defects[0]["exception"], ZeroDivisionError)


def test_events_replay_then_stream(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        first = node.events.emit("one")
        node.events.emit("two")
        send(writer, "events", since=first["cursor"])
        line = await receive(reader)
        assert (line["method"], line["params"]["kind"]) == ("event", "two")
        reply = await receive(reader)
        assert reply["result"] == {"cursor": node.events.cursor, "following": True}
        node.events.emit("three")
        node.events.emit("four")
        assert [(await receive(reader))["params"]["kind"] for _ in range(2)] == ["three", "four"]

    assert run_session(path, session) == []


def test_events_without_following_and_with_a_gap(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        for number in range(350):
            node.events.emit("n", number=number)
        send(writer, "events", since=1, follow=False)
        lines = [await receive(reader) for _ in range(102)]
        assert lines[0]["params"]["kind"] == "gap"
        assert [line["params"]["number"] for line in lines[1:101]] == list(range(250, 350))
        assert lines[101]["result"]["following"] is False
        assert "result" in await ask(reader, writer, "status")

    run_session(path, session)


def test_a_reader_of_events_that_does_not_read_costs_bounded_memory(path: Path) -> None:
    async def session(node: FakeNode, reader: Any, writer: Any) -> None:
        send(writer, "events")
        assert (await receive(reader))["result"]["following"]
        transport = writer.transport
        transport.pause_reading()
        for number in range(3000):
            node.events.emit("n", number=number, text="x" * 1000)
            if number % 10 == 0:
                await asyncio.sleep(0)
        transport.resume_reading()
        numbers: list[Any] = []
        while not numbers or numbers[-1] != 2999:
            numbers.append((await receive(reader))["params"].get("number", "gap"))
        assert "gap" in numbers
        assert len(numbers) < 1500

    assert run_session(path, session) == []
