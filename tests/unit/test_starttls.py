"""STARTTLS in the option stage: required or off, and nothing survives it (4.1, fault 42)."""

from __future__ import annotations

import pytest

from nbdmirror.codec.nbd import ExportInfo
from nbdmirror.codec.nbdhandshake import Forbidden
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.config import MIB, Limits
from tests.unit import nbdclient as c

DATA = ExportInfo("data", MIB)


def find(name: str) -> ExportInfo | Forbidden | None:
    if name == "private":
        return Forbidden("for others")
    return DATA if name in ("", "data") else None


def session(*, tls: bool = True, options: int = 64) -> ServerSession:
    return ServerSession(find, lambda: [DATA], Limits(options_max=options), tls=tls)


def feed(one: ServerSession, *parts: bytes) -> bytes:
    """Gives the bytes in one piece; what is answered."""
    data = b"".join(parts)
    while data:
        room = one.get_buffer(-1)
        count = min(len(room), len(data))
        room[:count] = data[:count]
        assert one.received(count) == []
        data = data[count:]
    return b"".join(map(bytes, one.take_output()))


def kinds(answer: bytes) -> list[int]:
    found = []
    while answer:
        found.append(int.from_bytes(answer[12:16], "big"))
        answer = answer[20 + int.from_bytes(answer[16:20], "big") :]
    return found


def secured(one: ServerSession) -> ServerSession:
    answer = feed(one, c.client_flags(), c.option(c.STARTTLS))
    assert kinds(answer) == [c.ACK] and one.tls_wanted
    one.secured()
    return one


@pytest.mark.parametrize(
    "option",
    [
        c.go("data"),
        c.go("data", number=c.INFO),
        c.option(c.LIST),
        c.option(c.STRUCTURED),
        c.meta(c.SET_META, "data", "base:allocation"),
        c.option(77),
        c.option(c.GO, bytes(70_000)),
    ],
)
def test_before_tls_everything_is_tls_required(option: bytes) -> None:
    one = session()
    assert kinds(feed(one, c.client_flags(), option)) == [c.TLS_REQD]
    assert not one.closing and one.export is None


def test_before_tls_an_export_name_hangs_up_and_abort_is_answered() -> None:
    one = session()
    assert feed(one, c.client_flags(), c.option(c.EXPORT_NAME, b"data")) == b""
    assert one.closing
    assert kinds(feed(session(), c.client_flags(), c.option(c.ABORT))) == [c.ACK]


def test_without_tls_starttls_is_unsupported() -> None:
    one = session(tls=False)
    assert kinds(feed(one, c.client_flags(), c.option(c.STARTTLS))) == [c.UNSUP]
    assert not one.tls_wanted


@pytest.mark.parametrize("injected", [b"x", c.option(c.STRUCTURED), c.go("data")])
def test_plain_text_behind_starttls_ends_it_unanswered(injected: bytes) -> None:
    one = session()
    assert feed(one, c.client_flags(), c.option(c.STARTTLS) + injected) == b""
    assert one.closing and not one.tls_wanted


def test_plain_text_after_the_answer_ends_it() -> None:
    one = session()
    feed(one, c.client_flags(), c.option(c.STARTTLS))
    assert feed(one, c.option(c.STRUCTURED)) == b""
    assert one.closing and not one.tls_wanted


def test_within_tls_the_options_begin_anew() -> None:
    one = secured(session())
    assert kinds(feed(one, c.option(c.STARTTLS))) == [c.INVALID]
    assert kinds(feed(one, c.meta(c.SET_META, "data", "base:allocation"))) == [c.INVALID]
    assert kinds(feed(one, c.option(c.STRUCTURED), c.go("data"))) == [c.ACK, c.REP_INFO, c.ACK]
    assert one.in_transmission and one.structured


def test_half_an_option_before_tls_is_not_completed_within() -> None:
    """Bytes that begin an option in plain text are an injection too, however few."""
    one = session()
    feed(one, c.client_flags(), c.option(c.STARTTLS) + b"I")
    assert one.closing


def test_options_are_counted_over_both() -> None:
    one = session(options=4)
    feed(one, c.client_flags(), c.option(c.LIST), c.option(c.LIST))
    assert kinds(feed(one, c.option(c.STARTTLS))) == [c.ACK]
    one.secured()
    assert kinds(feed(one, c.option(c.LIST), c.option(c.LIST))) == [c.SERVER, c.ACK]
    assert one.closing


def test_an_export_for_others_is_a_matter_of_policy() -> None:
    one = session(tls=False)
    feed(one, c.client_flags(), c.option(c.STRUCTURED))
    for option in (c.go("private"), c.meta(c.SET_META, "private")):
        answer = feed(one, option)
        assert kinds(answer) == [c.POLICY] and b"for others" in answer
    assert feed(one, c.option(c.EXPORT_NAME, b"private")) == b""
    assert one.closing_reason == "for others"
