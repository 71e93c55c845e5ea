"""``[log] mode = "spill"`` (M4): the log's newest entries are in memory, the file takes the rest.

With a remote that keeps up, an entry is in the facets, at the remote, and gone, without having been
written to the log at all; past ``spill_threshold`` bytes the oldest go to the file
(``engine.spillfile``), which is the same ring as ever: overflow, policies, far readers and maps are
those of a log on disk. What is given up is that the log can bring up the facets after a crash.

**What is promised, and by what.** A write is acknowledged when it is in the log's memory and in the
page cache of every facet in service; a FLUSH or FUA when these facets are synced past it (and
synchronous remotes are durable past it, as ever). Markers of snapshots and restores are durable in
the file before anybody relies on them (``Log.keep``).

**After a crash**, of the process or of the power, nothing is redone: the facets are ahead of what
the file holds, and a record from it would bring back what it was followed by. So:

- The fork point is the last record that recovery finds in the file: the epoch ends there (O10), and
  a new one is durable before the next append, because the seqs behind it are given out again.
- Every record behind it lies in an extent that is still in the active map, durably since before the
  write (O1). For an extent leaves the map only when each of its writes is durable in every facet
  in service (there is no redo that would carry it there), and durable in the file as far as the
  durable tail has not passed it (``Node._make_safe``; O5, O6): then recovery finds it for remotes.
  And memory is dropped unwritten only by a *durable* tail, or recovery would end before a hole.
- So what may differ is marked and compared: local facets are made equal to each other in the active
  extents first, then these go into every remote's DCM, and what the records in the file touch. Not
  one of these records is sent: applied behind the copy of a region they would set it back. A
  remote begins anew at the end, whether it was behind the fork point (T4) or had got further (T7:
  what it has beyond lies in these extents), and is inconsistent until the comparison is through.
- After the death of a process the facets have every acknowledged write in the page cache: nothing
  is lost to clients. But a sync that failed just before may have left pages there that are marked
  clean and not on disk, and no redo writes them anew (O16): the active extents are written anew.

**A facet that leaves** lacks what it had not synced. The log is not kept for facets in service (it
would only grow to the file), so that part may be gone from it: the extents written since go into
the facet's map at once and are compared when it returns (``facetmember``); what follows is kept in
the log as ever. The last facet of a volume that nobody else holds, and that failed, is taken at the
next start for what it has: a power loss of its own.

**A clean stop** writes the memory out, so that the next start finds everything in the file, and
compares nothing.

**A volume without a local facet** (M11) has its acknowledged writes nowhere but in the log. From
the step in which the last one fails everything goes through to the file; before the failure is
noted, and a write acknowledged, all of it is durable there and in the other facets, and one save
says both: that the facet is out of service, and that the log is on disk (``log_spill`` false).
From then on all is as in ``disk`` mode, with redo. On the way back a FLUSH needs both, the file
and the facets, until the superblock says that it spills again: whichever of the two a crash finds
there, what was flushed is safe by it.

On a secondary the log is always on disk: it must be durable there before a facet changes (O9).
"""

from __future__ import annotations

import asyncio
from typing import Any

from nbdmirror.config import Config
from nbdmirror.engine.facets import Facets
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import Log
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed

NO_SPILL: dict[str, Any] = {"mode": "disk", "spill": None}
"""What the status of a log on disk says: that of a secondary always is."""

POLL_SECONDS = 0.01


async def may_spill(
    config: Config, housekeeper: Housekeeper, volumes: list[Volume], state: dict[str, Any]
) -> bool:
    """At the start of a primary: whether its log is in memory from now on. DiskFailed if the facets
    cannot be synced, which no redo will bring what they lack."""
    if not config.log.spill_threshold or state.get("log_volatile"):
        return False
    await housekeeper.sync_facets()
    return all(volume.in_service() for volume in volumes)


class Spill:
    """Keeps a primary's log in memory while every volume has a facet, and on disk else."""

    def __init__(self, log: Log, threshold: int, facets: Facets, housekeeper: Housekeeper) -> None:
        self._log = log
        self._threshold = threshold
        self._facets = facets
        self._store = facets.store
        self._housekeeper = housekeeper
        self._both = False
        """A flush needs the file and the facets: the superblock may say either."""
        self._ended = True
        """No change over: the log is volatile, is about to be replaced, or the node to stop."""
        self._task: asyncio.Task[None] | None = None

    # -- in which mode ---------------------------------------------------------------------------

    def _suits(self) -> bool:
        """Whether the facets hold all that clients were promised: the log may be in memory."""
        return all(volume.in_service() for volume in self._facets.group.volumes)

    def _leans(self) -> bool:
        """Whether a volume goes on without a facet. One that cannot changes nothing: the node
        ends."""
        group = self._facets.group
        return any(not one.in_service() and group.goes_on(one) for one in group.volumes)

    def begin(self) -> None:
        """Nothing is in the log that is not in the facets, durably, or found by recovery, and the
        superblock says in ``log_spill`` where it goes on."""
        self._both = self._ended = False
        # What is released in time is never written.
        group = self._facets.group
        group.pressure_at = min(group.pressure_at, self._threshold // 4)
        if self._store.state["log_spill"]:
            self._log.spill(self._threshold, self._durable)
            self._log.redone = False
        self.look()

    @property
    def _in_memory(self) -> bool:
        return self._log.spilled is not None and not self._both

    async def facet_lost(self) -> None:
        """Before it is noted that a facet has failed: if it was a volume's last one, everything
        is in the file, and in the other facets, durably; DiskFailed if that cannot be."""
        if self._log.spilled is None or not self._leans():
            return
        if not self._both:
            # From this very step on: what is acknowledged next must not be in memory alone.
            self._both = self._log.redone = True
            self._log.write_through()
        await self._log.keep()
        await self._land()

    def note(self) -> None:
        """The step in which it is noted: one save says both."""
        if self._both and self._leans():
            self._store.state.update(log_spill=False, durable_seq=self._log.kept_seq)

    @property
    def said(self) -> bool:
        """Whether the superblock, once it is saved, says that the log is in memory."""
        return bool(self._store.state["log_spill"])

    def look(self, *, on_disk: bool = False) -> None:
        """Facets have come or gone, durably: the log goes where it belongs now. ``on_disk``: that
        it is on disk was said in the save that this follows."""
        if self._both and on_disk and not self.said:
            self._both = False
            self._log.unspill()
            why = "a volume has no local facet in service"
            self._facets.events.emit("log-on-disk", why=why)
        idle = self._task is None or self._task.done()
        if self._suits() and not self._in_memory and idle and not self._ended:
            self._task = asyncio.ensure_future(self._change())

    async def _change(self) -> None:
        try:
            while self._suits() and not self._in_memory:
                await self._to_memory()
        except DiskFailed as error:
            if self._log.failed is None:  # else who keeps the log goes on (M13), or ends the node
                self._facets.group.fail(error)

    async def _to_memory(self) -> None:
        if self._log.spilled is None:
            self._log.spill(self._threshold, self._durable)
            self._both = True
            self._log.write_through()
        await self._land()
        if not (self._suits() and self._both):
            return  # a volume's last facet left meanwhile, and perhaps another one is back
        self._store.state["log_spill"] = True
        await self._store.save()
        if self._suits() and self._store.state["log_spill"]:
            assert self._log.spilled is not None
            self._both = self._log.spilled.through = False
            self._log.redone = False
            self._facets.events.emit("log-spills", threshold=self._threshold)

    async def _land(self) -> None:
        """Returns when all that was logged by now is in the facets, durably. A clearing that is
        still under way would go with the process: in memory the log is not redone, and on disk it
        may lack the record since before, and lets the extent go all the same (O5)."""
        upto, volumes = self._log.next_seq - 1, self._facets.group.volumes
        while any(seq <= upto for v in volumes for f in v.writable() for seq in f.pending):
            await asyncio.sleep(POLL_SECONDS)
        await self._housekeeper.sync_facets(everything=True)

    async def end(self) -> None:
        """The log is about to be replaced, or the node to stop: no change over any more."""
        self._ended = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def stay(self) -> None:
        """The log was not replaced: it goes where it belongs again, as facets come and go."""
        self._ended = False
        self.look()

    # -- durability ------------------------------------------------------------------------------

    async def _durable(self) -> int:
        """The log's stand-in: the seq up to which a flush may be promised."""
        while self._log.spilled is not None:
            await self.facet_lost()  # one may have failed that is only about to be noted
            both = self._both
            if both:
                await self._log.keep()
            upto = await self._housekeeper.sync_log()
            if both:
                return min(upto, self._log.kept_seq)
            if not (self._both or self._leans()):
                return upto
        return self._log.durable_seq  # on disk since: the next sync is the file's

    # -- for people ------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The ``spill`` object of the log's status."""
        spilled, used = self._log.spilled, self._log.ring.used
        memory = spilled.memory_bytes if spilled is not None else 0
        return {
            "threshold": self._threshold,
            "memory_bytes": memory,
            "file_bytes": used - memory,
            "spilled_bytes": spilled.bytes_spilled if spilled is not None else 0,
            "on_disk": not self._in_memory,
        }
