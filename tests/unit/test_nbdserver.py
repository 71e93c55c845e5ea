"""The NBD server session in memory, in transmission: every command and refusal, and what memory
they take.

Holds faults 36 (hostile requests) and 37 (a client that dies in the middle)."""

from __future__ import annotations

import errno

import pytest

from nbdmirror.codec import nbd, nbdreply, nbdslab
from nbdmirror.codec.nbd import Request, wire_errno
from nbdmirror.config import KIB, MIB
from tests.unit import nbdclient as c
from tests.unit.nbdsession import (
    DIRTY,
    SIZE,
    VAST,
    attached,
    content,
    greeted,
)

# -- requests -------------------------------------------------------------------------------------


def test_every_command_reaches_the_engine() -> None:
    client = attached(structured=True, contexts=["base:allocation"])
    sent = [
        (c.READ, c.DF | c.FUA, 512, 1024),
        (c.WRITE, c.FUA, 0, 4),
        (c.FLUSH, c.FUA, 0, 0),
        (c.TRIM, c.FUA, 0, SIZE),
        (c.CACHE, c.FUA, 1, 1),
        (c.WRITE_ZEROES, c.FUA | c.NO_HOLE | c.FAST_ZERO, 0, SIZE),
        (c.BLOCK_STATUS, c.FUA | c.REQ_ONE, 0, SIZE),
    ]
    data = b"".join(
        c.request(command, offset, length, flags=flags, payload=b"abcd" * (command == c.WRITE))
        for command, flags, offset, length in sent
    )
    requests = client.send(data)
    assert [(r.type, r.flags, r.offset, r.length) for r in requests] == sent
    assert [r.payload for r in requests if r.type != c.WRITE] == [None] * 6
    assert content(requests[1]) == b"abcd" and not client.replies()


def test_a_cookie_is_opaque() -> None:
    client = attached()
    request = client.one(c.request(c.FLUSH, cookie=2**64 - 1))
    client.session.reply(request)
    assert client.replies() == [c.Simple(2**64 - 1, 0)]


@pytest.mark.parametrize(
    "export, command, flags, offset, length, number",
    [
        ("data", c.READ, 0, SIZE, 1, errno.EINVAL),
        ("data", c.READ, 0, 2**64 - 1, 2, errno.EINVAL),
        ("data", c.TRIM, 0, SIZE - 1, 2, errno.EINVAL),
        ("data", c.CACHE, 0, SIZE, 1, errno.EINVAL),
        ("data", c.BLOCK_STATUS, 0, SIZE, 1, errno.EINVAL),
        ("data", c.WRITE, 0, SIZE - 1, 2, errno.ENOSPC),
        ("data", c.WRITE, 0, 2**64 - 1, 2, errno.ENOSPC),
        ("data", c.WRITE_ZEROES, 0, SIZE - 1, 2, errno.ENOSPC),
        ("data", c.WRITE_ZEROES, 0, 0, 2**32 - 1, errno.ENOSPC),
        ("coarse", c.READ, 0, 512, 4096, errno.EINVAL),
        ("coarse", c.READ, 0, 0, 512, errno.EINVAL),
        ("coarse", c.WRITE, 0, 0, 512, errno.EINVAL),
        ("coarse", c.TRIM, 0, 0, 512, errno.EINVAL),
        ("data", 8, 0, 0, 0, errno.EINVAL),
        ("data", 0xFFFF, 0, 0, 512, errno.EINVAL),
        ("data", c.READ, c.NO_HOLE, 0, 512, errno.EINVAL),
        ("data", c.WRITE, 0x20, 0, 512, errno.EINVAL),
        ("data", c.WRITE, c.NO_HOLE, 0, 512, errno.EINVAL),
        ("data", c.WRITE, 0x8000, 0, 512, errno.EINVAL),
        ("data", c.FLUSH, c.REQ_ONE, 0, 0, errno.EINVAL),
        ("data", c.FLUSH, 0, 512, 0, errno.EINVAL),
        ("data", c.FLUSH, 0, 0, 512, errno.EINVAL),
        ("data", c.TRIM, c.FAST_ZERO, 0, 512, errno.EINVAL),
        ("data", c.BLOCK_STATUS, c.DF, 0, 512, errno.EINVAL),
        ("data", c.BLOCK_STATUS, 0, 0, 512, errno.EINVAL),  # no context
        ("frozen", c.WRITE, 0, 0, 512, errno.EPERM),
        ("frozen", c.TRIM, 0, 0, 512, errno.EPERM),
        ("frozen", c.WRITE_ZEROES, 0, 0, 512, errno.EPERM),
        ("frozen", c.WRITE_ZEROES, c.FAST_ZERO, 0, 512, errno.EINVAL),  # not advertised
        ("data", c.WRITE, 0, 0, 3 * MIB, errno.EINVAL),
        ("data", c.READ, 0, 0, 3 * MIB, errno.EOVERFLOW),
    ],
)
@pytest.mark.parametrize("structured", [False, True])
def test_refused_requests(
    export: str,
    command: int,
    flags: int,
    offset: int,
    length: int,
    number: int,
    structured: bool,
) -> None:
    client = attached(export, structured=structured, request_bytes_max=2 * MIB)
    payload = bytes(length) if command == c.WRITE else b""
    header = c.request(command, offset, length, flags=flags, cookie=5)
    assert client.send(header + payload) == []
    (reply,) = client.replies()
    if structured:
        assert isinstance(reply, c.Chunk) and reply.done and reply.cookie == 5
        assert reply.error[0] == number and reply.error[1]
    else:
        assert reply == c.Simple(5, number)
    assert client.one(c.request(c.READ, 0, 4096, cookie=6)).cookie == 6


def test_df_needs_structured_replies() -> None:
    client = attached()
    assert client.send(c.request(c.READ, 0, 512, flags=c.DF)) == []
    assert client.replies() == [c.Simple(1, errno.EINVAL)]


@pytest.mark.parametrize("name", ["data", "frozen", "coarse"])
def test_zero_length_requests_do_no_harm(name: str) -> None:
    client = attached(name)
    commands = [c.READ, c.CACHE]
    commands += [c.WRITE, c.TRIM, c.WRITE_ZEROES] if name != "frozen" else []
    for command in commands:
        request = client.one(c.request(command, SIZE))
        assert (request.type, request.length) == (command, 0)
        client.session.reply(request)
        assert client.replies() == [c.Simple(1, 0)]


def test_zero_length_block_status_is_refused() -> None:
    client = attached(structured=True, contexts=["base:allocation"])
    assert client.send(c.request(c.BLOCK_STATUS)) == []
    assert [r.error[0] for r in client.replies() if isinstance(r, c.Chunk)] == [errno.EINVAL]


@pytest.mark.parametrize("length", [0, 1, 4096, 256 * KIB, 2 * MIB])
def test_a_payload_is_a_view_that_stays(length: int) -> None:
    client = attached()
    payload = bytes(range(256)) * (length // 256) + bytes(length % 256)
    first = client.one(c.request(c.WRITE, payload=payload))
    for _ in range(5):
        client.one(c.request(c.WRITE, payload=b"\xff" * 100_000))
    assert isinstance(first.payload, memoryview) and content(first) == payload


def test_requests_longer_than_advertised_are_taken() -> None:
    client = attached("vast")
    request = client.one(c.request(c.WRITE, payload=bytes(48_000_000)))
    assert request.length == 48_000_000
    request = client.one(c.request(c.READ, length=64 * MIB))
    assert request.length == 64 * MIB
    for command in (c.TRIM, c.WRITE_ZEROES, c.CACHE):
        assert client.one(c.request(command, length=2**32 - 1)).length == 2**32 - 1


def test_memory_is_bounded_by_what_was_checked() -> None:
    client = attached()
    assert len(client.session.get_buffer(-1)) <= nbdslab.SLAB_BYTES
    header = c.request(c.WRITE, 0, 2 * MIB)
    client.send(header)
    assert len(client.session.get_buffer(-1)) == 2 * MIB
    refused = attached(request_bytes_max=MIB)
    refused.send(header)
    assert len(refused.session.get_buffer(-1)) <= nbdslab.SLAB_BYTES
    waiting = greeted()
    assert len(waiting.session.get_buffer(-1)) <= nbdslab.SMALL_SLAB_BYTES


def test_a_refused_payload_takes_no_memory_and_the_next_request_is_seen() -> None:
    client = attached("frozen")
    client.send(c.request(c.WRITE, 0, nbd.SWALLOW_MAX))
    space = client.session.get_buffer(-1)
    left = nbd.SWALLOW_MAX
    while left > len(space):
        assert client.session.received(len(space)) == []
        left -= len(space)
        again = client.session.get_buffer(-1)
        assert again.obj is space.obj and len(again) == len(space)
    assert client.send(bytes(left)) == []
    assert client.replies() == [c.Simple(1, errno.EPERM)]
    assert client.one(c.request(c.READ, length=1)).length == 1


def test_a_refused_payload_that_is_absurd_closes() -> None:
    client = attached("frozen")
    assert client.send(c.request(c.WRITE, 0, nbd.SWALLOW_MAX + 1)) == []
    assert client.session.closing and "read-only" in str(client.session.closing_reason)


def test_a_partial_payload_is_never_a_request() -> None:
    """Fault 37: a client that dies in the middle of a write."""
    client = attached()
    whole = c.request(c.WRITE, payload=b"x" * 5000)
    assert client.send(whole[:-1]) == []
    request = client.one(whole[-1:])
    assert content(request) == b"x" * 5000


def test_wrong_request_magic_closes_after_what_came_before() -> None:
    client = attached()
    requests = client.send(c.request(c.FLUSH, cookie=9) + c.request(c.FLUSH, magic=0x25609514))
    assert [request.cookie for request in requests] == [9]
    assert client.session.closing and "0x25609514" in str(client.session.closing_reason)
    assert client.send(c.request(c.FLUSH)) == []


def test_disconnect_leaves_what_is_outstanding_to_be_answered() -> None:
    client = attached()
    data = c.request(c.FLUSH) + c.request(c.DISC, cookie=2) + c.request(c.FLUSH, cookie=3)
    (request,) = client.send(data)
    assert client.session.disconnect_requested and not client.session.closing
    assert client.send(c.request(c.FLUSH)) == []
    client.session.reply(request)
    assert client.replies() == [c.Simple(1, 0)]


def test_shutdown_refuses_later_requests_and_swallows_their_payload() -> None:
    client = attached()
    early = client.one(c.request(c.READ, length=4))
    client.session.shutdown()
    later = c.request(c.WRITE, payload=bytes(70_000), cookie=2) + c.request(c.FLUSH, cookie=3)
    assert client.send(later) == []
    client.session.reply_read(early, b"data")
    client.parser.reads[1] = 4
    assert client.replies() == [
        c.Simple(2, errno.ESHUTDOWN),
        c.Simple(3, errno.ESHUTDOWN),
        c.Simple(1, 0, b"data"),
    ]


# -- replies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, wire",
    [
        (0, 0),
        (errno.EPERM, 1),
        (errno.EIO, 5),
        (errno.ENOMEM, 5),
        (errno.EINVAL, 22),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EOVERFLOW, 75),
        (errno.ENOTSUP, 95),
        (errno.EOPNOTSUPP, 95),
        (errno.ESHUTDOWN, 108),
        (errno.EBADF, 5),
        (-1, 5),
        (10**9, 5),
    ],
)
def test_error_numbers_on_the_wire(number: int, wire: int) -> None:
    assert wire_errno(number) == wire
    client = attached()
    client.session.reply(client.one(c.request(c.FLUSH)), number)
    assert client.replies() == [c.Simple(1, wire)]


def test_reply_many_is_one_piece() -> None:
    client = attached(structured=True)
    requests = [Request(c.WRITE, 0, cookie, 0, 1) for cookie in range(64)]
    client.session.reply_many(requests)
    (piece,) = client.session.take_output()
    client.parser.data += piece
    assert client.replies() == [c.Simple(cookie, 0) for cookie in range(64)]
    assert client.session.take_output() == []


def test_simple_read() -> None:
    client = attached()
    request = client.one(c.request(c.READ, 4096, 6, cookie=3))
    client.parser.reads[3] = 6
    data = memoryview(b"abcdef")
    client.session.reply_read(request, data)
    output = client.session.take_output()
    assert output[1] is data  # passed on, not copied
    client.parser.data += b"".join(output)
    assert client.replies() == [c.Simple(3, 0, b"abcdef")]
    client.session.reply_read_extents(request, [(4096, 2, b"ab"), (4098, 4, None)])
    assert client.replies() == [c.Simple(3, 0, b"ab\0\0\0\0")]
    client.session.reply(request, errno.EIO)
    assert client.replies() == [c.Simple(3, errno.EIO)]


def test_holes_of_simple_reads_take_no_memory() -> None:
    client = attached()
    request = client.one(c.request(c.READ, 0, 5 * MIB + 1))
    client.session.reply_read_extents(request, [(0, 5 * MIB + 1, None)])
    output = client.session.take_output()
    assert sum(map(len, output)) == 16 + 5 * MIB + 1
    assert all(
        piece.obj is nbdreply._ZEROS.obj for piece in output[1:] if isinstance(piece, memoryview)
    )


def test_structured_read_has_data_and_holes() -> None:
    client = attached(structured=True)
    request = client.one(c.request(c.READ, 512, 1536))
    client.session.reply_read_extents(
        request, [(512, 512, b"a" * 512), (1024, 512, None), (1536, 512, b"b" * 512)]
    )
    chunks = client.replies()
    kinds = [chunk.kind for chunk in chunks if isinstance(chunk, c.Chunk)]
    assert kinds == [c.OFFSET_DATA, c.OFFSET_HOLE, c.OFFSET_DATA]
    assert c.assemble(chunks, 512, 1536) == b"a" * 512 + bytes(512) + b"b" * 512
    client.session.reply_read(request, b"c" * 1536)
    assert c.assemble(client.replies(), 512, 1536) == b"c" * 1536


def test_df_read_is_one_chunk() -> None:
    client = attached(structured=True)
    request = client.one(c.request(c.READ, 0, 65_536, flags=c.DF))
    client.session.reply_read_extents(request, [(0, 65_535, None), (65_535, 1, b"x")])
    chunks = client.replies()
    assert len(chunks) == 1 and isinstance(chunks[0], c.Chunk)
    assert chunks[0].kind == c.OFFSET_DATA
    assert c.assemble(chunks, 0, 65_536) == bytes(65_535) + b"x"
    client.session.reply_read_extents(request, [(0, 65_536, None)])
    assert c.assemble(client.replies(), 0, 65_536) == bytes(65_536)


def test_zero_length_structured_read_is_an_empty_success() -> None:
    client = attached(structured=True)
    request = client.one(c.request(c.READ))
    client.session.reply_read(request, b"")
    client.session.reply_read_extents(request, [])
    client.session.reply(request)
    assert client.replies() == [c.Chunk(1, c.NONE, True, b"")] * 3


def test_failed_structured_read_is_an_error_chunk() -> None:
    client = attached(structured=True)
    client.session.reply(client.one(c.request(c.READ, 0, 512)), errno.EIO, "both facets failed")
    (chunk,) = client.replies()
    assert isinstance(chunk, c.Chunk) and chunk.done
    assert chunk.error == (errno.EIO, "both facets failed")


@pytest.mark.parametrize(
    "flags, extents, expected",
    [
        (0, [(4096, 0), (4096, 3)], [(4096, 0), (4096, 3)]),
        (0, [(2**40, 0)], [(8192, 0)]),
        (0, [(4096, 3), (2**33, 3)], [(8192, 3)]),
        (0, [(1024, 0), (0, 3), (1024, 0)], [(2048, 0)]),
        (c.REQ_ONE, [(4096, 0), (4096, 3)], [(4096, 0)]),
        (c.REQ_ONE, [(4096, 0), (4096, 0)], [(8192, 0)]),
        (c.REQ_ONE, [(2**63, 1)], [(8192, 1)]),
    ],
)
def test_block_status_never_says_more_than_was_asked(
    flags: int, extents: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    client = attached(structured=True, contexts=["base:allocation"])
    request = client.one(c.request(c.BLOCK_STATUS, 0, 8192, flags=flags))
    client.session.reply_block_status(request, {"base:allocation": extents, DIRTY: [(1, 1)]})
    (chunk,) = client.replies()
    assert isinstance(chunk, c.Chunk) and chunk.done
    assert chunk.extents == (1, expected)


def test_block_status_near_32_bits() -> None:
    """A request of nearly 4 GiB and one extent beyond it (what aborts another server)."""
    request = Request(c.BLOCK_STATUS, 0, 1, 0, 2**32 - 1)
    chunks = nbdreply.block_status(request, VAST, VAST.contexts, {"base:allocation": [(2**46, 3)]})
    parser = c.ReplyParser(bytearray(b"".join(chunks)))
    (chunk,) = parser.replies()
    assert isinstance(chunk, c.Chunk) and chunk.extents == (1, [(2**32 - 1, 3)])


def test_block_status_of_a_shattered_range_is_bounded() -> None:
    client = attached(structured=True, contexts=["base:allocation"])
    request = client.one(c.request(c.BLOCK_STATUS, 0, MIB))
    extents = ((1, at & 1) for at in range(MIB))
    client.session.reply_block_status(request, {"base:allocation": extents})
    (chunk,) = client.replies()
    assert isinstance(chunk, c.Chunk) and len(chunk.extents[1]) == nbd.EXTENTS_MAX


def test_block_status_has_a_chunk_for_each_context() -> None:
    client = attached(structured=True, contexts=[DIRTY, "base:allocation"])
    request = client.one(c.request(c.BLOCK_STATUS, 0, 8192))
    extents = {"base:allocation": [(8192, 3)], DIRTY: [(4096, 1), (4096, 0)]}
    client.session.reply_block_status(request, extents)
    first, second = client.replies()
    assert isinstance(first, c.Chunk) and isinstance(second, c.Chunk)
    assert (first.extents, first.done) == ((1, [(8192, 3)]), False)
    assert (second.extents, second.done) == ((2, [(4096, 1), (4096, 0)]), True)
