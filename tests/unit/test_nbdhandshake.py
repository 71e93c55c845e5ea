"""The NBD server session in memory, up to transmission: every option and refusal, and what memory
they take.

Holds fault 36 (hostile handshakes)."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from nbdmirror.codec.nbd import ExportInfo
from nbdmirror.codec.nbdhandshake import LISTS_MAX
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.config import KIB, MIB
from tests.unit import nbdclient as c
from tests.unit.nbdsession import (
    DATA,
    DIRTY,
    EXPORTS,
    FLAG_DF,
    FLAG_READ_ONLY,
    FLAGS,
    SIZE,
    Client,
    greeted,
)


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


def test_a_list_is_given_a_few_times() -> None:
    """I6: a flood of them takes no more than a flood of anything else."""
    client = greeted()
    for _ in range(LISTS_MAX):
        assert client.kinds(c.option(c.LIST))[-1] == c.ACK
    assert client.kinds(c.option(c.LIST)) == [c.INVALID]


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


def test_a_context_has_the_number_that_was_told_whatever_is_removed_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NBD_OPT_SET_META_CONTEXT: replies are by those numbers; a remote may be removed before GO."""
    client = greeted()
    client.kinds(c.option(c.STRUCTURED))
    told = client.options(c.meta(c.SET_META, "data", DIRTY))[0].data
    monkeypatch.setitem(EXPORTS, "data", replace(DATA, contexts=("base:allocation",)))
    client.kinds(c.go("data"))
    session = client.session
    assert session.contexts == (DIRTY,) and session.export is not None
    assert struct.unpack(">I", told[:4])[0] == session.export.context_id(DIRTY)
