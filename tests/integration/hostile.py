"""A hostile peer: a node that knows the group and lies (reliability.md 4.1, "compromised peer").

Owns both roles, on plain sockets, with the product's frames and none of its manners. A lie is a
function over an open conversation; after each the other side must be alive and unharmed. Also a
program, to be pointed at a daemon by hand::

    python -m tests.integration.hostile HOST:PORT [LIE...]      tells a listening node all lies
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, Self

from nbdmirror.codec import record, repl
from nbdmirror.codec.record import Record
from nbdmirror.codec.repl import Frame, FrameReader, Type
from nbdmirror.config import Limits
from nbdmirror.errors import PeerError

Json = dict[str, Any]
SESSION = 0x5EED
KEY = bytes(16)
FRAME_MAX = Limits().frame_bytes_max
TIMEOUT_S = 20.0


class Conversation:
    """One connection that carries frames."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.settimeout(TIMEOUT_S)
        self.session = SESSION
        self._reader = FrameReader(Limits())
        self._frames: list[Frame] = []

    @classmethod
    def open(cls, address: tuple[str, int]) -> Self:
        return cls(socket.create_connection(address, TIMEOUT_S))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.socket.close()

    def send(self, kind: Type, *parts: bytes) -> None:
        """A frame with its checksums right."""
        self.raw(b"".join(bytes(p) for p in repl.encode(kind, self.session, list(parts))))

    def say(self, kind: Type, value: Json) -> None:
        """A frame of JSON."""
        self.send(kind, json.dumps(value).encode())

    def raw(self, data: bytes) -> None:
        """Bytes as they are; a peer that has hung up already is what is wanted."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def receive(self) -> Frame | None:
        """The next frame that is no PING; None when the peer hangs up."""
        while True:
            while not self._frames:
                buffer = self._reader.get_buffer()
                try:
                    count = self.socket.recv_into(buffer)
                except ConnectionError:
                    return None
                if not count:
                    return None
                self._frames = self._reader.received(count)
            frame = self._frames.pop(0)
            if frame.type is not Type.PING:
                return frame

    def hung_up(self) -> bool:
        """Whether the peer ends the conversation (waits for it)."""
        try:
            while self.receive() is not None:
                pass
        except TimeoutError:
            return False
        return True


class Liar:
    """A primary that a secondary has let in: HELLO, START and READY are through."""

    def __init__(self, conversation: Conversation, hello: Json, **start: object) -> None:
        self.talk = conversation
        self.epoch = int(hello["epoch"])
        conversation.say(Type.HELLO, hello)
        welcome = conversation.receive()
        if welcome is None or welcome.type is not Type.WELCOME:
            raise PeerError(f"not let in: {welcome and welcome.json()}")
        self.seq = int(welcome.json()["durable_seq"]) + 1
        terms = {"action": "continue", "seq": self.seq, "resync": False, "why": "", **start}
        conversation.say(Type.START, terms)
        ready = conversation.receive()
        if ready is None or ready.type is not Type.READY:
            raise PeerError("not let in: no READY")

    def record(self, data: bytes = b"lie" * 1000, **fields: int) -> bytes:
        """A record that is in order unless a field says otherwise."""
        made: dict[str, Any] = {
            "kind": record.WRITE,
            "flags": 0,
            "epoch": self.epoch,
            "volume": 0,
            "seq": self.seq,
            "offset": 0,
            "length": len(data),
            "time_ns": 1,
            "payload": data,
        }
        return b"".join(bytes(part) for part in record.encode(Record(**{**made, **fields})))


def _broken(data: bytes, at: int) -> bytes:
    damaged = bytearray(data)
    damaged[at] ^= 1
    return bytes(damaged)


def _head(kind: int, length: int, *, session: int = SESSION, magic: bytes = b"NMF1") -> bytes:
    """A frame's header with its checksum right, whatever it says."""
    from xxhash import xxh3_64_intdigest

    head = struct.pack("<4sBBHIIQQ", magic, kind, 0, 0, length, 0, session, 0)
    return head + struct.pack("<Q", xxh3_64_intdigest(head))


def _bomb(size: int, length: int = 2000) -> bytes:
    """A packed frame that claims to unpack to ``size`` bytes."""
    from xxhash import xxh3_64_intdigest

    payload = struct.pack("<I", size) + bytes(length)
    head = struct.pack(
        "<4sBBHIIQQ", b"NMF1", Type.REGION, 1, 0, len(payload), 0, SESSION,
        xxh3_64_intdigest(payload),
    )  # fmt: skip
    return head + struct.pack("<Q", xxh3_64_intdigest(head)) + payload


def _region(volume: int, offset: int, length: int, data: bytes) -> bytes:
    extent = repl.EXTENT.pack(offset, length, 0, 0)
    return repl.REGION.pack(1, volume, 0, 1, 0) + extent + data


# What a primary that was let in may try; every one must end the conversation.
LIES: dict[str, Callable[[Liar], None]] = {
    "gap": lambda one: one.talk.send(Type.RECORDS, one.record(seq=one.seq + 1)),
    "seq far": lambda one: one.talk.send(Type.RECORDS, one.record(seq=2**63)),
    "epoch": lambda one: one.talk.send(Type.RECORDS, one.record(epoch=one.epoch + 1)),
    "epoch back": lambda one: one.talk.send(Type.RECORDS, one.record(epoch=one.epoch - 1)),
    "epoch back in a frame": lambda one: one.talk.send(
        Type.RECORDS, one.record(), one.record(seq=one.seq + 1, epoch=one.epoch - 1)
    ),
    "epoch back, not plain": lambda one: one.talk.send(
        Type.RECORDS,
        one.record(kind=record.TRIM, epoch=one.epoch - 1, payload=None),  # type: ignore[arg-type]
    ),
    "volume": lambda one: one.talk.send(Type.RECORDS, one.record(volume=99)),
    "beyond the end": lambda one: one.talk.send(Type.RECORDS, one.record(offset=2**62)),
    "length": lambda one: one.talk.send(
        Type.RECORDS,
        one.record(kind=record.TRIM, length=2**63, payload=None),  # type: ignore[arg-type]
    ),
    "fill": lambda one: one.talk.send(Type.RECORDS, record.fill(one.epoch, one.seq, 64)),
    "header": lambda one: one.talk.send(Type.RECORDS, _broken(one.record(), 20)),
    "payload": lambda one: one.talk.send(Type.RECORDS, _broken(one.record(), 100)),
    "half a record": lambda one: one.talk.send(Type.RECORDS, one.record()[:500]),
    "no records": lambda one: one.talk.send(Type.RECORDS, b"x" * 777),
    "region": lambda one: one.talk.send(Type.REGION, _region(0, 0, 4, b"evil")),
    "region size": lambda one: one.talk.send(Type.REGION, _region(0, 0, 2**40, b"evil")),
    "hashes": lambda one: one.talk.send(Type.HASHES, repl.HASHES.pack(1, 0, 65536, 0, 65536, KEY)),
    "hashes of 3": lambda one: one.talk.send(Type.HASHES, repl.HASHES.pack(1, 0, 3, 0, 2**26, KEY)),
    "short": lambda one: one.talk.send(Type.REGION, b"x"),
    "wrong role": lambda one: one.talk.send(Type.ACK, repl.ACK.pack(1, 1, 1)),
    "hello again": lambda one: one.talk.say(Type.HELLO, {}),
    "session": lambda one: one.talk.raw(_head(Type.PING, 0, session=1)),
    "magic": lambda one: one.talk.raw(_head(Type.PING, 0, magic=b"NMF2")),
    "type": lambda one: one.talk.raw(_head(200, 0)),
    "4 GiB": lambda one: one.talk.raw(_head(Type.RECORDS, 2**32 - 1)),
    "bomb": lambda one: one.talk.raw(_bomb(2**32 - 1)),
    "bomb within the limit": lambda one: one.talk.raw(_bomb(FRAME_MAX)),
    "not frames": lambda one: one.talk.raw(b"GET / HTTP/1.1\r\n\r\n" * 10),
}

# What somebody may say instead of a HELLO.
GREETINGS: dict[str, bytes] = {
    "silence": b"",
    "half a frame": _head(Type.HELLO, 1000) + b"{",
    "4 MiB": _head(Type.HELLO, FRAME_MAX),
    "not JSON": b"".join(map(bytes, repl.encode(Type.HELLO, SESSION, [b"\xff" * 100]))),
    "deep": b"".join(map(bytes, repl.encode(Type.HELLO, SESSION, [b"[" * 100_000]))),
    "number": b"".join(map(bytes, repl.encode(Type.HELLO, SESSION, [b"7"]))),
    "empty": b"".join(map(bytes, repl.encode(Type.HELLO, SESSION, [b"{}"]))),
    "records": b"".join(map(bytes, repl.encode(Type.RECORDS, SESSION, [b"x" * 1000]))),
    "flood": b"".join(map(bytes, repl.encode(Type.HELLO, SESSION, [b"{}"]))) * 10_000,
    "random": bytes(range(256)) * 64,
}


def main(argv: list[str]) -> int:
    """Tells a listening node every greeting; without a HELLO of its group no lie gets further."""
    host, _, port = argv[0].rpartition(":")
    for name, data in GREETINGS.items():
        if len(argv) > 1 and name not in argv[1:]:
            continue
        with Conversation.open((host, int(port))) as talk:
            talk.raw(data)
            print(f"{name}: {'hung up' if talk.hung_up() else 'still there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
