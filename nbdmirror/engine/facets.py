"""The local facets of a primary: out of service, and back with only the difference (M8, M12, M17).

A facet that fails, or that a person takes offline, is not-synchronised, durably, before a write
that saw it is acknowledged. What it lacks from then on is kept in the log; when the log has no
room for that, it is marked in a map of the facet's own. To return, everything it lacks is put into
that map; from one step on the facet takes every write again, and beside them the marked regions
are copied to it (``engine.facetcopy``). It is trusted when none is left, durably.

What is durable of a facet: see ``engine.facetmember``; what people may ask of it:
``engine.facetcommands``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from nbdmirror.codec.record import MARK
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.facet import FacetState, LocalFacet, open_facet, to_the_end
from nbdmirror.engine.facetcopy import FacetCopy
from nbdmirror.engine.facetmember import NEW, Member
from nbdmirror.engine.facetredo import redo
from nbdmirror.engine.group import Group
from nbdmirror.engine.log import Cursor
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.sources import Sources
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed, FormatError, NbdmirrorError, StateError, UsageError
from nbdmirror.ports import Disk

if TYPE_CHECKING:
    from nbdmirror.engine.spill import Spill

RETRY_SECONDS = 10.0
"""A facet that failed is tried again after so long, then after twice that, ..."""
RETRY_SECONDS_MAX = 3600.0
RELEASE_SECONDS = 10.0
"""A file that was closed is still claimed while a slow read of it ends; waited for so long."""


class Facets:
    """All local facets of a primary."""

    def __init__(
        self, group: Group, store: Store, events: EventLog, disk: Disk, directory: str
    ) -> None:
        self.group = group
        self.store = store
        self.events = events
        self._disk = disk
        self._directory = directory
        self.spill: Spill | None = None
        """Of a log that is partly in memory: it minds whether each volume has a facet."""
        self.beside: dict[int, list[tuple[int, int]]] = {}
        """What is being changed beside the log, by volume (see ``engine.bypass``)."""
        self._last_id = 0
        self._stopped = False
        self.members: list[Member] = []
        for volume, saved in zip(group.volumes, store.state["volumes"], strict=True):
            for facet, entry in zip(volume.facets, saved["facets"], strict=True):
                self.members.append(Member(self, volume, facet, entry))
        for member in self.members:
            if member.saved["tracking"]:
                member.open_map()

    def map_of(self, member: Member) -> DcmFile:
        """The map's file; no remote can be named as it is."""
        if member.saved.get("id") is None:
            used = [other.saved.get("id") or 0 for other in self.members]
            # Also not that of one which is only being added.
            self._last_id = member.saved["id"] = max([self._last_id, *used]) + 1
        volume = member.volume
        path = f"{self._directory}/dcm/@{member.saved['id']}.{volume.name}"
        return DcmFile(self._disk, path, volume.regions, volume.region_size)

    async def recover(
        self,
        clean: bool,
        doubtful: list[tuple[Volume, int, int]],
        lost: str | None,
        *,
        spilled: bool,
    ) -> None:
        """At start: what may differ after a power loss, or all if records were ``lost``, goes into
        the map of each facet that is not in service; the others were made equal. ``spilled``: what
        one lacks that the log has no more lies in ``doubtful`` extents (``engine.spill``)."""
        gone = not clean and bool(self.store.state.get("log_volatile"))
        for member in self.members:
            facet = member.facet
            if facet.in_service:
                member.saved["identity"] = facet.file.identity()
                continue
            if facet.is_open and not member.is_same():
                member.fill()
                member.saved.update(compare=True, identity=facet.file.identity())
            if lost is not None and (member.dcm is not None or facet.kept_seq is not None):
                member.fill()
            if gone and facet.kept_seq is not None:
                member.fill()  # what it lacks was in memory only
                member.saved["compare"] = True
            since = member.saved["since"]
            if not spilled and since is not None and since + 1 < self.group.log.ring.tail_seq:
                # Killed before what has left the log was in the map: nobody knows it any more.
                member.fill()
                member.saved["compare"] = True
            if facet.kept_seq is not None and doubtful:
                if spilled and member.owed:
                    facet.kept_seq = self.group.log.ring.tail_seq - 1
                await member.to_map()
            if member.dcm is None:
                continue
            if not clean:
                await member.dcm.rewrite()
            if not clean or member.saved["since"] is not None:
                await self._mark_log(member)
                member.saved["since"] = None  # saved with the rest, at the end of the start
            for volume, offset, length in doubtful:
                member.mark(volume.index, offset, length)
            await member.sync_map()

    async def _mark_log(self, member: Member) -> None:
        """Whether putting the log into the map was finished or not: it is done again."""
        log = self.group.log
        cursor = Cursor(log.ring.tail_seq)
        while cursor.seq < log.next_seq:
            for record in (await log.read(cursor)).parsed():
                if record.kind != MARK:
                    member.mark(record.volume, record.offset, record.length)

    def start(self) -> None:
        """Begins to bring back what is not in service, but for what a person took out."""
        for member in self.members:
            if not member.facet.in_service and not member.saved["offline"]:
                self.serve(member, pause=0.0)

    async def stop(self) -> None:
        """Ends what is being copied, and begins nothing more; it goes on after the next start."""
        self._stopped = True
        tasks = [member.task for member in self.members if member.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Closes the maps."""
        for member in self.members:
            if member.dcm is not None:
                member.dcm.close()

    async def sync_maps(self) -> None:
        """Makes every mark so far durable."""
        for member in list(self.members):
            await member.sync_map()

    def holding(self) -> list[Member]:
        """The facets for which the log is kept, and that could do with a map: what is marked there
        must be had from somewhere, or the log is all that there is."""
        return [
            one
            for one in self.members
            if not one.tracking and (one.volume.in_service() or self.group.in_reach(one.volume))
        ]

    def kept_for(self) -> list[Member]:
        """The facets for which the log is kept, and that have somebody to copy from."""
        return [one for one in self.members if not one.tracking and self.has_source(one.volume)]

    def has_source(self, volume: Volume) -> bool:
        """Whether there is anybody to copy from what a facet of the volume lacks; if not, it comes
        back from the log or not at all."""
        return bool(volume.in_service()) or self.group.goes_on(volume)

    def member(self, path: str) -> Member:
        """The facet of that path; UsageError lists the paths if there is none."""
        for member in self.members:
            if member.facet.path == path:
                return member
        paths = ", ".join(member.facet.path for member in self.members)
        raise UsageError(f"there is no facet {path} (facets: {paths})")

    def _of(self, facet: LocalFacet) -> Member | None:
        return next((member for member in self.members if member.facet is facet), None)

    # -- out of service ------------------------------------------------------------------------

    async def lost(self, volume: Volume, facet: LocalFacet) -> None:
        """A facet failed: durably not-synchronised when this returns (M12); to its end, whoever
        saw it is gone: nobody else begins to bring it back."""
        await to_the_end(asyncio.ensure_future(self._lost(volume, facet)))

    async def _lost(self, volume: Volume, facet: LocalFacet) -> None:
        member = self._of(facet)
        if member is None:
            return  # a person has removed it meanwhile: nothing rests on it
        why = facet.failed.message if facet.failed else None
        if facet.failed is not None and self.spill is not None:
            await self.spill.facet_lost()
        if facet.failed is None or facet.state is FacetState.NOT_SYNCHRONISED:
            await self.store.save()  # another request saw it first; it may be about to save it
            facet.unnoted = False
            return
        self.take_out(member, why)
        # Nobody goes on: no reply follows, so what its last sync left is all that was promised.
        volume.ended = not self.has_source(volume)
        for one in (other for other in self.members if other.volume is volume):
            one.saved["last"] = one is member and not volume.in_service()
        self.events.emit("facet-failed", volume=volume.name, facet=facet.path, why=why)
        on_disk = self.spill is not None and not self.spill.said
        await self.store.save()
        facet.unnoted = False
        if self.spill is not None:
            self.spill.look(on_disk=on_disk)
        if self.has_source(volume):
            facet.close()
            await self.settle_owed()
            self.serve(member, pause=RETRY_SECONDS)

    def take_out(self, member: Member, why: str | None) -> None:
        """From this step on it takes no write; the caller saves."""
        facet = member.facet
        facet.leave()
        facet.state = FacetState.NOT_SYNCHRONISED
        member.saved.update(
            state=FacetState.NOT_SYNCHRONISED.value, since=facet.kept_seq, tracking=False, why=why
        )
        # A map with marks left in it is added to when the facet returns.
        member.saved["tracking"] = member.dcm is not None
        if self.spill is not None:
            self.spill.note()

    async def settle_owed(self) -> None:
        """Who lacks what the log has no more gets it into its map while the active map knows of
        it, but for a volume's last one."""
        for member in list(self.members):
            if member.owed and self.has_source(member.volume):
                await member.to_map()

    async def end(self, member: Member) -> None:
        """Ends an attempt to return, if there is one."""
        while (task := member.task) is not None:
            member.task = None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # -- the way back --------------------------------------------------------------------------

    async def attach(self, member: Member) -> None:
        """As ``open``, and from then on it is what its disk has: that may hang."""
        await self.open(member)
        await member.facet.forget()

    async def open(self, member: Member) -> None:
        """Opens the facet's file; StateError says why it cannot be."""
        facet = member.facet
        facet.close()
        end = asyncio.get_running_loop().time() + RELEASE_SECONDS
        while True:
            try:
                facet.attach(open_facet(self._disk, facet.path, facet.size))
                if not member.is_same():
                    found = facet.file.identity()
                    await member.distrust()
                    member.saved["identity"] = found
                return
            except BlockingIOError as error:
                if asyncio.get_running_loop().time() > end:
                    raise StateError(f"the facet {facet.path} is in use: {error}") from error
                await asyncio.sleep(0.05)
            except OSError as error:
                raise StateError(
                    f"the facet {facet.path} cannot be opened: {error.strerror or error}"
                ) from error

    def serve(self, member: Member, pause: float) -> None:
        """Begins to bring it back, after a pause in seconds, unless that goes on already, or a
        person has it out of service, or in hand."""
        if self._stopped or member.saved["offline"] or member.in_hand:
            return
        if member not in self.members:
            return
        if not member.facet.in_service and (member.task is None or member.task.done()):
            member.task = asyncio.ensure_future(self._guard(member, pause))

    async def _guard(self, member: Member, pause: float) -> None:
        try:
            await self._bring_back(member, pause)
        except DiskFailed as error:
            self.group.fail(error)  # of the state directory: a facet's own is handled below
        except Exception as error:
            # A defect costs this facet its return, not the clients theirs; it is told.
            self.events.emit("defect", why=repr(error))
            raise

    async def _bring_back(self, member: Member, pause: float) -> None:
        """Tries until the facet is in service, with longer and longer pauses."""
        facet = member.facet
        while True:
            if pause:
                await asyncio.sleep(pause)
            if facet.in_service:
                return  # somebody has brought it back meanwhile
            try:
                if not facet.is_open:
                    await self.attach(member)
                elif not facet.writable:
                    await facet.forget()
                await self._return(member)
                return
            except (NbdmirrorError, OSError) as error:
                member.copy = None
                if self.group.failed is not None:
                    return  # the node ends
                if isinstance(error, DiskFailed) and facet.failed is None:
                    raise
                why = error.message if isinstance(error, NbdmirrorError) else str(error)
            pause = min(max(2 * pause, RETRY_SECONDS), RETRY_SECONDS_MAX)
            if facet.writable or facet.state is not FacetState.NOT_SYNCHRONISED:
                self.take_out(member, why)
            member.saved["why"] = why
            await self.store.save()
            facet.unnoted = False
            facet.close()
            self.events.emit("facet-retry", facet=facet.path, why=why, seconds=pause)

    async def _return(self, member: Member) -> None:
        facet, volume, saved = member.facet, member.volume, member.saved
        try:
            if await self._redo(member):
                return
        except FormatError:  # of the log, which others can do without
            if facet.writable or not self.has_source(volume):
                raise
        if not facet.writable:
            await member.to_map()
            for offset, length in self.beside.get(volume.index, ()):
                member.mark(volume.index, offset, length)
            await member.sync_map()
            self._join(member)
        assert member.dcm is not None
        await self.store.save()
        self.events.emit("facet-returns", volume=volume.name, facet=facet.path)
        sources = Sources(self.group, [volume], but=facet)
        compare = bool(saved["compare"])
        member.copy = FacetCopy(volume, facet, member.dcm, sources, compare=compare)
        await member.copy.run()
        saved.update(NEW, state=FacetState.SYNCHRONISED.value, default=member.dcm.map.default)
        await self.store.save()
        if facet.failed is not None:
            raise facet.failed
        facet.state = FacetState.SYNCHRONISED
        if self.spill is not None:
            self.spill.look()
        copied, member.copy = member.copy.progress.sent_bytes, None
        member.drop_map()
        self.events.emit(
            "facet-synchronised", volume=volume.name, facet=facet.path, copied_bytes=copied
        )

    def _is_in_log(self, member: Member) -> bool:
        """Whether the log holds all that a volume's last facet lacks: it needs nobody else then."""
        kept, volume = member.facet.kept_seq, member.volume
        if member.saved["offline"] or member.in_hand:
            return False
        if member.saved["tracking"] or volume.overlay is not None:
            return False
        if kept is None or volume.in_service():
            return False
        return kept >= max(self.group.log.ring.tail_seq - 1, self.store.redo_seq(volume.index))

    async def hurry(self, member: Member) -> None:
        """The log is full: a facet that can come back from it alone does so now, not later."""
        if member.facet.unnoted:  # another file with its old state would be read
            await self.lost(member.volume, member.facet)
        if not self._is_in_log(member):
            return
        await self.end(member)
        if member.task is not None or not self._is_in_log(member):
            return  # somebody brings it back by now, or does something else with it
        attempt = member.task = asyncio.ensure_future(self._hurry(member))
        await asyncio.wait([attempt])
        if attempt.cancelled():
            return  # by somebody who does something else with it
        attempt.result()
        if not member.facet.writable:
            self.serve(member, pause=RETRY_SECONDS)

    async def _hurry(self, member: Member) -> None:
        try:
            await self.attach(member)
            await self._redo(member)
        except (NbdmirrorError, OSError) as error:
            if isinstance(error, DiskFailed) and member.facet.failed is None:
                raise
            member.facet.close()

    async def _redo(self, member: Member) -> bool:
        """Whether the log alone has brought it back."""
        facet, where = member.facet, {"facet": member.facet.path, "volume": member.volume.name}
        async with member.mapping:  # what it lacks does not go from the log into its map meanwhile
            if not facet.writable or member.saved["tracking"]:  # else who began was cancelled
                if not self._is_in_log(member):
                    return False
                self.events.emit("facet-returns", **where)
                await redo(facet, self.group.log, member.volume.index)
            # What it got last may be flushed already, on the word of a remote, and where the log
            # is in memory nobody redoes it (I3, M13). Every flush from now on syncs the facet.
            await facet.sync()
            state = FacetState.SYNCHRONISED
            member.saved.update(state=state.value, since=None, last=False, why=None)
            await self.store.save()
            if facet.failed is not None:
                raise facet.failed
            facet.state = state
            member.drop_map()
        if self.spill is not None:
            self.spill.look()
        self.events.emit("facet-synchronised", **where, copied_bytes=0)
        return True

    def _join(self, member: Member) -> None:
        """From this step on the facet takes every write; its map says what it lacks from before."""
        facet = member.facet
        facet.written_seq = facet.synced_seq = self.group.log.next_seq - 1
        facet.kept_seq = None
        facet.writable = True
        facet.state = FacetState.BEING_SYNCHRONISED
        if member in self.group.trackers:
            self.group.trackers.remove(member)
        member.saved.update(state=FacetState.BEING_SYNCHRONISED.value, since=None, tracking=True)

    def status(self, volume: Volume) -> list[dict[str, Any]]:
        """The facets of a volume, as in the status."""
        now = asyncio.get_running_loop().time()
        return [member.status(now) for member in self.members if member.volume is volume]
