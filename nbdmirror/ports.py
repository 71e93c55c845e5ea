"""The seams between the engine and the world: disk, network, wall clock, randomness.

The engine knows only these. ``edge`` implements them over Linux, ``tests/sim`` over a simulated
world; both pass the suites in ``tests/contract``. The event loop itself is the clock: engine code
uses ``asyncio.sleep``, ``asyncio.timeout`` and ``loop.time()``; ``Clock`` is for timestamps that
people read and that lag is computed from.

Page-cache reads and writes are plain calls: a write that only copies into the page cache is
cheaper than any hand-over. What can stall is awaited.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class File(Protocol):
    """An open file or block device, addressed by byte.

    Errors are ``OSError`` with their errno. A write is complete or raises; it is volatile until a
    ``sync`` that began after it has returned. After a failed ``sync`` every later ``sync`` of the
    same object raises too (O16): the file's unsynced content is unknown.
    """

    path: str
    block_device: bool

    def size(self) -> int:
        """The length in bytes (of a block device: its capacity)."""

    def identity(self) -> str:
        """The same for the same file or device, over restarts and boots, and another for another,
        under whatever name it is; empty if that cannot be told."""

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; OSError if the file ends before them: a device that is gone
        has no bytes, and says of nothing that it failed.

        May block on a slow disk: for start-up and small state files."""

    def try_pread(self, offset: int, length: int) -> bytes | None:
        """As ``pread``, but ``None`` at once if the data is not in memory."""

    async def read(self, offset: int, length: int) -> bytes:
        """As ``pread``, without stalling the event loop."""

    async def hashes(self, offset: int, length: int, step: int, key: bytes) -> bytes:
        """``codec.hashing.digests`` of the range, read and computed without stalling the loop."""

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Writes all of ``data`` into the page cache."""

    def pwritev(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Writes the parts one behind the other, in as few system calls as possible."""

    def pwrite_places(self, block: Buffer, places: bytes, volume: int) -> None:
        """Writes those pieces of ``block`` whose places (``codec.batch``) are in this volume, each
        as by ``pwrite``, in order; what came before one that fails is written."""

    async def write(self, offset: int, data: Buffer) -> None:
        """As ``pwrite``, without stalling the event loop: for large buffers."""

    async def sync(self) -> None:
        """Makes durable every write that returned before this call began (fdatasync)."""

    async def forget(self) -> None:
        """Whatever an earlier opening's failed sync left, what is read from now on is what the disk
        has, and what is written reaches it with a ``sync`` (O16). What can be written out is first,
        and what cannot is gone: for who has it elsewhere. Never raises."""

    async def forget_range(self, offset: int, length: int) -> None:
        """The same for a range that begins with a page, and of which all was synced, or was to be:
        nothing is written out."""

    async def punch(self, offset: int, length: int) -> None:
        """The range, which must lie within the file, reads as zeros afterwards and gives its space
        back where possible."""

    async def zero(self, offset: int, length: int) -> None:
        """The range, which must lie within the file, reads as zeros afterwards and keeps its space
        allocated where possible."""

    async def allocate(self, length: int) -> None:
        """Fills the file with written zeros up to ``length`` and syncs it (O18); ENOSPC raises."""

    def data_ranges(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """The (offset, length) pieces within the range that may hold data; the rest are holes.
        Of what cannot be told, or lies past the end, nobody says that it is one."""

    def truncate(self, length: int) -> None:
        """Sets the length; new bytes read as zeros."""

    def close(self) -> None:
        """Closes; never raises, never syncs."""


class Disk(Protocol):
    """A host's file name space. Names are absolute paths."""

    def exists(self, path: str) -> bool:
        """Whether a file of that name is there."""

    def open(
        self, path: str, *, create: bool = False, read_only: bool = False, scattered: bool = False
    ) -> File:
        """Opens a file; with ``create`` it must not exist yet (FileExistsError).

        ``scattered`` foretells small writes all over it: a hint, nothing depends on it.

        Opening for writing claims it: BlockingIOError while another process has claimed it."""

    def list(self, directory: str) -> list[str]:
        """The names in a directory, sorted."""

    def make_directory(self, path: str) -> None:
        """Makes a directory and its parents (mode 0700); one that is there is fine."""

    def rename(self, old: str, new: str) -> None:
        """Renames atomically; durable after ``sync_directory``."""

    def unlink(self, path: str) -> None:
        """Removes a name; durable after ``sync_directory``. Of a large file it takes long."""

    async def remove(self, path: str) -> None:
        """As ``unlink``, off the event loop: the space that a large file took is given back."""

    async def sync_directory(self, path: str) -> None:
        """Makes creations, renames and removals in this directory durable."""


class Network(Protocol):
    """Stream connections in the shape of asyncio's own: transports and (buffered) protocols.

    Addresses are ``tcp:HOST:PORT`` (``tcp:[V6]:PORT``) and ``unix:PATH``.
    """

    async def connect(
        self, address: str, protocol: Callable[[], asyncio.BufferedProtocol]
    ) -> asyncio.Transport:
        """Opens a connection; OSError if it cannot be had."""

    async def listen(
        self, address: str, protocol: Callable[[], asyncio.BufferedProtocol]
    ) -> Listener:
        """Accepts connections until the listener is closed."""

    def watch(
        self, transport: asyncio.BaseTransport, gone: Callable[[], object]
    ) -> Callable[[], None]:
        """Calls ``gone``, once at most, when the other side of a connection has closed its end, or
        is lost, though nothing is read from it. Returns what ends the watch, which must be ended
        when the connection is lost, and may be more than once."""


class Listener(Protocol):
    """An open listening socket."""

    address: str

    def close(self) -> None:
        """Stops accepting; connections that are open stay."""


class Peers(Protocol):
    """Connections between nodes. What comes out of it has proved, on both sides, to be a node of
    this group; nothing of the engine has seen it before."""

    async def connect(
        self, address: str, node: str, protocol: Callable[[], asyncio.BufferedProtocol]
    ) -> asyncio.Transport:
        """Opens a connection to the node of that name; OSError if it cannot be had, Refused (an
        error of ``errors``) with the word for it if one side does not take the other's proof."""

    async def listen(
        self, address: str, protocol: Callable[[str | None], asyncio.BufferedProtocol]
    ) -> Listener:
        """Accepts connections; ``protocol`` gets the peer's proved name, None if nothing proves
        names here."""

    def expires_at(self) -> float | None:
        """When this node's certificate ends, in seconds since 1970; None if it needs none."""


class TlsServer(Protocol):
    """TLS for connections that begin in plain text."""

    async def secure(
        self, transport: asyncio.Transport, protocol: asyncio.BufferedProtocol
    ) -> tuple[asyncio.Transport, tuple[str, ...]]:
        """The server's side of a handshake on a transport that is paused, within the time that
        handshakes have. Returns the transport to go on with and the names that the client's
        certificate proves; the first bytes reach ``protocol`` later than that. OSError says why
        there is none, with the word for it; the connection is over then."""

    def expires_at(self) -> float | None:
        """See ``Peers``."""


class Clock(Protocol):
    """Wall-clock time and the machine's identity since boot."""

    def time_ns(self) -> int:
        """Nanoseconds since 1970."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since some moment, exact: for how long a step took, and nothing else."""

    def boot_id(self) -> str:
        """An id that is new with each boot of the machine, and only then."""


@dataclass(frozen=True, slots=True)
class Env:
    """The world that one node lives in."""

    disk: Disk
    network: Network
    clock: Clock
    random: random.Random
    peers: Peers | None = None
    """None: connections between nodes are plain ones of ``network``."""
    nbd_tls: TlsServer | None = None
    """None: NBD clients are served in plain text."""


Sleeper = Callable[[float], Awaitable[None]]
