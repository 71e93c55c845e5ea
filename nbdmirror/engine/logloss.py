"""The log's disk is lost, and a new one is put in its place, while clients go on (M13).

What was acknowledged is in the facets, for they were written with every record. So nothing is lost
by this order of steps, in which nothing is appended:

1. the links to the remotes end, for they read the log;
2. what a remote or a facet out of service had not got from the log is marked in its map, durably;
   where the log cannot be read back, everything is. Who had it all goes on as before;
3. the facets in service are synced: what was flushed, or will be next, is on their disks;
4. the superblock says that there is no log on a disk, and from which seq on;
5. the log goes on in memory. It is *volatile*: a FLUSH syncs the facets, a crash is treated as a
   power loss (the active map covers what a remote may lack), and a stop marks what is pending.

The way back, and any other move of the log, is the same with a new file in step 5.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from nbdmirror.config import Config
from nbdmirror.engine.create import log_path
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.facets import Facets
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import RING_AT, Log
from nbdmirror.engine.memoryfile import MemoryFile
from nbdmirror.engine.primary import Primary
from nbdmirror.engine.spill import NO_SPILL, Spill
from nbdmirror.errors import DiskFailed, NbdmirrorError, Refused
from nbdmirror.ports import Disk, File

MEMORY_BYTES_MAX = 64 << 20
"""Of a log in memory (I6), or less where the log on disk is smaller."""
PENDING_POLL_SECONDS = 0.01
CATCH_UP_SECONDS = 2.0
"""Before entries are marked, a remote gets so long to confirm them."""


def open_log(disk: Disk, config: Config, state: dict[str, Any]) -> Log:
    """The log that the superblock's ``state`` speaks of; one that was in memory begins anew."""
    tail = state["tail"]
    if not state.get("log_volatile"):
        path = state.get("log_path") or log_path(config)
        return Log.open(disk, path, tail["position"], tail["seq"])
    seq = state["end_seq"] + 1 if state["clean"] else tail["seq"]
    capacity = memory_capacity(config.log.size)
    return Log(MemoryFile(RING_AT + capacity), capacity, 0, seq)


def memory_capacity(size: int) -> int:
    """Bytes of the ring in memory that stands for a log of ``size`` bytes."""
    return min(size - RING_AT, MEMORY_BYTES_MAX) // 4096 * 4096


class LogKeeper:
    """Where the log of a primary is, and its moves."""

    def __init__(
        self,
        log: Log,
        size: int,
        primary: Primary,
        facets: Facets,
        housekeeper: Housekeeper,
        disk: Disk,
        spill_threshold: int,
    ) -> None:
        """``size`` of the log, and of its part in memory if it spills, in bytes."""
        self._log = log
        self._size = size
        self._primary = primary
        self._facets = facets
        self._store = facets.store
        self._events = facets.events
        self._housekeeper = housekeeper
        self._disk = disk
        self._task: asyncio.Task[None] | None = None
        self.on_failed: Callable[[NbdmirrorError], None] = lambda error: None
        self.spill: Spill | None = None
        if spill_threshold:
            self.spill = Spill(log, spill_threshold, facets, housekeeper)
            facets.spill = self.spill

    def begin(self) -> None:
        """The superblock is saved: from here on the log is as it says, of the size that it was made
        with: another one in the configuration is for the next, and told."""
        if not self.volatile and self._log.capacity != (self._size - RING_AT) // 4096 * 4096:
            self._events.emit(
                "log-size-kept", size=self._log.capacity + RING_AT, configured=self._size
            )
        if self.volatile:
            self._log.stand_in = self._housekeeper.sync_log
        elif self.spill is not None:
            self.spill.begin()

    def status(self) -> dict[str, Any]:
        """Of the ``log`` object of the status: its mode, and what goes with that."""
        return NO_SPILL if self.spill is None else {"mode": "spill", "spill": self.spill.status()}

    @property
    def volatile(self) -> bool:
        """Whether the log is in memory."""
        return bool(self._store.state.get("log_volatile"))

    @property
    def survivable(self) -> bool:
        """Whether the facets hold all that the log does."""
        return not self.volatile and all(v.in_service() for v in self._primary.group.volumes)

    # -- the loss ------------------------------------------------------------------------------

    def lost(self, error: DiskFailed) -> None:
        """The log has failed: goes on without its disk, or says that this cannot be."""
        if not self.survivable:
            self.on_failed(error)
        elif self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._go_on(error))

    async def back(self) -> None:
        """Returns when the failed log has been replaced; raises what keeps it from being."""
        if self._task is None:
            assert self._log.failed is not None
            raise self._log.failed
        await asyncio.shield(self._task)
        if self._log.failed is not None:
            raise self._log.failed

    async def _go_on(self, error: DiskFailed) -> None:
        try:
            async with self._primary.moving, self._housekeeper.releasing:
                if not self._is_lost():
                    return  # a person was moving it, and has
                self._events.emit("log-lost", why=error.message)
                if self.spill is not None:
                    await self.spill.end()
                await self._settle(f"the log was lost: {error.message}")
                if not self.survivable:
                    raise error  # the last facet that held it is gone too
                await self._note(volatile=True, path=None)
                capacity = memory_capacity(self._size)
                file = MemoryFile(RING_AT + capacity)
                self._log.go_on(file, capacity, self._housekeeper.sync_log)
                self._resume()
                self._events.emit("log-in-memory", size=capacity)
        except NbdmirrorError as failure:
            for gate in self._primary.group.gates:
                gate.lost()  # nothing begins anew
            self.on_failed(failure)

    def _is_lost(self) -> bool:
        return self._log.failed is not None

    async def _settle(self, why: str) -> None:
        """Steps 1 to 3. It is this side that ends the links, and begins them anew: no client gets
        an error for that (I8)."""
        for remote in self._primary.remotes:
            remote.drop.set()
        await self._primary.stop()
        for remote in self._primary.remotes:
            if remote.tracking or remote.durable_seq < self._log.next_seq - 1:
                await remote.overflow(why)  # or what is left of one that has begun
            await remote.sync_maps()
        # A TRIM that is in the log, and perhaps at a remote, must be in the facets too.
        while any(facet.pending for facet in self._writable()):
            await asyncio.sleep(PENDING_POLL_SECONDS)
        await self._housekeeper.sync_facets(everything=True)
        for facet in self._writable():
            facet.synced_seq = self._log.next_seq - 1  # one that fails now lacks nothing of it
        for member in self._facets.kept_for():
            await member.to_map()

    def _writable(self) -> list[LocalFacet]:
        return [facet for volume in self._primary.group.volumes for facet in volume.writable()]

    async def _note(self, *, volatile: bool, path: str | None) -> None:
        """Step 4, in one save."""
        state = self._store.state
        seq = self._log.next_seq
        state.update(log_volatile=volatile, tail={"position": 0, "seq": seq}, durable_seq=seq - 1)
        state["log_spill"] = self.spill is not None and not volatile
        if path is not None:
            state["log_path"] = path
        await self._store.save()

    def _resume(self) -> None:
        self._log.frozen = False
        self._housekeeper.wake()
        self._primary.start()

    # -- a new place ---------------------------------------------------------------------------

    async def replace(self, path: str) -> dict[str, Any]:
        """Goes on in a new file at ``path``, which must not exist; clients wait for moments."""
        if self._disk.exists(path):
            raise Refused(f"{path} exists already", hint="name a file that does not exist")
        async with self._primary.moving:
            file, capacity = await self._make(path)
            try:
                await self._catch_up()
                async with self._housekeeper.releasing:
                    await self._move(file, capacity, path)
            except BaseException:
                if self._store.state.get("log_path") != path:
                    file.close()
                    self._discard(path)
                raise
        self._events.emit("log-moved", log=path)
        return {"log": path}

    async def _make(self, path: str) -> tuple[File, int]:
        """The file of a new log, empty and durable; NbdmirrorError if there can be none."""
        directory = path.rpartition("/")[0] or "/"
        # As for a facet: one that is missing may be a file system that is not mounted.
        if not self._disk.exists(directory):
            problem = f"cannot make the log {path}: there is no directory {directory}"
            raise NbdmirrorError(problem, hint="make it, or mount its disk")
        try:
            await Log.create(self._disk, path, self._size)
            await self._disk.sync_directory(directory)
            return Log.open_file(self._disk, path)
        except OSError as error:
            if not isinstance(error, FileExistsError):
                self._discard(path)
            raise NbdmirrorError(
                f"cannot make the log {path}: {error.strerror or error}",
                hint="free space there, or name another path",
            ) from error

    def _discard(self, path: str) -> None:
        """A move that failed leaves no file behind: the same command must work when it can."""
        with contextlib.suppress(OSError):
            self._disk.unlink(path)

    async def _move(self, file: File, capacity: int, path: str) -> None:
        self._check_served()
        self._log.frozen = True
        try:
            if self.spill is not None:
                await self.spill.end()
            await self._settle("the log was moved")
            self._check_served()  # one that fails from here on lacks nothing of the log
            await self._note(volatile=False, path=path)
            self._log.go_on(file, capacity, None)
            self.begin()
        except DiskFailed as error:
            self.on_failed(error)  # of the state directory, or of the last facet
            raise
        except NbdmirrorError:
            if self.spill is not None and not self.volatile:
                self.spill.stay()
            raise
        finally:
            self._resume()

    def _check_served(self) -> None:
        """Refused while the log is what a volume's last facet comes back from (M11)."""
        for volume in self._primary.group.volumes:
            if not volume.in_service():
                raise Refused(
                    f"volume {volume.name} has no local facet in service, the log is kept for it",
                    hint="bring a facet back first: see nbdmirror facet list",
                )

    async def _catch_up(self) -> None:
        """What remotes confirm in time need not be marked."""
        upto = self._log.next_seq - 1
        end = asyncio.get_running_loop().time() + CATCH_UP_SECONDS
        for remote in list(self._primary.remotes):
            while remote.link == "connected" and not remote.tracking and remote.durable_seq < upto:
                try:
                    async with asyncio.timeout_at(end):
                        await remote.changed.wait()
                except TimeoutError:
                    return

    # -- while it is in memory -----------------------------------------------------------------

    async def make_safe(self, upto: int) -> None:
        """In memory: returns when no remote depends on the log for a record up to ``upto``."""
        if self.volatile:
            await self._catch_up()
            await self.mark_pending("the log in memory does not cover it", upto)
            for member in self._facets.holding():
                await member.to_map()

    async def mark_pending(self, why: str, upto: int) -> None:
        """Puts what remotes lack up to a seq into their maps."""
        for remote in list(self._primary.remotes):
            if remote.tracking or remote.durable_seq < upto:
                await remote.overflow(why)  # or what is left of one that has begun

    async def stop(self) -> None:
        """Clean stop, after the links have ended: what is pending is marked, for it is gone."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        if self.spill is not None:
            await self.spill.end()
        if self.volatile:
            await self.mark_pending("the log was in memory", self._log.next_seq - 1)
            for member in self._facets.kept_for():
                await member.to_map()
