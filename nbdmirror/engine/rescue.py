"""Reads that the chosen facet could not serve: asked of another one, and mended (M11, M14, I8).

The error is counted. What another facet, or where there is none a remote, gave is written to the
one that failed, in the background and under the range lock; one that fails too often leaves
service. Called by ``Volume.read``; what the usual read costs, this does not touch.

With no local facet in service a volume goes on as long as a remote follows the log: what is
written is in the log, and what is read comes from the remote, with the log laid over it. A remote
that a person has paused does not count: nobody knows what happens there until it is resumed, and
what would be written meanwhile might come to nothing (V14).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from nbdmirror.engine.events import Event, EventLog
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.remoteread import Behind, read_through
from nbdmirror.engine.volume import Volume, nobody, read_failed
from nbdmirror.errors import DiskFailed, FormatError, VolumeFailed
from nbdmirror.ports import Buffer

READ_ERRORS_MAX = 32
"""A facet that had so many reads fail since it came into service leaves it."""
MEND_ALIGN = 4096
"""A bad sector is written as a whole page: a part of one would be read first, and fail again."""
MEND_BYTES_MAX = 4 << 20
"""A longer read that failed is not mended at once: one bad sector does not cost a rewrite."""
MENDING_MAX = 16
REACH_SECONDS = 30.0
"""A read waits so long for a remote that follows but cannot be reached; then it fails."""
TELL_SECONDS = 2.0
"""Who waits longer may wonder: it is told what for. A remote that applies a moment later is usual.
"""
RETRY_SECONDS = 1.0
"""... and asks again at least so often."""

FacetLost = Callable[[Volume, LocalFacet], Awaitable[None]]


class Rescue:
    """The other ways to a volume's data, for one node."""

    def __init__(
        self, volumes: list[Volume], remotes: list[Remote], events: EventLog, lost: FacetLost
    ) -> None:
        self._volumes = volumes
        self._remotes = remotes
        self._events = events
        self._lost = lost
        self._mending: dict[asyncio.Task[None], None] = {}
        self._unanswered: dict[Volume, str] = {}
        """Why nobody could be asked for a volume that is read from remotes, since when that is so.
        """
        events.listen(self._forget)
        for volume in volumes:
            volume.rescue, volume.nobody = self.read, self.nobody

    def nobody(self, volume: Volume) -> VolumeFailed:
        """The error of a request that no facet can serve: what is with the remotes that hold the
        volume, if any do."""
        following = self.following(volume)
        if not following:
            return nobody(volume)
        remote = next((one for one in following if not one.facts["paused"]), following[0])
        what = f"no facet of volume {volume.name} is in service, and remote {remote.name}"
        if not self.goes_on(volume) and remote.facts["paused"]:
            hint = f"nbdmirror resume {remote.name} goes on with it, if it holds that still"
            return VolumeFailed(f"{what} is paused", hint=hint)
        why = self._unanswered.get(volume, "could not be asked")
        hint = "bring the remote back, or a facet: see nbdmirror status"
        return VolumeFailed(f"{what} did not answer: {why}", hint=hint)

    async def read(
        self,
        volume: Volume,
        offset: int,
        length: int,
        facet: LocalFacet | None,
        error: OSError | None,
    ) -> Buffer:
        """The bytes that ``facet`` failed to give with ``error``; VolumeFailed if nobody can."""
        if facet is None or error is None:
            data = await self._from_remote(volume, offset, length)
            if data is None:  # a facet may have come back while a remote was waited for
                data = await self._from_facets(volume, None, offset, length)
            if data is None and volume.in_service():
                problem = f"no facet of volume {volume.name} could read {length} bytes at {offset}"
                raise VolumeFailed(f"{problem}, nor a remote", hint="see their disks and links")
            if data is None:
                raise volume.no_facet()
            return data
        await self._count(volume, facet, error)
        data = await self._from_facets(volume, facet, offset, length)
        if data is None:
            data = await self._from_remote(volume, offset, length)
        if data is None:
            raise read_failed(facet, offset, length, error) from error
        self._mend_soon(volume, facet, offset, length)
        return data

    async def _from_facets(
        self, volume: Volume, failed: LocalFacet | None, offset: int, length: int
    ) -> Buffer | None:
        """The range from a facet in service other than the one that ``failed``; errors count."""
        for other in volume.serving():
            if other is not failed:
                stint = other.stint
                try:
                    data = await other.read(offset, length)
                except OSError as error:
                    await self._count(volume, other, error)
                else:
                    if other.in_service and other.stint == stint:  # see ``Volume``
                        return data
        return None

    async def _count(self, volume: Volume, facet: LocalFacet, error: OSError) -> None:
        facet.errors += 1
        facet.read_errors += 1
        self._events.emit(
            "read-error", volume=volume.name, facet=facet.path, why=error.strerror or str(error)
        )
        others = [other for other in volume.in_service() if other is not facet]
        if facet.read_errors >= READ_ERRORS_MAX and others and facet.in_service:
            facet.fail(f"{facet.read_errors} reads failed; the last", error)
            await self._lost(volume, facet)

    # -- mending -------------------------------------------------------------------------------

    def _mend_soon(self, volume: Volume, facet: LocalFacet, offset: int, length: int) -> None:
        start = offset // MEND_ALIGN * MEND_ALIGN
        end = min(-(-(offset + length) // MEND_ALIGN) * MEND_ALIGN, volume.size)
        if end - start > MEND_BYTES_MAX or len(self._mending) >= MENDING_MAX:
            return
        # Not awaited: the reader may hold the range itself, and has its data.
        task = asyncio.ensure_future(self._mend(volume, facet, start, end - start))
        self._mending[task] = None
        task.add_done_callback(self._mended)

    def _mended(self, task: asyncio.Task[None]) -> None:
        del self._mending[task]
        # A superblock that cannot be saved has told the node of it.
        if not task.cancelled() and not isinstance(task.exception(), DiskFailed):
            task.result()

    async def _mend(self, volume: Volume, facet: LocalFacet, offset: int, length: int) -> None:
        """Writes a range anew from another facet; writes to it wait meanwhile."""
        async with volume.locked(offset, length, exclusive=True), volume.beside:
            data = await self._from_others(volume, facet, offset, length)
            if data is None or not facet.writable:
                return
            try:
                facet.pwrite(offset, data)
            except OSError as error:
                facet.fail("write", error)
            else:
                where = {"volume": volume.name, "facet": facet.path}
                self._events.emit("read-mended", **where, offset=offset, length=length)
                return
        await self._lost(volume, facet)

    async def _from_others(
        self, volume: Volume, facet: LocalFacet, offset: int, length: int
    ) -> Buffer | None:
        for other in volume.serving():
            if other is not facet:
                stint = other.stint
                try:
                    data = await other.read(offset, length)
                except OSError:
                    continue
                if other.in_service and other.stint == stint:
                    return data
        return await self._from_remote(volume, offset, length)

    # -- remotes -------------------------------------------------------------------------------

    def goes_on(self, volume: Volume) -> bool:
        """Whether the volume is of use without a local facet: a remote follows the log, and is not
        paused."""
        return not volume.ended and any(
            not remote.facts["paused"] for remote in self.following(volume)
        )

    def following(self, volume: Volume) -> list[Remote]:
        """The remotes that hold all of it, with the log."""
        return [remote for remote in self._remotes if remote.follows(volume)]

    def holds(self, volume: Volume, seq: int) -> bool:
        """Whether whoever the volume may come back from has everything up to record ``seq``,
        durably: a remote that is only about to follow among them."""
        return self.goes_on(volume) and not self._lacking(seq)

    def _lacking(self, seq: int) -> list[Remote]:
        """The remotes that read the log, and do not have that yet."""
        return [one for one in self._remotes if not one.tracking and one.durable_seq < seq]

    async def durable(self, volume: Volume, seq: int) -> bool:
        """Returns when the volume is on remotes up to record ``seq``, durably: that is what a flush
        promises where the log is in memory and no facet is left (I3, M13). The next start goes by
        any remote that follows, so none may lack it. Once one has it, the others are waited for
        while they are in reach; who is not leaves the log first, durably. False if a facet is back
        meanwhile. DiskFailed if neither is within ``REACH_SECONDS``."""
        loop = asyncio.get_running_loop()
        end = loop.time() + REACH_SECONDS
        while self.goes_on(volume):
            if volume.in_service():
                return False
            late = loop.time() >= end
            if any(remote.durable_seq >= seq for remote in self.following(volume)):
                for remote in self._lacking(seq):
                    other = self._leaning_on(remote)
                    if other is not None:  # another volume has nobody else (M11)
                        if late:
                            raise DiskFailed(other.no_facet().message)
                    elif late or remote.reads is None:
                        await remote.overflow("what was flushed is on another remote only")
                if self.holds(volume, seq):
                    return True
            elif late:
                break
            await self._change([*self._remotes], min(RETRY_SECONDS, max(0.0, end - loop.time())))
        raise DiskFailed(volume.no_facet().message)

    def in_reach(self, volume: Volume) -> bool:
        """Whether such a remote is connected now."""
        return any(remote.reads is not None for remote in self.following(volume))

    def leaning(self) -> list[Volume]:
        """The volumes with no local facet in service: remotes are what is read of them."""
        return [volume for volume in self._volumes if not volume.in_service()]

    def needed(self, remote: Remote) -> bool:
        """Whether a volume without local facets has no other remote that can be asked."""
        return self._leaning_on(remote) is not None

    def _leaning_on(self, remote: Remote) -> Volume | None:
        """Such a volume: a remote that is paused follows, and answers nobody."""
        for volume in self.leaning():
            following = self.following(volume)
            if [one for one in following if one is remote or not one.facts["paused"]] == [remote]:
                return volume
        return None

    async def _from_remote(self, volume: Volume, offset: int, length: int) -> Buffer | None:
        """The range from a remote that follows; ``None`` if there is none, or if none can be
        reached for ``REACH_SECONDS``."""
        if volume.overlay is not None and volume.overlay.hides(offset, length):
            return None  # a remote has what clients read, not what is below
        loop = asyncio.get_running_loop()
        began = loop.time()
        end = began + REACH_SECONDS
        while self.goes_on(volume) and loop.time() < end:
            following = self.following(volume)
            following.sort(key=lambda remote: -remote.applied_seq)
            why = []
            for remote in following:
                try:
                    data = await read_through(remote, volume, offset, length)
                except (Behind, OSError, FormatError) as error:  # a lost link is an OSError too
                    why.append(f"{remote.name}: {error}")
                else:
                    self._unanswered.pop(volume, None)
                    return data
            if any(other.in_service for other in volume.facets):
                return None  # who asked was not served by it either
            if loop.time() >= began + TELL_SECONDS:
                self._tell(volume, "; ".join(why))
            await self._change(following, min(RETRY_SECONDS, max(0.0, end - loop.time())))
        return None

    def _tell(self, volume: Volume, why: str) -> None:
        if volume not in self._unanswered:
            self._events.emit("remote-awaited", volume=volume.name, why=why)
        self._unanswered[volume] = why

    def _forget(self, event: Event) -> None:
        """A facet of a volume is in service again, or a remote in reach: what comes after that is
        another loss, which is told anew, though nobody has read meanwhile (X4)."""
        if event["kind"] in ("facet-synchronised", "connected"):
            self._unanswered.clear()

    @staticmethod
    async def _change(remotes: list[Remote], seconds: float) -> None:
        waits = [asyncio.ensure_future(remote.changed.wait()) for remote in remotes]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def stop(self) -> None:
        """Ends what is being mended: it is, at the next error."""
        tasks = list(self._mending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
