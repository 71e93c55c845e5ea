"""The proof of a shared secret: every part that it is bound to, changed, makes it none (4.1).

Also ``x509``: a pin is the digest that openssl computes, and damaged certificates are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.codec import peerauth, x509
from nbdmirror.codec.peerauth import NONCE_BYTES, Connecting, Listening, Names
from nbdmirror.errors import FormatError, PeerError

SECRET = b"s" * 32
TLS = b"the same channel"
NAMES = Names("db", "alpha", "beta")
ONE, TWO = b"1" * NONCE_BYTES, b"2" * NONCE_BYTES


def connecting(
    secret: bytes = SECRET, names: Names = NAMES, nonce: bytes = ONE, tls: bytes = TLS
) -> Connecting:
    return Connecting(secret, names, nonce, tls)


def listening(
    secret: bytes = SECRET,
    group: str = "db",
    node: str = "beta",
    nonce: bytes = TWO,
    tls: bytes = TLS,
) -> Listening:
    return Listening(secret, group, node, nonce, tls)


def exchange(one: Connecting, other: Listening) -> str | None:
    """All lines; who was recognised."""
    third = one.answer(other.answer(one.hello()))
    last = other.answer(third)
    peerauth.accepted(last)
    return other.peer


def test_both_recognise_each_other() -> None:
    assert exchange(connecting(), listening()) == "alpha"


@pytest.mark.parametrize(
    ("one", "other", "word"),
    [
        (connecting(), listening(secret=b"x" * 32), "wrong secret"),
        (connecting(), listening(tls=b"another"), "wrong secret"),  # a man in the middle
        (connecting(), listening(group="web"), "wrong group"),
        (connecting(), listening(node="gamma"), "wrong name"),
        (connecting(nonce=TWO), listening(), "echo"),
    ],
)
def test_what_is_not_the_same_is_refused(one: Connecting, other: Listening, word: str) -> None:
    with pytest.raises(PeerError, match=word):
        exchange(one, other)
    assert other.peer is None


def test_every_part_is_in_the_proof() -> None:
    base = peerauth.proof(SECRET, "connecting", NAMES, (ONE, TWO), TLS)
    others = [
        peerauth.proof(b"x" * 32, "connecting", NAMES, (ONE, TWO), TLS),
        peerauth.proof(SECRET, "listening", NAMES, (ONE, TWO), TLS),
        peerauth.proof(SECRET, "connecting", Names("dba", "lpha", "beta"), (ONE, TWO), TLS),
        peerauth.proof(SECRET, "connecting", Names("db", "beta", "alpha"), (ONE, TWO), TLS),
        peerauth.proof(SECRET, "connecting", NAMES, (TWO, ONE), TLS),
        peerauth.proof(SECRET, "connecting", NAMES, (ONE, TWO), TLS + b"x"),
    ]
    assert len({base, *others}) == 7


def test_a_proof_is_no_proof_of_the_other_side() -> None:
    """Reflection: the listening node's own proof sent back to it."""
    other = listening()
    second = json.loads(other.answer(connecting().hello()))
    with pytest.raises(PeerError, match="wrong secret"):
        other.answer(json.dumps({"proof": second["proof"]}).encode())


def test_a_replayed_conversation_is_refused() -> None:
    """The same lines against a fresh nonce."""
    one, other = connecting(), listening()
    hello = one.hello()
    third = one.answer(other.answer(hello))
    later = listening(nonce=b"3" * NONCE_BYTES)
    later.answer(hello)
    with pytest.raises(PeerError, match="wrong secret"):
        later.answer(third)


def test_a_refusal_is_told() -> None:
    with pytest.raises(PeerError, match="refused: wrong group"):
        connecting().answer(peerauth.refusal("wrong group"))


@pytest.mark.parametrize("node", ["", "n" * 65, "\ud800", "\u00fcber", 7, None])
def test_a_name_that_is_none_is_refused(node: object) -> None:
    """4.1: before anything is made of it; half a character would have been a defect."""
    said = {"version": 1, "group": "db", "peer": "beta", "node": node, "nonce": ONE.hex()}
    with pytest.raises(PeerError, match="without a name"):
        listening().answer(json.dumps(said).encode())


@given(st.binary(max_size=200) | st.dictionaries(st.text(), st.none() | st.text()).map(json.dumps))
def test_any_line_is_an_error_and_nothing_else(line: bytes | str) -> None:
    data = line.encode() if isinstance(line, str) else line
    other = listening()
    with pytest.raises(PeerError):
        other.answer(data)
    with pytest.raises(PeerError):
        connecting().answer(data)


def der(tag: int, *parts: bytes) -> bytes:
    """One element, with a length of one byte or of three."""
    body = b"".join(parts)
    if len(body) < 128:
        return bytes([tag, len(body)]) + body
    return bytes([tag, 0x82]) + len(body).to_bytes(2, "big") + body


KEY = der(0x30, der(0x30, b"algorithm"), der(0x03, bytes(100)))
BEGIN = der(0x17, b"240101000000Z")


def certificate(*before: bytes, end: bytes = der(0x17, b"260301120000Z")) -> bytes:
    fields = [der(0x02, b"1"), der(0x30), der(0x30, bytes(200)), der(0x30, BEGIN, end)]
    fields += [der(0x30, b"subject"), KEY, der(0xA3, b"more")]
    return der(0x30, der(0x30, *before, *fields), der(0x30), b"signature")


CERTIFICATE = certificate(der(0xA0, b"v3"))


@pytest.mark.parametrize("data", [CERTIFICATE, certificate()])
def test_a_pin_is_the_digest_of_the_key(data: bytes) -> None:
    assert x509.pin(data) == hashlib.sha256(KEY).hexdigest()


@pytest.mark.parametrize(
    ("end", "when"),
    [
        (der(0x17, b"260301120000Z"), datetime(2026, 3, 1, 12, tzinfo=UTC)),
        (der(0x17, b"991231235959Z"), datetime(1999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (der(0x18, b"20600101000000Z"), datetime(2060, 1, 1, tzinfo=UTC)),
        (der(0x18, b"20601301000000Z"), None),
        (der(0x17, b"x"), None),
        (der(0x04, b"260301120000Z"), None),
    ],
)
def test_when_a_certificate_ends(end: bytes, when: datetime | None) -> None:
    data = certificate(der(0xA0, b"v3"), end=end)
    if when is None:
        with pytest.raises(FormatError):
            x509.expires_at(data)
    else:
        assert x509.expires_at(data) == when.timestamp()


@given(st.binary(max_size=300))
def test_any_bytes_are_a_certificate_or_a_format_error(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        assert len(x509.pin(data)) == 64


@given(st.integers(0, len(CERTIFICATE) - 1))
def test_a_cut_certificate_is_refused(length: int) -> None:
    with pytest.raises(FormatError):
        x509.pin(CERTIFICATE[:length])
