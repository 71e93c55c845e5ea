"""An NBD server session in memory, and a client that talks to it."""

from __future__ import annotations

from collections.abc import Sequence

from nbdmirror.codec.batch import singly
from nbdmirror.codec.nbd import ExportInfo, Request
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.config import MIB, Limits
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
