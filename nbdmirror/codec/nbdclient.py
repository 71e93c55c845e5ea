"""The client's side of the NBD handshake, sans-IO: greeting, GO, and the export's facts.

Owns what a client must say before the kernel takes the socket over; the layouts are ``nbd``'s.
Asks for nothing that the kernel does not speak: no structured replies, no TLS. Called by
``edge.attach``; requests and replies are the kernel's business.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from nbdmirror.codec import nbd
from nbdmirror.codec.nbd import HandshakeFlag, Info, Option, Rep, TransmissionFlag
from nbdmirror.errors import FormatError, NbdmirrorError

ERROR_BIT: Final = 1 << 31

_REFUSALS: Final[dict[int, str]] = {
    Rep.ERR_UNSUP: "does not know NBD_OPT_GO",
    Rep.ERR_TLS_REQD: "wants TLS, which the kernel does not speak by itself",
    Rep.ERR_UNKNOWN: "has no such export",
}


@dataclass(frozen=True, slots=True)
class Export:
    """What the server offers: ``size`` in bytes, transmission flags, smallest request in bytes."""

    size: int
    flags: int
    block_size: int = 1

    @property
    def multi_conn(self) -> bool:
        """Whether a flush on one connection covers the writes of all (O15)."""
        return bool(self.flags & TransmissionFlag.CAN_MULTI_CONN)


class ClientHandshake:
    """From the first byte of a connection to the first request.

    Feed ``receive`` and send what it returns, until ``export`` is there."""

    def __init__(self, name: str) -> None:
        """``name`` of the export; "" is the server's default one."""
        self.name = name
        self.export: Export | None = None
        self._buffer = b""
        self._greeted = False
        self._size_flags: tuple[int, int] | None = None
        self._block_size = 1

    def receive(self, data: bytes) -> bytes:
        """Takes what arrived; returns what to send.

        FormatError if that is not NBD; NbdmirrorError if the server refuses the export."""
        assert self.export is None, "the handshake is over: the rest belongs to the kernel"
        self._buffer += data
        answer = b""
        if not self._greeted:
            if len(self._buffer) < nbd.GREETING.size:
                return b""
            answer = self._greet(self._take(nbd.GREETING.size))
        while self.export is None and (reply := self._next_reply()) is not None:
            self._handle(*reply)
        if self.export is not None and self._buffer:
            raise FormatError("the NBD server answers requests that nobody made")
        return answer

    def _take(self, length: int) -> bytes:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _greet(self, greeting: bytes) -> bytes:
        magic, option_magic, offered = nbd.GREETING.unpack(greeting)
        newstyle = offered & HandshakeFlag.FIXED_NEWSTYLE
        if (magic, option_magic) != (nbd.INIT_MAGIC, nbd.OPTION_MAGIC) or not newstyle:
            raise FormatError("the server does not speak NBD (fixed newstyle)")
        self._greeted = True
        name = self.name.encode()
        body = nbd.U32.pack(len(name)) + name + nbd.U16.pack(1) + nbd.U16.pack(Info.BLOCK_SIZE)
        flags = offered & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        option = nbd.OPTION.pack(nbd.OPTION_MAGIC, Option.GO, len(body))
        return nbd.CLIENT_FLAGS.pack(flags) + option + body

    def _next_reply(self) -> tuple[int, bytes] | None:
        head = nbd.OPTION_REPLY.size
        if len(self._buffer) < head:
            return None
        magic, option, kind, length = nbd.OPTION_REPLY.unpack_from(self._buffer)
        good = magic == nbd.OPTION_REPLY_MAGIC and option == Option.GO
        if not good or length > nbd.REPLY_BYTES_MAX:
            raise FormatError("the NBD server's answer to NBD_OPT_GO is not one")
        if len(self._buffer) < head + length:
            return None
        return kind, self._take(head + length)[head:]

    def _handle(self, kind: int, data: bytes) -> None:
        if kind & ERROR_BIT:
            why = _REFUSALS.get(kind, f"refuses with error {kind - ERROR_BIT}")
            said = ": " + data.decode(errors="replace") if data else ""
            raise NbdmirrorError(
                f"the NBD server {why} (export {self.name!r}{said})",
                hint="nbdinfo --list URI shows what it has",
            )
        if kind == Rep.ACK:
            if self._size_flags is None:
                raise FormatError("the NBD server agrees without saying to what size")
            self.export = Export(*self._size_flags, self._block_size)
        elif kind == Rep.INFO:
            self._learn(data)

    def _learn(self, data: bytes) -> None:
        """One NBD_REP_INFO; a kind that nobody asked for is passed over, as it should be."""
        kind = int.from_bytes(data[:2], "big")
        layouts: dict[int, struct.Struct] = {
            Info.EXPORT: nbd.INFO_EXPORT,
            Info.BLOCK_SIZE: nbd.INFO_BLOCK_SIZE,
        }
        if (layout := layouts.get(kind)) is None:
            return
        if len(data) != layout.size:
            raise FormatError(f"an NBD information of {len(data)} bytes, not {layout.size}")
        values = layout.unpack(data)
        if kind == Info.EXPORT:
            self._size_flags = values[1], values[2]
        else:
            self._block_size = values[1]
