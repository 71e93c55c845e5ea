"""A volume: what a client attaches. Its facets, its locks, and reads."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from nbdmirror.codec.hashing import digests
from nbdmirror.core.ranges import RangeLock, RangeLocks
from nbdmirror.errors import Refused, VolumeFailed
from nbdmirror.ports import Buffer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from nbdmirror.engine.facet import LocalFacet


T = TypeVar("T")

AFFINITY_SHIFT = 22
"""Where several facets are idle, stretches of 4 MiB are dealt out to them in turn: what one has
in the page cache is not read again from another."""

Rescue = Callable[["Volume", int, int, "LocalFacet | None", OSError | None], Awaitable[Buffer]]
"""Gives the bytes that a facet failed to, or that no facet can: (volume, offset, length, the
facet, its error)."""


class Change(NamedTuple):
    """What a request does to a volume; ``kind`` and ``flags`` as in the log record."""

    kind: int
    flags: int
    offset: int
    length: int
    payload: Buffer | None


class Guard(Protocol):
    """Who must act before regions are overwritten: snapshots that need their content (O21), a
    restore that has not come to them yet (V12)."""

    def holds(self, offset: int, length: int) -> bool:
        """Whether a change of this range has to wait for ``make_way``."""

    def stops(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Whether any of a batch's (offset, length) ranges has to wait."""

    async def make_way(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Does it for (offset, length) ranges; look again then. DiskFailed or VolumeFailed."""


class Overlay(Protocol):
    """Where a volume's content is read while it is not in the facets yet (V12)."""

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes of a range; VolumeFailed if they cannot be had."""

    def hides(self, offset: int, length: int) -> bool:
        """Whether the facets hold something else than the volume anywhere in the range: then
        nobody but a facet has what is below, a remote least of all."""

    async def give_up(self, offset: int, length: int) -> None:
        """What the facets held in the range is lost: who needed it is told."""


class Volume:
    """One volume of a group; ``index`` is its number in log records."""

    def __init__(
        self,
        index: int,
        name: str,
        uuid: str,
        size: int,
        region_size: int,
        facets: list[LocalFacet],
    ) -> None:
        self.index = index
        self.name = name
        self.uuid = uuid
        self.size = size
        self.region_size = region_size
        self.facets = facets
        self.locks: RangeLocks[asyncio.Future[None]] = RangeLocks()
        self.clients = 0
        self.departed = 0
        """Of these, who has said goodbye and hung up, and has changes under way yet."""
        self.closed: str | None = None
        """Why nobody may attach it now, if so."""
        self.ended = False
        """Its last facet failed and nobody stood in for it: the node ends, whoever could stand in
        a moment later. What its superblock says of the facet, and where the log is, rests on that.
        """
        self.beside = asyncio.Lock()
        """Held by a copy between facets, and by a restore's copy into them, from its read to its
        write: a restore takes no range lock, because who holds one may wait for it. Taken after a
        range lock, never before."""
        self.guard: Guard | None = None
        self.overlay: Overlay | None = None
        self._landing: dict[RangeLock[asyncio.Future[None]], None] = {}
        self.rescue: Rescue = _no_rescue
        self.nobody: Callable[[Volume], VolumeFailed] = nobody

    @property
    def regions(self) -> int:
        """How many regions the volume has; the last may be short."""
        return -(-self.size // self.region_size)

    def in_service(self) -> list[LocalFacet]:
        """The facets that take writes and serve reads."""
        return [facet for facet in self.facets if facet.in_service]

    def serving(self, turn: int = 0) -> Iterator[LocalFacet]:
        """The same, ``turn`` of them later, for who awaits something of each: one that has left
        meanwhile is closed, and does not come any more."""
        facets = self.in_service()
        first = turn % max(1, len(facets))
        for facet in facets[first:] + facets[:first]:
            if facet.in_service:
                yield facet

    def writable(self) -> list[LocalFacet]:
        """The facets that take writes: those in service and those being synchronised."""
        return [facet for facet in self.facets if facet.writable]

    def source(self) -> LocalFacet:
        """A facet to read from; VolumeFailed if none may be trusted (I5)."""
        for facet in self.facets:
            if facet.in_service:
                return facet
        raise self.no_facet()

    def no_facet(self) -> VolumeFailed:
        """The error of a request that no facet can serve."""
        return self.nobody(self)

    def choose(self, offset: int) -> LocalFacet | None:
        """The facet to read from: the one where a sequential stream just was, else the one with
        the fewest reads outstanding (M5); ``None`` if none is in service."""
        facets = self.facets
        if len(facets) == 1:
            return facets[0] if facets[0].in_service else None
        turn = offset >> AFFINITY_SHIFT
        best: tuple[int, int] | None = None
        chosen: LocalFacet | None = None
        for index, facet in enumerate(facets):
            if facet.in_service:
                if facet.next_offset == offset:
                    return facet
                rank = facet.outstanding, (index - turn) % len(facets)
                if best is None or rank < best:
                    best, chosen = rank, facet
        return chosen

    def try_read(self, offset: int, length: int) -> Buffer | None:
        """The bytes if they are in memory, else ``None``: then ``read`` is awaited."""
        if self.overlay is not None:
            return None
        facet = self.choose(offset)
        if facet is None:
            return None
        try:
            data = facet.try_pread(offset, length)
        except OSError:
            return None  # the error, if it stays, is ``read``'s to report
        if data is not None:
            facet.next_offset = offset + length
        return data

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes of a range; VolumeFailed with the disk's errno if no facet has them."""
        if self.overlay is not None:
            return await self.overlay.read(offset, length)
        return await self.read_below(offset, length)

    async def read_below(self, offset: int, length: int) -> Buffer:
        """As ``read``, from the facets as they are."""
        return await self._ask(offset, length, lambda facet: facet.read(offset, length), _as_it_is)

    async def read_aside(self, offset: int, length: int) -> Buffer:
        """As ``read``, always off the event loop: for large pieces that nobody waits for."""
        if self.overlay is not None:
            return await self.overlay.read(offset, length)
        return await self._ask(
            offset, length, lambda facet: facet.file.read(offset, length), _as_it_is
        )

    async def hashes(self, offset: int, length: int, step: int, key: bytes) -> bytes:
        """``codec.hashing.digests`` of a range, off the event loop; errors as for ``read``."""

        def hashed(data: Buffer) -> bytes:
            return digests(data, step, key)

        if self.overlay is not None:
            return hashed(await self.overlay.read(offset, length))
        return await self._ask(
            offset, length, lambda facet: facet.file.hashes(offset, length, step, key), hashed
        )

    async def _ask(
        self,
        offset: int,
        length: int,
        ask: Callable[[LocalFacet], Awaitable[T]],
        otherwise: Callable[[Buffer], T],
    ) -> T:
        """What a facet answers that has been in service all the time: one whose sync has failed
        meanwhile may have lost what was written to it (O16). If none can: what is made of the bytes
        that somebody else has."""
        failure: OSError | None = None
        while (facet := self.choose(offset)) is not None:
            stint = facet.stint
            try:
                answer = await ask(facet)
            except OSError as error:
                failure = error
                break
            if facet.in_service and facet.stint == stint:
                return answer
        return otherwise(await self.rescue(self, offset, length, facet, failure))

    def allocation(self, offset: int, length: int) -> Iterable[tuple[int, int, bool]]:
        """(offset, length, hole) pieces that cover the range, from the first trusted facet; all of
        it is data where none is. Found one by one, as they are asked for: there may be many. To be
        used up, or left, within one step."""
        if self.overlay is not None:
            return [(offset, length, False)]
        return self.allocation_below(offset, length)

    def allocation_below(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """As ``allocation``, of the facets as they are."""
        at, end = offset, offset + length
        source = next((facet for facet in self.facets if facet.in_service), None)
        if source is None:
            yield offset, length, False
            return
        for start, size in source.file.data_ranges(offset, length):
            if start > at:
                yield at, start - at, True
            yield start, size, False
            at = start + size
        if at < end:
            yield at, end - at, True

    def pieces(self, offset: int, length: int, limit: int) -> list[tuple[int, int, bool]]:
        """The first ``limit`` pieces of ``allocation``."""
        return list(itertools.islice(self.allocation(offset, length), limit))

    @asynccontextmanager
    async def locked(
        self, offset: int, length: int, *, exclusive: bool
    ) -> AsyncIterator[RangeLock[asyncio.Future[None]]]:
        """Holds a range while something is awaited on it (O13); requests that overlap wait."""
        start, end = offset, offset + length
        while (held := self.locks.conflict(start, end, exclusive=exclusive)) is not None:
            await asyncio.shield(held.waiter)
        waiter = asyncio.get_running_loop().create_future()
        lock = self.locks.hold(start, end, exclusive=exclusive, waiter=waiter)
        try:
            yield lock
        finally:
            self._unlock(lock)

    def _unlock(self, lock: RangeLock[asyncio.Future[None]]) -> None:
        self.locks.release(lock)
        self._landing.pop(lock, None)
        lock.waiter.set_result(None)

    async def wait_unlocked(self, start: int, end: int) -> None:
        """Returns once no held lock overlaps [start, end)."""
        while (held := self.locks.conflict(start, end, exclusive=True)) is not None:
            await asyncio.shield(held.waiter)

    def landing(self, lock: RangeLock[asyncio.Future[None]]) -> None:
        """What holds this lock is in the log, and on its way into the facets until it lets go."""
        self._landing[lock] = None

    def on_their_way(self) -> list[asyncio.Future[None]]:
        """For each of what is in the log and not in the facets yet: done when it is."""
        return [lock.waiter for lock in self._landing]

    async def wait_landed(self, offset: int, length: int) -> None:
        """Returns once the facets hold, in this range, everything that is in the log now. Unlike a
        range lock it waits for nothing that has not been logged."""
        if self._landing:
            for lock in [k for k in self._landing if k.start < offset + length and offset < k.end]:
                await asyncio.shield(lock.waiter)


def _as_it_is(data: Buffer) -> Buffer:
    return data


async def _no_rescue(
    volume: Volume, offset: int, length: int, facet: LocalFacet | None, error: OSError | None
) -> Buffer:
    """Where there is nobody else to ask."""
    if facet is None or error is None:
        raise volume.no_facet()
    facet.errors += 1
    raise read_failed(facet, offset, length, error) from error


@contextmanager
def closed(volumes: Iterable[Volume], why: str) -> Iterator[None]:
    """Nobody attaches them within, and no other command that needs that goes on: Refused. In
    ``why``, {} is the volume's name."""
    volumes = list(volumes)
    for volume in volumes:
        if volume.closed is not None:
            raise Refused(volume.closed)
    for volume in volumes:
        volume.closed = why.format(volume.name)
    try:
        yield
    finally:
        for volume in volumes:
            volume.closed = None


def nobody(volume: Volume) -> VolumeFailed:
    """The error of a request that no facet can serve, nor anybody else."""
    return VolumeFailed(
        f"no facet of volume {volume.name} is in service",
        hint="see the facets in status; replace the disk and restart the node",
    )


def read_failed(facet: LocalFacet, offset: int, length: int, error: OSError) -> VolumeFailed:
    """The error of a read that a facet could not serve."""
    return VolumeFailed(
        f"read of {length} bytes at {offset} of {facet.path} failed: {error.strerror}",
        number=error.errno or 5,
        hint="the facet's disk has an error there",
    )
