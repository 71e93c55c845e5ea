"""The NBD server session under any split of the stream and under any garbage (fault 36)."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmirror.codec.batch import singly
from nbdmirror.codec.nbd import ExportInfo, Request
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.config import KIB, MIB, Limits
from tests.unit import nbdclient as c

EXPORT = ExportInfo("data", MIB, contexts=("base:allocation", "nbdmirror:dirty:beta"))
FROZEN = ExportInfo("frozen", MIB, read_only=True)
EXPORTS = {"": EXPORT, "data": EXPORT, "frozen": FROZEN}
LIMITS = Limits(options_max=8, request_bytes_max=64 * KIB)
PIECES = 2000

Event = tuple[int, int, int, int, int, bytes | None]

names = st.sampled_from(["", "data", "frozen", "nosuch"])
infos = st.lists(st.integers(0, 4), max_size=3)
queries = st.lists(
    st.sampled_from(["base:", "base:allocation", "nbdmirror:dirty:beta", "x-a:b"]), max_size=3
)
options = st.one_of(
    st.builds(c.option, st.integers(0, 12), st.binary(max_size=40)),
    st.builds(lambda n, i, o: c.go(n, i, o), names, infos, st.sampled_from([c.INFO, c.GO])),
    st.builds(lambda o, n, q: c.meta(o, n, *q), st.sampled_from([9, 10]), names, queries),
    st.just(c.option(c.STRUCTURED)),
    st.just(c.option(c.GO, bytes(70_000))),
)


def _request(command: int, offset: int, length: int, flags: int, cookie: int, fill: bytes) -> bytes:
    payload = fill * length if command == c.WRITE else b""
    return c.request(command, offset, length, flags=flags, cookie=cookie, payload=payload)


requests = st.builds(
    _request,
    st.sampled_from([0, 1, 1, 1, 3, 4, 5, 6, 7, 8]),
    st.one_of(st.integers(0, MIB), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 5000), st.sampled_from([65_536, 65_537, 100_000])),
    st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32]),
    st.integers(0, 2**64 - 1),
    st.binary(min_size=1, max_size=1),
)
conversations = st.builds(
    lambda flags, before, name, after, tail: b"".join(
        [c.client_flags(flags), *before, c.go(name), *after, tail]
    ),
    st.sampled_from([3, 3, 3, 1, 0, 7]),
    st.lists(options, max_size=5),
    st.sampled_from(["data", "data", "frozen"]),
    st.lists(requests, max_size=12),
    st.one_of(st.just(b""), st.just(c.request(c.DISC)), st.binary(max_size=60)),
)


def new_session() -> ServerSession:
    return ServerSession(EXPORTS.get, lambda: [EXPORT, FROZEN], LIMITS)


def feed(session: ServerSession, data: bytes, sizes: Sequence[int]) -> tuple[list[Event], bytes]:
    """Feeds in pieces of these sizes, over and over; returns requests and output.

    Requests are answered after the last byte: what the session refuses, it answers at once."""
    events: list[Event] = []
    pending: list[Request] = []
    output = bytearray()
    at = turn = 0
    while at < len(data):
        space = session.get_buffer(-1)
        assert 0 < len(space) <= 300 * KIB
        part = data[at : at + min(len(space), sizes[turn % len(sizes)])]
        space[: len(part)] = part
        at, turn = at + len(part), turn + 1
        for request in singly(session.received(len(part))):
            payload = None if request.payload is None else bytes(request.payload)
            fields = (request.type, request.flags, request.cookie, request.offset, request.length)
            events.append((*fields, payload))
            assert request.offset + request.length <= MIB
            assert (payload is not None) == (request.type == c.WRITE)
            assert payload is None or len(payload) == request.length
            pending.append(request)
        output += b"".join(session.take_output())
    # Plain writes come behind what they were received with: which that is depends on the split.
    for request in sorted(pending, key=lambda one: (one.cookie, one.type, one.offset, one.length)):
        answer(session, request)
    output += b"".join(session.take_output())
    return sorted(events, key=repr), bytes(output)


def answer(session: ServerSession, request: Request) -> None:
    """Every request succeeds, with as much data and as many extents as it may have."""
    if request.type == c.READ:
        session.reply_read(request, b"r" * request.length)
    elif request.type == c.BLOCK_STATUS:
        extents = [(512, 0), (512, 3), (2**40, 1)]
        session.reply_block_status(request, dict.fromkeys(session.contexts, extents))
    else:
        session.reply(request)


def state(session: ServerSession) -> tuple[object, ...]:
    return (
        session.export,
        session.contexts,
        session.structured,
        session.disconnect_requested,
        session.closing_reason,
    )


@given(conversations, st.lists(st.integers(1, 9000), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_any_split_gives_the_same_requests_and_answers(data: bytes, sizes: list[int]) -> None:
    whole, split = new_session(), new_session()
    assert feed(whole, data, [1 << 30]) == feed(split, data, sizes)
    assert state(whole) == state(split)


@given(conversations.filter(lambda data: len(data) < 20_000))
@settings(max_examples=25, deadline=None)
def test_byte_by_byte_gives_the_same(data: bytes) -> None:
    whole, split = new_session(), new_session()
    assert feed(whole, data, [1 << 30]) == feed(split, data, [1])
    assert state(whole) == state(split)


@given(
    st.sampled_from([b"", c.client_flags(), c.client_flags() + c.go("data")]),
    st.lists(st.one_of(st.binary(max_size=300), options, requests), max_size=10),
    st.lists(st.integers(1, 5000), min_size=1, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_garbage_never_raises(start: bytes, parts: list[bytes], sizes: list[int]) -> None:
    data = start + b"".join(parts)
    # Pieces of any size, but not tens of thousands of them: a long payload is the same all along.
    feed(new_session(), data, [max(size, len(data) // PIECES) for size in sizes])


@given(st.data(), conversations)
@settings(max_examples=100, deadline=None)
def test_a_flipped_byte_never_raises(draw: st.DataObject, data: bytes) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, min(len(data), 600) - 1))] = draw.draw(st.integers(0, 255))
    feed(new_session(), bytes(damaged), [4000])


@given(
    st.lists(
        st.tuples(st.sampled_from([c.WRITE, c.READ, c.TRIM]), st.integers(0, 2**32 - 1)),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=40, deadline=None)
def test_a_claimed_length_takes_no_memory_by_itself(claims: list[tuple[int, int]]) -> None:
    tracemalloc.start()
    try:
        for command, length in claims:
            session = new_session()
            feed(session, c.client_flags() + c.go("data"), [1 << 30])
            feed(session, c.request(command, 0, length), [1 << 30])
            session.get_buffer(-1)
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


@given(st.lists(requests, min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_payloads_stay_as_they_came(parts: list[bytes]) -> None:
    """Later bytes never overwrite a payload that somebody still holds."""
    session = new_session()
    feed(session, c.client_flags() + c.go("data"), [1 << 30])
    held: list[tuple[memoryview, bytes]] = []
    for part in parts * 3:
        rest = part
        while rest:
            space = session.get_buffer(-1)
            piece = rest[: len(space)]
            space[: len(piece)] = piece
            for request in singly(session.received(len(piece))):
                if request.payload is not None:
                    held.append((request.payload, bytes(request.payload)))
            rest = rest[len(piece) :]
    assert all(view == copy for view, copy in held)
