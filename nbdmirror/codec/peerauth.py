"""How two nodes prove a shared secret to each other, inside a TLS channel. Sans-IO.

One JSON object a line, at most ``LINE_BYTES_MAX`` bytes. The connecting node begins::

    {"version", "group", "node", "peer", "nonce"}     who I am, whom I want
    {"node", "nonce", "proof"}                        the listening node, with its proof
    {"proof"}                                         the connecting node's
    {"ok": true}                                      from here on the stream is theirs
    {"refused": "why"}                                instead of any answer of the listening node

A proof is HMAC-SHA256 with the secret over version, role, group, both names, both nonces and the
channel binding of the TLS connection: what was proved elsewhere, by the other side, for another
pair, or through a man in the middle (whose two channels differ) is no proof here. Nodes with
certificates have proved themselves already; of this exchange they use the last lines only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Any

from nbdmirror.errors import PeerError

VERSION = 1
LINE_BYTES_MAX = 2048
NONCE_BYTES = 32
SECRET_BYTES_MIN = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_LABEL = b"nbdmirror replication"

OK = b'{"ok":true}\n'


@dataclass(frozen=True, slots=True)
class Names:
    """Who talks to whom: the group, the connecting node, the listening node."""

    group: str
    connecting: str
    listening: str


def proof(secret: bytes, role: str, names: Names, nonces: tuple[bytes, bytes], tls: bytes) -> str:
    """What ``role`` ("connecting" or "listening") shows; ``nonces`` in that order, ``tls`` the
    channel binding. Every part goes in with its length, so that none can stand for two."""
    assert len(secret) >= SECRET_BYTES_MIN and tls
    parts = [_LABEL, str(VERSION).encode(), role.encode(), names.group.encode()]
    parts += [names.connecting.encode(), names.listening.encode(), *nonces, tls]
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(secret, text, "sha256").hex()


class Connecting:
    """The connecting node's side."""

    def __init__(self, secret: bytes, names: Names, nonce: bytes, tls: bytes) -> None:
        assert len(nonce) == NONCE_BYTES
        self._secret, self._names, self._nonce, self._tls = secret, names, nonce, tls

    def hello(self) -> bytes:
        """The first line."""
        names = self._names
        return _line(
            version=VERSION,
            group=names.group,
            node=names.connecting,
            peer=names.listening,
            nonce=self._nonce.hex(),
        )

    def answer(self, line: bytes) -> bytes:
        """The third line, for the second; PeerError says why the other side is not believed."""
        said = parse(line)
        theirs = _bytes(said, "nonce", NONCE_BYTES)
        nonces = (self._nonce, theirs)
        wanted = proof(self._secret, "listening", self._names, nonces, self._tls)
        if said.get("node") != self._names.listening:
            raise PeerError(f"wrong name: {_shown(said.get('node'))} answers there")
        _check(said, wanted)
        return _line(proof=proof(self._secret, "connecting", self._names, nonces, self._tls))


class Listening:
    """The listening node's side; ``peer`` is the connecting node's name once it is proved."""

    def __init__(self, secret: bytes, group: str, node: str, nonce: bytes, tls: bytes) -> None:
        assert len(nonce) == NONCE_BYTES
        self._secret, self._nonce, self._tls = secret, nonce, tls
        self._group, self._node = group, node
        self._wanted = ""
        self._claimed = ""
        self.peer: str | None = None

    def answer(self, line: bytes) -> bytes:
        """The second line, then the fourth; PeerError says why the other side is refused."""
        said = parse(line)
        if not self._claimed:
            return self._challenge(said)
        _check(said, self._wanted)
        self.peer = self._claimed
        return OK

    def _challenge(self, said: dict[str, Any]) -> bytes:
        if said.get("version") != VERSION:
            raise PeerError(f"version {_shown(said.get('version'))}, here is {VERSION}")
        if said.get("group") != self._group:
            raise PeerError(f"wrong group: {_shown(said.get('group'))}, not {self._group!r}")
        if said.get("peer") != self._node:
            raise PeerError(f"wrong name: {_shown(said.get('peer'))} is wanted, not {self._node!r}")
        claimed = said.get("node")
        if not isinstance(claimed, str) or not claimed.isascii() or not 0 < len(claimed) <= 64:
            raise PeerError("a node without a name")
        names = Names(self._group, claimed, self._node)
        nonces = (_bytes(said, "nonce", NONCE_BYTES), self._nonce)
        if nonces[0] == nonces[1]:
            raise PeerError("the challenge is an echo of our own")
        self._claimed = claimed
        self._wanted = proof(self._secret, "connecting", names, nonces, self._tls)
        mine = proof(self._secret, "listening", names, nonces, self._tls)
        return _line(node=self._node, nonce=self._nonce.hex(), proof=mine)


def refusal(why: str) -> bytes:
    """The line that ends the exchange."""
    return _line(refused=why[:200])


def accepted(line: bytes) -> None:
    """Takes the last line; PeerError unless it says yes."""
    if parse(line).get("ok") is not True:
        raise PeerError("the peer did not say yes")


def parse(line: bytes) -> dict[str, Any]:
    """The object in a line; PeerError if there is none, or if it is a refusal."""
    if len(line) > LINE_BYTES_MAX:
        raise PeerError("a line of the proof is too long")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise PeerError("a line of the proof is not JSON") from None
    if not isinstance(value, dict):
        raise PeerError("a line of the proof is not an object")
    if "refused" in value:
        raise PeerError(f"the peer refused: {_shown(value['refused'])}")
    return value


def _check(said: dict[str, Any], wanted: str) -> None:
    given = _bytes(said, "proof", _PROOF_BYTES)
    if not hmac.compare_digest(given, bytes.fromhex(wanted)):
        raise PeerError("wrong secret: the proof does not hold")


def _bytes(said: dict[str, Any], key: str, length: int) -> bytes:
    value = said.get(key)
    if isinstance(value, str) and len(value) == 2 * length and value.isascii():
        try:
            return bytes.fromhex(value)
        except ValueError:
            pass
    raise PeerError(f"{key} is not {length} bytes in hexadecimal")


def _shown(value: object) -> str:
    text = str(value)[:200]
    return text if text.isprintable() else repr(text)


def _line(**fields: object) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"
