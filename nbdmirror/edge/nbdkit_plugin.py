"""The script that nbdkit's Python plugin loads: ``nbdkit python nbdkit_plugin.py config=FILE``.

Owns nbdkit's callbacks, and nothing else: each posts to the node's loop through ``Bridge``. It is
loaded as ``__main__`` by ``edge.nbdkit``; by hand it runs as well, with nbdkit's filters, TLS-PSK,
vsock or ``--run``, as long as nbdkit stays in the foreground (-f), where errors can be seen.

Three requests of a client abort the nbdkit of Debian 12 (1.32.5); none may get that far:
hanging up with two requests in flight (requests of a connection are serialised, here and by
``-t 1``), WRITE_ZEROES with FAST_ZERO where it is not offered (it is), and BLOCK_STATUS answered
with more than was asked for (never is).

What the native front end does and this one cannot, because nbdkit leaves no way to it: the
``nbdmirror:dirty:REMOTE`` contexts (a plugin has ``base:allocation`` only), a deadline for the
handshake at a unix socket, holes in structured reads, more than one request of a connection at a
time, messages with errors (the client gets the number, the text goes to the journal), and
``memory_bytes_max`` and ``request_bytes_max``: nbdkit receives a request of up to 64 MiB for each
connection by itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import nbdkit

from nbdmirror.codec import record
from nbdmirror.edge.nbdkit_bridge import Bridge, Client, die_with_supervisor, end
from nbdmirror.edge.nbdkit_strangers import Peer, peer_of
from nbdmirror.engine import operations
from nbdmirror.engine.blockstatus import BLOCK_STATUS_EXTENTS_MAX
from nbdmirror.engine.snapshotexport import Writer
from nbdmirror.engine.volume import Change, Volume
from nbdmirror.errors import UsageError, VolumeFailed
from nbdmirror.ports import Buffer

P = ParamSpec("P")
T = TypeVar("T")
Later = Coroutine[Any, Any, Any]

API_VERSION = 2
FUA = int(nbdkit.FLAG_FUA)
MAY_TRIM = int(nbdkit.FLAG_MAY_TRIM)
REQ_ONE = int(nbdkit.FLAG_REQ_ONE)
HOLE = int(nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO)

SOCKADDR_BYTES = 128

_NBDKIT = ctypes.CDLL(None)
_bridge: Bridge
_config_path = ""


def answered(callback: Callable[P, T]) -> Callable[P, T]:
    """The client gets the errno of the failure."""

    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return callback(*args, **kwargs)
        except VolumeFailed as error:
            nbdkit.set_error(error.errno)
            raise

    return wrapped


# -- life ----------------------------------------------------------------------------------------


def config(key: str, value: str) -> None:
    """``config=FILE``, the only parameter."""
    global _config_path
    if key != "config":
        raise UsageError(f"unknown parameter {key!r}", hint="the only one is config=FILE")
    _config_path = value


def thread_model() -> int:
    """Connections in parallel, the requests of each one by one: see the head of this module."""
    return int(nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS)


def get_ready() -> None:
    """Reads the configuration and looks at the state; ends nbdkit if they cannot be used."""
    global _bridge
    die_with_supervisor()
    try:
        _bridge = Bridge(_config_path, nbdkit.shutdown)
        _bridge.check()
    except Exception as error:
        end(error)


def after_fork() -> None:
    """Starts the node; ends nbdkit if it cannot serve."""
    try:
        _bridge.start()
    except Exception as error:
        end(error)


def cleanup() -> None:
    """Stops the node: nbdkit has no connection any more."""
    try:
        _bridge.close()
    except Exception as error:
        end(error)


# -- exports -------------------------------------------------------------------------------------


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    """Name and description of each."""
    return [(info.name, info.description) for info in _bridge.exports()]


def default_export(readonly: bool, is_tls: bool) -> str:
    """The first, as with the native front end."""
    exports = _bridge.exports()
    return exports[0].name if exports else ""


def preconnect(readonly: bool) -> None:
    """Refuses a connection above the limit."""
    if not _bridge.admit(_peer()):
        raise VolumeFailed("too many connections")


@answered
def open(readonly: bool) -> Client:
    """A client has chosen an export."""
    return _bridge.attach(nbdkit.export_name(), _peer())


def _peer() -> Peer | None:
    """Who is at the other end of the connection whose thread this is; None: nobody by TCP. Of
    nbdkit's functions this is one that its Python bindings do not have."""
    length = ctypes.c_uint32(SOCKADDR_BYTES)
    sockaddr = ctypes.create_string_buffer(SOCKADDR_BYTES)
    if _NBDKIT.nbdkit_peer_name(sockaddr, ctypes.byref(length)) != 0:
        return None
    return peer_of(sockaddr.raw[: length.value])


def close(client: Client) -> None:
    """It is gone."""
    _bridge.detach(client)


def export_description(client: Client) -> str:
    """As in the list."""
    return client.info.description


def get_size(client: Client) -> int:
    """In bytes."""
    return client.info.size


def block_size(client: Client) -> tuple[int, int, int]:
    """Minimum, preferred, maximum."""
    return client.info.block_min, client.info.block_preferred, client.info.block_max


def is_rotational(client: Client) -> bool:
    """Of the export."""
    return client.info.rotational


def can_write(client: Client) -> bool:
    """Unless the export is read-only."""
    return not client.info.read_only


def _always(client: Client) -> bool:
    """Offered by every export."""
    return True


can_flush = can_trim = can_zero = can_fast_zero = can_extents = can_multi_conn = _always


def can_fua(client: Client) -> int:
    """Done by the engine: the log is synced, not the volume."""
    return int(nbdkit.FUA_NATIVE)


def can_cache(client: Client) -> int:
    """Done by the engine."""
    return int(nbdkit.CACHE_NATIVE)


# -- requests ------------------------------------------------------------------------------------


@answered
def pread(client: Client, buf: memoryview, offset: int, flags: int) -> None:
    """READ."""
    buf[:] = client.call(_read, client.volume, offset, len(buf))


def _read(volume: Volume, offset: int, length: int) -> Buffer | Later:
    data = volume.try_read(offset, length)
    return data if data is not None else volume.read(offset, length)


@answered
def pwrite(client: Client, buf: memoryview, offset: int, flags: int) -> None:
    """WRITE. A copy of the data: the log keeps it for its readers, nbdkit uses its buffer again."""
    change = Change(record.WRITE, 0, offset, len(buf), bytes(buf))
    client.call(_write, client.volume, change, bool(flags & FUA))


def _write(volume: Volume, change: Change, durable: bool) -> Later | None:
    return _writer(volume).write(volume, [change], durable=durable)


@answered
def flush(client: Client, flags: int) -> None:
    """FLUSH."""
    client.call(lambda: _writer(client.volume).flush())


@answered
def trim(client: Client, count: int, offset: int, flags: int) -> None:
    """TRIM."""
    client.call(_trim, client.volume, offset, count, bool(flags & FUA))


def _trim(volume: Volume, offset: int, length: int, durable: bool) -> Later:
    return operations.trim(_writer(volume), volume, offset, length, durable=durable)


@answered
def zero(client: Client, count: int, offset: int, flags: int) -> None:
    """WRITE_ZEROES; it is always fast, so FAST_ZERO asks for nothing more."""
    client.call(_zero, client.volume, offset, count, not flags & MAY_TRIM, bool(flags & FUA))


def _zero(volume: Volume, offset: int, length: int, keep_space: bool, durable: bool) -> Later:
    return operations.zero(
        _writer(volume), volume, offset, length, keep_space=keep_space, durable=durable
    )


@answered
def cache(client: Client, count: int, offset: int, flags: int) -> None:
    """CACHE."""
    client.call(operations.cache, client.volume, offset, count)


@answered
def extents(client: Client, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """BLOCK_STATUS of ``base:allocation``: pieces within the range that was asked for."""
    limit = 1 if flags & REQ_ONE else BLOCK_STATUS_EXTENTS_MAX
    pieces = client.call(client.volume.pieces, offset, count, limit)
    return [(start, length, HOLE if hole else 0) for start, length, hole in pieces]


def _writer(volume: Volume) -> Writer:
    """What takes the changes of its clients, as it is now (on the loop): the group, or, of a
    writable snapshot, that snapshot itself."""
    exports = _bridge.daemon.node.exports
    assert exports is not None
    writer = exports.writer(volume)
    assert writer is not None
    return writer
