"""A client of the NBD wire that can lie: for requests that libnbd does not know or refuses.

Owns: struct layouts as the NBD protocol document gives them, written apart from the product's own
codec so that one mistake cannot hide in both. Used by tests of errors and hostile input.
"""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

OPT_MAGIC = 0x49484156454F5054
REPLY_MAGIC = 0x3E889045565A9
OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED = 2, 3, 6, 7, 8
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_UNKNOWN = 2**31 + 1, 2**31 + 3, 2**31 + 6
REP_ERR_TOO_BIG = 2**31 + 9
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << bit for bit in range(5))
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 22, 28, 75, 95


@dataclass(frozen=True)
class OptionReply:
    """One reply to an option."""

    option: int
    kind: int
    data: bytes


class RawClient:
    """One connection, at the option stage at first. Every wait is bounded by ``timeout``."""

    def __init__(
        self, where: Path | tuple[str, int], *, flags: int = 3, timeout: float = 30.0
    ) -> None:
        """``where``: the path of a unix socket, or a TCP address."""
        tcp = isinstance(where, tuple)
        self.socket = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        self.socket.settimeout(timeout)
        try:
            self.socket.connect(where if isinstance(where, tuple) else str(where))
            greeting = struct.Struct(">8s8sH").unpack(self.receive(18))
        except (OSError, EOFError):
            self.socket.close()
            raise
        assert greeting[:2] == (b"NBDMAGIC", b"IHAVEOPT")
        self.handshake_flags = greeting[2]
        self.send(struct.pack(">I", flags))
        self.size = 0
        self.transmission_flags = 0
        self._cookie = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.socket.close()

    def wrap(self, context: ssl.SSLContext, name: str) -> None:
        """Goes on within TLS; ssl.SSLError if there is none to be had."""
        self.socket = context.wrap_socket(self.socket, server_hostname=name)

    def send(self, data: bytes) -> None:
        """Sends bytes as they are."""
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes; EOFError if the server hangs up first."""
        parts = bytearray()
        while len(parts) < length:
            part = self.socket.recv(length - len(parts))
            if not part:
                raise EOFError(f"hung up after {len(parts)} of {length} bytes")
            parts += part
        return bytes(parts)

    def hung_up(self) -> bool:
        """Whether the server closes the connection now (waits for it; swallows what comes)."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    # -- options ---------------------------------------------------------------------------------

    def option(self, number: int, data: bytes = b"", *, length: int | None = None) -> None:
        """Sends an option; ``length`` is the length that it claims to have."""
        claimed = len(data) if length is None else length
        self.send(struct.pack(">QII", OPT_MAGIC, number, claimed) + data)

    def reply(self) -> OptionReply:
        """The next reply to an option."""
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == REPLY_MAGIC
        return OptionReply(option, kind, self.receive(length))

    def replies(self, number: int, data: bytes = b"") -> list[OptionReply]:
        """Sends an option; all replies up to the ACK or the error."""
        self.option(number, data)
        got = [self.reply()]
        while got[-1].kind in (REP_SERVER, REP_INFO, 4):
            got.append(self.reply())
        return got

    def go(self, name: str = "", option: int = OPT_GO) -> list[OptionReply]:
        """INFO or GO without information requests; keeps size and flags."""
        raw = name.encode()
        got = self.replies(option, struct.pack(">I", len(raw)) + raw + struct.pack(">H", 0))
        for reply in got:
            if reply.kind == REP_INFO and reply.data[:2] == b"\0\0":
                self.size, self.transmission_flags = struct.unpack(">QH", reply.data[2:])
        return got

    # -- requests --------------------------------------------------------------------------------

    def request(
        self, command: int, offset: int, length: int, flags: int = 0, payload: bytes = b""
    ) -> int:
        """Sends a request; returns its cookie."""
        self._cookie += 1
        header = (0x25609513, flags, command, self._cookie, offset, length)
        self.send(struct.pack(">IHHQQI", *header) + payload)
        return self._cookie

    def answer(self, length: int = 0) -> tuple[int, int, bytes]:
        """A simple reply: cookie, error, and ``length`` bytes of data if there is no error."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698, f"not a simple reply: {magic:#x}"
        return cookie, error, b"" if error else self.receive(length)

    def ask(
        self, command: int, offset: int, length: int, flags: int = 0, payload: bytes = b""
    ) -> int:
        """A request and its error number; 0 if it was done."""
        cookie = self.request(command, offset, length, flags, payload)
        echoed, error, _ = self.answer(length if command == READ else 0)
        assert echoed == cookie
        return error

    def check_usable(self) -> None:
        """The session still is in step: a read is answered."""
        assert self.ask(READ, 0, 512) == 0
