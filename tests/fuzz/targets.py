"""What is fuzzed: a name, a function over bytes, and seeds that get it past the first checks.

A target returns whatever happens that its parser documents; everything else is a find.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass

from nbdmirror.codec import (
    fields,
    mappage,
    mark,
    nbdclient,
    netlink,
    peerauth,
    prometheus,
    record,
    repl,
    slots,
    x509,
)
from nbdmirror.codec.admin import LineFramer, RpcError, parse_reply, parse_request
from nbdmirror.codec.batch import singly
from nbdmirror.codec.nbd import ExportInfo
from nbdmirror.codec.nbdserver import ServerSession
from nbdmirror.codec.repl import FrameReader, Type
from nbdmirror.config import KIB, MIB, Limits
from nbdmirror.configfile import parse
from nbdmirror.engine.methods import METHODS, check_params
from nbdmirror.errors import ConfigError, FormatError, PeerError
from tests.fuzz import disks, nodes, sealing

LIMITS = Limits(options_max=16, request_bytes_max=64 * KIB)
EXPORT = ExportInfo("v", MIB, contexts=("base:allocation", "nbdmirror:dirty:b"))


@dataclass(frozen=True)
class Target:
    """One thing to fuzz; ``length_max`` of its input in bytes."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    length_max: int = 4096


def nbd_server(data: bytes) -> None:
    """Never raises, never gives out a request that does not fit, answers a bounded amount."""
    tls = bool(data) and data[0] & 1 == 1
    session = ServerSession(
        lambda name: EXPORT if name in ("", "v") else None, lambda: [EXPORT], LIMITS, tls=tls
    )
    view = memoryview(data)[1:]
    answered = 0
    while view and not session.closing:
        room = session.get_buffer(-1)
        count = min(len(room), len(view), 1 + data[0])
        room[:count] = view[:count]
        for request in singly(session.received(count)):
            assert request.offset + request.length <= EXPORT.size or request.type == 3
            assert request.payload is None or len(request.payload) == request.length
        answered += sum(map(len, session.take_output()))
        if session.tls_wanted:
            session.secured()
        view = view[count:]
    assert answered <= 4096 + 600 * len(data)
    assert not tls or session.export is None or b"IHAVEOPT\0\0\0\5" in data


def nbd_client(data: bytes) -> None:
    """What a lying NBD server says to ``nbdmirror attach``."""
    client = nbdclient.ClientHandshake("v")
    with contextlib.suppress(FormatError, ConnectionError, OSError):
        for at in range(0, len(data), 64):
            client.receive(data[at : at + 64])


def frames(data: bytes) -> None:
    """Frames as a link takes them, and what is in them."""
    reader = FrameReader(Limits())
    view = memoryview(sealing.frames(data[1:], 7) if data and data[0] & 1 else data[1:])
    with contextlib.suppress(FormatError):
        while view:
            room = reader.get_buffer()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            for frame in reader.received(count):
                _frame(frame)
            view = view[count:]


def _frame(frame: repl.Frame) -> None:
    assert len(frame.payload) <= Limits().unpacked_bytes_max
    layouts = {Type.ACK: repl.ACK, Type.REGION: repl.REGION, Type.HASHES: repl.HASHES}
    if frame.type in layouts:
        with contextlib.suppress(PeerError):
            frame.unpack(layouts[frame.type])
    elif frame.type is Type.RECORDS:
        records(bytes(frame.payload))
    else:
        with contextlib.suppress(PeerError):
            message = frame.json()
            for key in ("uuid", "generation"):
                with contextlib.suppress(PeerError):
                    fields.text(message, key)
            with contextlib.suppress(PeerError):
                fields.history(message)
            fields.forks(message)


def records(data: bytes) -> None:
    """The log's reader, and what finds records behind damage."""
    for view in (data, sealing.records(data)):
        for at, found in record.find_headers(view):
            assert at % record.ALIGNMENT == 0
            assert found.kind in record.KIND_NAMES
        with contextlib.suppress(FormatError):
            for one in record.parse_all(memoryview(view)):
                assert one.kind != record.WRITE or one.length == len(one.payload or b"")


def marks(data: bytes) -> None:
    """What a marker in the log says of snapshots; what is taken is what would be written."""
    with contextlib.suppress(FormatError):
        one = mark.decode(data)
        assert mark.decode(one.encode()) == one
        assert one.volumes and len(one.encode()) <= mark.SIZE_MAX


def superblock(data: bytes) -> None:
    """Slots of a superblock."""
    half = len(data) // 2
    both = [data[:half], data[half:]]
    both = [slot.ljust(slots.SLOT_SIZE, b"\0")[: slots.SLOT_SIZE] for slot in both]
    slots.damage(both)
    with contextlib.suppress(FormatError):
        slots.choose(both)


def maps(data: bytes) -> None:
    """Pages of a DCM, sectors of an active map and of a layer, with sums that hold and without."""
    body = data.ljust(mappage.PAGE_SIZE, b"\0")
    for page in (
        body[: mappage.PAGE_SIZE],
        sealing.page(b"NMAP", 3, body[: mappage.BITMAP_BYTES]),
    ):
        with contextlib.suppress(FormatError):
            bits = mappage.decode_page(3, page)
            assert bits is None or len(bits) == mappage.BITMAP_BYTES
    for magic in (mappage.ACTIVE, mappage.LAYER):
        for sector in (
            body[: mappage.SECTOR_SIZE],
            sealing.page(magic, 3, body[: mappage.SECTOR_SIZE - 24]),
        ):
            with contextlib.suppress(FormatError):
                assert len(mappage.decode_sector(3, sector, magic)) == mappage.SLOTS


def admin(data: bytes) -> None:
    """Requests and replies of the admin protocol."""
    framer = LineFramer(1024)
    with contextlib.suppress(FormatError):
        for line in framer.feed(data):
            with contextlib.suppress(RpcError):
                request = parse_request(line)
                if request.method in METHODS:
                    check_params(request.method, request.params)
            with contextlib.suppress(FormatError):
                parse_reply(line)


def config(data: bytes) -> None:
    """A configuration file; the error names the file."""
    try:
        parse(data.decode(), "/etc/nbdmirror/f.toml")
    except UnicodeDecodeError:
        pass
    except ConfigError as error:
        assert error.message.startswith("/etc/nbdmirror/f.toml: ")


def auth(data: bytes) -> None:
    """Lines of the proof of a shared secret; nothing but the secret is one."""
    sides: list[peerauth.Listening | peerauth.Connecting] = [
        peerauth.Listening(b"s" * 32, "g", "b", b"n" * 32, b"tls"),
        peerauth.Connecting(b"s" * 32, peerauth.Names("g", "a", "b"), b"m" * 32, b"tls"),
    ]
    for side in sides:
        with contextlib.suppress(PeerError):
            for line in data.split(b"\n"):
                side.answer(line)
        assert not isinstance(side, peerauth.Listening) or side.peer is None


def certificate(data: bytes) -> None:
    """The walk to a certificate's key."""
    with contextlib.suppress(FormatError):
        assert len(x509.pin(data)) == 64
    with contextlib.suppress(FormatError):
        assert x509.expires_at(data) < 1e12


def http(data: bytes) -> None:
    """A request to the metrics endpoint."""
    prometheus.complete(data)
    target = prometheus.target(data)
    assert target is None or isinstance(target, str)


def kernel(data: bytes) -> None:
    """Replies of the kernel's netlink."""
    with contextlib.suppress(FormatError, OSError):
        for message in netlink.messages(data):
            netlink.connected(message, 0)
            netlink.family(message)


HELLO = b"".join(map(bytes, repl.encode_json(Type.HELLO, 7, nodes.HELLO)))
GO = b"\0\0\0\3" + nodes.GO
WRITE = struct.pack(">IHHQQI", 0x25609513, 1, 1, 7, 512, 4) + b"data"
READ = struct.pack(">IHHQQI", 0x25609513, 0, 0, 8, 0, 4096)
STATUS = struct.pack(">IHHQQI", 0x25609513, 0, 7, 9, 0, 65536)
META = b"IHAVEOPT\0\0\0\x0a\0\0\0\x1c\0\0\0\1v\0\0\0\1\0\0\0\x0fbase:allocation"
LINE = b'{"jsonrpc":"2.0","id":1,"method":"%s","params":%s}\n'
CONFIG = b"""group = "g"
node = "a"
state_dir = "s"
[nbd]
listen = ["tcp:127.0.0.1:1", "unix:n"]
tls = { cert = "c", key = "credential:k", client_ca = "a", pins = [] }
[admin]
socket = "x"
metrics = "tcp:[::1]:2"
[log]
size = "1GiB"
[limits]
handshake_seconds = "500ms"
[[volume]]
name = "v"
size = "1GiB"
facets = ["f"]
client_addresses = ["10.0.0.0/8"]
[[remote]]
name = "b"
address = "tcp:b:1"
[replication]
secret_file = "s"
"""


def _sealed(kind: Type, body: bytes) -> bytes:
    return bytes([kind, 0]) + struct.pack("<H", len(body)) + body


REGION = _sealed(Type.REGION, repl.REGION.pack(1, 0, 0, 0, 4) + b"data")
HASHES = _sealed(Type.HASHES, repl.HASHES.pack(1, 0, 65536, 0, 65536, bytes(16)) + bytes(16))
FRAMES = _sealed(Type.RECORDS, nodes.RECORDS) + REGION + HASHES + _sealed(Type.RESYNC_END, bytes(8))
ANSWERS = (
    _sealed(Type.ACK, bytes(24))
    + _sealed(Type.WANT, repl.TOKEN.pack(1) + bytes([1, 0, 1, 0]))
    + _sealed(Type.COPIES, repl.COPIES.pack(4))
    + _sealed(Type.DONE, repl.TOKEN.pack(1) + repl.TOKEN.pack(2))
    + _sealed(Type.CONSISTENT, repl.SEQ.pack(2))
    + _sealed(Type.DATA, repl.DATA.pack(1, 2, 0) + b"data")
    + _sealed(Type.VERIFIED, repl.TOKEN.pack(1) + bytes(4))
)
LIST = b"IHAVEOPT\0\0\0\3\0\0\0\0"

TARGETS = {
    "nbd_server": Target(nbd_server, (b"\xfe" + GO + WRITE + READ, b"\0" + GO, b"\3" + GO)),
    "nbd_client": Target(nbd_client, (b"NBDMAGICIHAVEOPT\0\3" + bytes(40),)),
    "frames": Target(frames, (b"\0" + HELLO, b"\1" + FRAMES)),
    "records": Target(records, (nodes.RECORD, nodes.RECORDS, record.fill(1, 1, 128) + bytes(64))),
    "marks": Target(marks, (nodes.MARK,)),
    "superblock": Target(
        superblock, (slots.encode(1, {"uuid": "x"})[:200], b""), 2 * slots.SLOT_SIZE
    ),
    "maps": Target(maps, (mappage.encode_sector(3, [0] * mappage.SLOTS),)),
    "admin": Target(admin, (LINE % (b"status", b"{}"), LINE % (b"wait", b'{"until":"in-sync"}'))),
    "config": Target(config, (CONFIG,)),
    "auth": Target(auth, (json.dumps({"version": 1, "group": "g", "peer": "b"}).encode(),)),
    "certificate": Target(certificate, (bytes.fromhex("3009300702010130003000"),)),
    "http": Target(http, (b"GET /metrics HTTP/1.1\r\n\r\n",)),
    "kernel": Target(kernel, (netlink.family_request(),)),
    "node_nbd": Target(
        nodes.nbd,
        (
            b"\0" + WRITE + READ,
            b"\2" + STATUS,
            b"\4" + WRITE + READ,
            b"\1" + META + nodes.GO,
            b"\1" + LIST + nodes.go(b"v@1") + WRITE,
        ),
    ),
    "node_primary": Target(
        nodes.primary, (b"\1" + ANSWERS, b"\2" + ANSWERS, b"\3" + HELLO, b"\0" + ANSWERS)
    ),
    "node_peer": Target(
        nodes.secondary,
        (
            b"\0" + FRAMES,
            b"\2" + FRAMES,
            b"\3" + FRAMES,
            b"\3" + _sealed(Type.RECORDS, nodes.STRAY),
            b"\3" + _sealed(Type.REGION, repl.REGION.pack(1, 7, 0, 0, 0)),
        ),
    ),
    "node_peer_raw": Target(nodes.raw_secondary, (HELLO,)),
    "node_admin": Target(
        nodes.admin, (b"\0{}", b'\1{"until":"in-sync","timeout":0}', b'\x12{"snapshot":"1"}')
    ),
    "node_disk": Target(disks.start, disks.SEEDS, 256),
}
