"""The NBD server session in memory: every option, command and refusal, and what memory they take.

Holds faults 36 (hostile handshakes and requests) and 37 (a client that dies in the middle)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

import pytest

from nbdmirror.codec import nbd, nbdreply, nbdslab
from nbdmirror.codec.batch import singly
from nbdmirror.codec.nbd import ExportInfo, Request, wire_errno
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.config import KIB, MIB, Limits
from tests.unit import nbdclient as c

SIZE = 8 * MIB
DIRTY = "nbdmirror:dirty:beta"
DATA = ExportInfo("data", SIZE, description="the data", contexts=("base:allocation", DIRTY))
FROZEN = ExportInfo("frozen", SIZE, read_only=True)
COARSE = ExportInfo("coarse", SIZE, block_min=4096)
VAST = ExportInfo("vast", 1 << 46)
EXPORTS = {export.name: export for export in (DATA, FROZEN, COARSE, VAST)}
FLAGS = 0x0001 | 0x0004 | 0x0008 | 0x0020 | 0x0040 | 0x0100 | 0x0400 | 0x0800
FLAG_READ_ONLY, FLAG_DF = 0x0002, 0x0080


class Client:
    """A session, fed from here, and a parser of what it answers."""

    def __init__(self, **limits: int) -> None:
        self.session = ServerSession(self._find, lambda: list(EXPORTS.values()), Limits(**limits))
        self.parser = c.ReplyParser()
        self.searched: list[str] = []

    def _find(self, name: str) -> ExportInfo | None:
        self.searched.append(name)
        return EXPORTS.get(name or "data")

    def send(self, data: bytes) -> list[Request]:
        """Feeds bytes; returns the requests that came out."""
        requests: list[Request] = []
        rest = memoryview(data)
        while rest:
            space = self.session.get_buffer(-1)
            part = rest[: len(space)]
            space[: len(part)] = part
            requests += singly(self.session.received(len(part)))
            rest = rest[len(part) :]
            self.parser.data += b"".join(self.session.take_output())
        return requests

    def options(self, data: bytes) -> list[c.OptionReply]:
        """Feeds options; returns all replies, and there is nothing else."""
        assert self.send(data) == []
        replies = self.parser.option_replies()
        assert not self.parser.data
        return replies

    def kinds(self, data: bytes) -> list[int]:
        """Feeds options; returns the kinds of the replies."""
        return [reply.kind for reply in self.options(data)]

    def replies(self) -> list[c.Reply]:
        """What was answered to requests since the last time."""
        self.parser.data += b"".join(self.session.take_output())
        return self.parser.replies()

    def one(self, data: bytes) -> Request:
        """Feeds what is one valid request."""
        requests = self.send(data)
        assert len(requests) == 1 and not self.parser.data
        return requests[0]


def greeted(flags: int = 3, **limits: int) -> Client:
    """A client in the option stage."""
    client = Client(**limits)
    assert client.send(c.client_flags(flags)) == []
    return client


def attached(
    name: str = "data", *, structured: bool = False, contexts: Sequence[str] = (), **limits: int
) -> Client:
    """A client in transmission."""
    client = greeted(**limits)
    if structured:
        assert client.kinds(c.option(c.STRUCTURED)) == [c.ACK]
    if contexts:
        assert client.kinds(c.meta(c.SET_META, name, *contexts))[-1] == c.ACK
    assert client.kinds(c.go(name)) == [c.REP_INFO, c.ACK]
    assert client.session.in_transmission
    return client


def content(request: Request) -> bytes:
    """The payload of a write."""
    assert request.payload is not None
    return bytes(request.payload)


# -- handshake ------------------------------------------------------------------------------------


def test_greeting() -> None:
    assert ServerSession.greeting == b"NBDMAGIC" + b"IHAVEOPT" + b"\0\3"


@pytest.mark.parametrize("flags", [4, 0x8000_0003, 0xFFFF_FFFF])
def test_flags_that_were_not_offered_end_the_connection(flags: int) -> None:
    client = greeted(flags)
    assert client.session.closing and f"{flags:#x}" in str(client.session.closing_reason)
    assert client.send(c.go("data")) == [] and not client.parser.data


@pytest.mark.parametrize("flags, padding", [(3, 0), (1, 124), (0, 124), (2, 0)])
def test_export_name(flags: int, padding: int) -> None:
    client = greeted(flags)
    client.send(c.option(c.EXPORT_NAME, b"data"))
    assert bytes(client.parser.data) == struct.pack(">QH", SIZE, FLAGS) + bytes(padding)
    assert client.session.export is DATA and client.session.in_transmission


@pytest.mark.parametrize("name", [b"nosuch", b"\xff", b"da\0ta", b"x" * 4097, b"x" * 70_000])
def test_export_name_that_cannot_be_served_closes(name: bytes) -> None:
    client = greeted()
    assert client.options(c.option(c.EXPORT_NAME, name)) == []
    assert client.session.closing and not client.session.in_transmission


def test_without_fixed_newstyle_only_export_name_is_an_option() -> None:
    client = greeted(0)
    assert client.options(c.option(c.LIST)) == []
    assert client.session.closing


@pytest.mark.parametrize("data", [b"", b"goodbye"])
def test_abort_is_acknowledged_and_closes(data: bytes) -> None:
    client = greeted()
    assert client.options(c.option(c.ABORT, data)) == [c.OptionReply(c.ABORT, c.ACK, b"")]
    assert client.session.closing


def test_abort_with_absurd_data_is_acknowledged_at_once() -> None:
    client = greeted()
    assert client.kinds(c.option(c.ABORT, length=0xFFFF_FFFF)) == [c.ACK]
    assert client.session.closing


def test_list() -> None:
    client = greeted()
    replies = client.options(c.option(c.LIST))
    assert [reply.kind for reply in replies] == [c.SERVER] * 4 + [c.ACK]
    assert replies[0].data == c.counted("data") + b"the data"
    assert replies[1].data == c.counted("frozen")


def test_info_and_go_agree_and_go_has_no_padding() -> None:
    client = greeted(flags=1)
    wanted = (1, 2, 3, 99)
    told = client.options(c.go("data", wanted, c.INFO))
    assert not client.session.in_transmission
    went = client.options(c.go("data", wanted))
    assert [reply.data for reply in told] == [reply.data for reply in went]
    assert [reply.data for reply in went] == [
        struct.pack(">HQH", 0, SIZE, FLAGS),
        b"\0\1data",
        b"\0\2the data",
        struct.pack(">HIII", 3, 1, 4096, 32 * MIB),
        b"",
    ]
    assert client.session.export is DATA


def test_only_what_was_asked_for_is_told() -> None:
    assert greeted().kinds(c.go("data")) == [c.REP_INFO, c.ACK]
    assert greeted().kinds(c.go("frozen", (2,))) == [c.REP_INFO, c.ACK]  # it has no description


def test_empty_name_is_the_default_export() -> None:
    client = greeted()
    replies = client.options(c.go("", (1,)))
    assert replies[1].data == b"\0\1data" and client.session.export is DATA
    assert client.searched == [""]


def test_refused_go_leaves_the_session_usable() -> None:
    client = greeted()
    replies = client.options(c.go("nosuch"))
    assert replies[0].kind == c.UNKNOWN and b"'nosuch'" in replies[0].data
    assert client.kinds(c.go("data")) == [c.REP_INFO, c.ACK]


def test_an_error_never_quotes_a_long_name_in_full() -> None:
    replies = greeted().options(c.go("\N{SNOWMAN}" * 1365))
    assert replies[0].kind == c.UNKNOWN and len(replies[0].data) < 4096


@pytest.mark.parametrize(
    "name, structured, flags",
    [
        ("data", False, FLAGS),
        ("data", True, FLAGS | FLAG_DF),
        ("frozen", False, FLAGS & ~0x0860 | FLAG_READ_ONLY),
    ],
)
def test_transmission_flags(name: str, structured: bool, flags: int) -> None:
    client = greeted()
    if structured:
        client.kinds(c.option(c.STRUCTURED))
    replies = client.options(c.go(name, number=c.INFO))
    assert struct.unpack(">HQH", replies[0].data)[2] == flags


def test_rotational_flag() -> None:
    flags = ExportInfo("x", 0, rotational=True).transmission_flags(False)
    assert flags == FLAGS | 0x0010


LONG = struct.pack(">I", 0xFFFF_FFFF)


@pytest.mark.parametrize(
    "number, data, kind",
    [
        (c.LIST, b"x", c.INVALID),
        (c.STRUCTURED, b"x", c.INVALID),
        (c.STARTTLS, b"", c.UNSUP),
        (c.STARTTLS, b"x", c.INVALID),
        (c.EXTENDED, b"", c.UNSUP),
        (4, b"", c.UNSUP),
        (0, b"some data", c.UNSUP),
        (0xFFFF_FFFF, b"\0" * 5000, c.UNSUP),
        (77, b"\0" * 70_000, c.UNSUP),
        (c.GO, b"\0" * 70_000, c.TOO_BIG),
        (c.LIST_META, b"\0" * MIB, c.TOO_BIG),
        (c.GO, b"", c.INVALID),
        (c.GO, b"\0\0\0\4", c.INVALID),
        (c.GO, LONG + b"data\0\0", c.INVALID),
        (c.GO, c.counted("data"), c.INVALID),
        (c.GO, c.counted("data") + b"\0\1", c.INVALID),
        (c.GO, c.info_data("data") + b"\0", c.INVALID),
        (c.GO, c.info_data(b"\xc3\x28"), c.INVALID),
        (c.GO, c.info_data("da\0ta"), c.INVALID),
        (c.GO, c.info_data("x" * 4097), c.INVALID),
        (c.INFO, LONG, c.INVALID),
        (c.INFO, c.info_data("x" * 4096), c.UNKNOWN),
    ],
)
def test_refused_option_keeps_the_stream_in_step(number: int, data: bytes, kind: int) -> None:
    client = greeted()
    replies = client.options(c.option(number, data))
    assert [(reply.option, reply.kind) for reply in replies] == [(number, kind)]
    assert replies[0].data.decode()
    assert client.kinds(c.go("data")) == [c.REP_INFO, c.ACK]


def test_absurd_option_closes_without_taking_memory() -> None:
    client = greeted()
    assert client.options(c.option(c.GO, length=0xFFFF_FFFF)) == []
    assert client.session.closing and "4294967295" in str(client.session.closing_reason)


def test_how_long_an_option_may_be_is_configured() -> None:
    """A longer one is skipped, and the session goes on (I6)."""
    for most in (8 * KIB, 100 * KIB):
        client = greeted(option_bytes_max=most)
        assert client.kinds(c.option(c.GO, bytes(most))) == [c.INVALID]
        (reply,) = client.options(c.option(c.GO, bytes(most + 1)))
        assert reply.kind == c.TOO_BIG and str(most).encode() in reply.data
        assert client.kinds(c.go("data"))[-1] == c.ACK


def test_wrong_option_magic_closes() -> None:
    client = greeted()
    assert client.options(b"IHAVENOT" + bytes(8)) == []
    assert client.session.closing


def test_options_are_counted() -> None:
    client = greeted(options_max=3)
    assert client.kinds(c.option(c.LIST) + c.option(99)) == [c.SERVER] * 4 + [c.ACK, c.UNSUP]
    assert client.kinds(c.option(99, bytes(70_000))) == [c.UNSUP]
    assert client.options(c.option(c.LIST)) == []
    assert client.session.closing


def test_options_and_requests_in_one_segment() -> None:
    client = Client()
    requests = client.send(c.client_flags() + c.go("data") + c.request(c.READ, 0, 512, cookie=7))
    assert [request.cookie for request in requests] == [7]


def test_shutdown_during_the_handshake() -> None:
    client = greeted()
    client.session.shutdown()
    assert client.kinds(c.option(c.LIST)) == [c.SHUTDOWN]
    assert client.kinds(c.go("data")) == [c.SHUTDOWN]
    assert client.kinds(c.option(c.ABORT)) == [c.ACK]


def test_shutdown_closes_on_export_name() -> None:
    client = greeted()
    client.session.shutdown()
    assert client.options(c.option(c.EXPORT_NAME, b"data")) == [] and client.session.closing


# -- meta contexts --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [c.LIST_META, c.SET_META])
def test_contexts_need_structured_replies(number: int) -> None:
    assert greeted().kinds(c.meta(number, "data", "base:allocation")) == [c.INVALID]


@pytest.mark.parametrize(
    "queries, found",
    [
        ((), ["base:allocation", DIRTY]),
        (("base:",), ["base:allocation"]),
        (("base:allocation", "base:"), ["base:allocation"]),
        (("nbdmirror:",), [DIRTY]),
        (("nbdmirror:dirty:",), [DIRTY]),
        (("nbdmirror:dirty:be",), []),
        (("x-other:thing", ""), []),
    ],
)
def test_list_contexts(queries: tuple[str, ...], found: list[str]) -> None:
    client = greeted()
    client.kinds(c.option(c.STRUCTURED))
    replies = client.options(c.meta(c.LIST_META, "data", *queries))
    assert [reply.data for reply in replies] == [*(bytes(4) + n.encode() for n in found), b""]
    assert replies[-1].kind == c.ACK


@pytest.mark.parametrize(
    "queries, found",
    [
        (("base:allocation",), [(1, "base:allocation")]),
        ((DIRTY, "base:allocation", DIRTY), [(1, "base:allocation"), (2, DIRTY)]),
        (("base:", "nbdmirror:", "qemu:allocation-depth"), []),
        ((), []),
    ],
)
def test_set_contexts(queries: tuple[str, ...], found: list[tuple[int, str]]) -> None:
    client = greeted()
    client.kinds(c.option(c.STRUCTURED))
    replies = client.options(c.meta(c.SET_META, "data", *queries))
    assert [reply.data for reply in replies[:-1]] == [
        struct.pack(">I", number) + name.encode() for number, name in found
    ]
    client.kinds(c.go("data"))
    assert client.session.contexts == tuple(name for _, name in found)


@pytest.mark.parametrize(
    "data, kind",
    [
        (c.counted("nosuch") + bytes(4), c.UNKNOWN),
        (b"", c.INVALID),
        (c.counted("data"), c.INVALID),
        (c.counted("data") + LONG, c.INVALID),
        (c.counted("data") + struct.pack(">II", 1, 9) + b"base:", c.INVALID),
        (c.counted("data") + struct.pack(">I", 1) + c.counted("x" * 4097), c.INVALID),
        (c.counted("data") + bytes(5), c.INVALID),
        (c.counted("data") + struct.pack(">I", 1) + c.counted(b"base:\xff"), c.INVALID),
    ],
)
@pytest.mark.parametrize("number", [c.LIST_META, c.SET_META])
def test_malformed_context_queries(number: int, data: bytes, kind: int) -> None:
    client = greeted()
    client.kinds(c.option(c.STRUCTURED))
    assert client.kinds(c.option(number, data)) == [kind]
    assert not client.session.closing


def test_failed_set_forgets_what_was_selected() -> None:
    client = greeted()
    client.kinds(c.option(c.STRUCTURED))
    client.kinds(c.meta(c.SET_META, "data", "base:allocation"))
    assert client.kinds(c.meta(c.SET_META, "nosuch", "base:allocation")) == [c.UNKNOWN]
    client.kinds(c.go("data"))
    assert client.session.contexts == ()


def test_contexts_selected_for_another_name_do_not_count() -> None:
    client = greeted()
    client.kinds(c.option(c.STRUCTURED))
    client.kinds(c.meta(c.SET_META, "frozen", "base:allocation"))
    client.kinds(c.go("data"))
    assert client.session.contexts == ()


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
