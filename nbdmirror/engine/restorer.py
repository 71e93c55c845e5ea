"""Carries out restores, and takes in what changed behind the volumes' backs (V10-V14).

``restore`` is one durable step, the save of the superblock, between a bypass of the log and a copy
that runs behind; ``open`` goes on with that copy after a restart. ``changed`` is for operations
that write to a facet themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    contextmanager,
    nullcontext,
)
from typing import TYPE_CHECKING, Any

from nbdmirror.codec import mark as marks
from nbdmirror.codec.mark import Mark
from nbdmirror.core.dcm import Dcm
from nbdmirror.engine.bypass import bypass, changing_beside, check_remotes, relieve_log
from nbdmirror.engine.chain import Member
from nbdmirror.engine.edit import Edit
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.restore import VolumeRestore, restore_map
from nbdmirror.engine.snapshots import Entry
from nbdmirror.engine.volume import Volume, closed, read_failed
from nbdmirror.errors import NbdmirrorError, Refused, StateError, UsageError, VolumeFailed

if TYPE_CHECKING:
    from nbdmirror.engine.facet import LocalFacet
    from nbdmirror.engine.facets import Facets
    from nbdmirror.engine.node import Node
    from nbdmirror.engine.primary import Primary


class Restorer:
    """The restores of one node; one at a time."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._snapshots = node.snapshots
        self._store = node.store
        self._running: list[VolumeRestore] = []
        self._maps: list[DcmFile] = []
        """Of what is left to copy; all that may be open."""
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    # -- after a restart -----------------------------------------------------------------------

    @staticmethod
    def prepare(node: Node) -> None:
        """Before snapshots are opened: what a restore reads stays."""
        state = node.store.state.get("restore")
        if state is not None:
            uuids = [uuid for some in state["sources"].values() for uuid in some]
            node.snapshots.kept_for_restore = tuple(dict.fromkeys(uuids))

    async def open(self) -> None:
        """Goes on with a restore, from before the first request. StateError if its layers or maps
        are gone: then the volume cannot be had as it was promised."""
        state = self._store.state.get("restore")
        if state is None:
            return
        # What the log lost with its memory, or with the power, no redo comes by any more.
        state["seq"] = min(state["seq"], self._node.log.next_seq - 1)
        for key, uuids in state["sources"].items():
            index = int(key)
            left = self._map(index)
            await left.forget()
            left.open(False)
            if left.damage is not None:
                raise StateError(f"a restore was under way and its map is lost: {left.damage}")
            await left.sync()  # before a write goes on where a region is copied
            members = [await self._member(index, uuid) for uuid in uuids]
            self._running.append(self._volume_restore(index, members, left))
        for one in self._running:
            one.install()

    def start(self) -> None:
        """Begins to copy what ``open`` found; what one that never began has taken goes."""
        if self._running:
            self._go()
        for entry in self._snapshots.entries:
            if entry.get("provisional"):
                self._take_back(entry)

    async def _member(self, index: int, uuid: str) -> Member:
        for member in self._snapshots.chains[index].members:
            if member.uuid == uuid:
                return member
        return await self._snapshots.open_member(uuid, index)

    def _map(self, index: int) -> DcmFile:
        volume = self._snapshots.volumes[index]
        path = f"{self._node.config.state_dir}/restore/{volume.name}"
        left = DcmFile(self._node.env.disk, path, volume.regions, volume.region_size)
        self._maps.append(left)
        return left

    def _volume_restore(self, index: int, members: list[Member], left: DcmFile) -> VolumeRestore:
        chain = self._snapshots.chains[index]
        return VolumeRestore(chain, members, left, self)

    # -- what the copy asks for (``restore.Surroundings``) -------------------------------------

    async def facets_failed(self, volume: Volume, facets: list[LocalFacet]) -> None:
        """See ``Surroundings``."""
        if self._node.primary is not None:
            await self._node.primary.group.facets_failed(volume, facets)
        elif facets[0].failed is not None:
            raise facets[0].failed

    def changing(
        self, volume: Volume, ranges: list[tuple[int, int]]
    ) -> AbstractAsyncContextManager[None]:
        """See ``Surroundings``."""
        if self._node.primary is None:
            return nullcontext()
        # Not the maps of remotes: what clients read, and remotes get, does not change by it.
        return changing_beside(self._facets(), volume.index, ranges)

    def stalled(self, volume: Volume, why: str) -> None:
        """See ``Surroundings``."""
        self._node.events.emit("restore-stalled", volume=volume.name, why=why)

    def _facets(self) -> Facets:
        assert self._node.facets is not None
        return self._node.facets

    async def settled(self) -> None:
        """See ``Surroundings``."""
        if self._node.primary is not None:  # the log of a secondary was emptied
            await self._settle(self._store.state["restore"]["seq"])

    async def _settle(self, seq: int) -> None:
        await self._node.housekeeper.settle(seq, lambda: relieve_log(self._facets()))

    def _fail(self, error: NbdmirrorError) -> None:
        if self._node.primary is not None:
            self._node.primary.group.fail(error)
        elif self._node.secondary is not None:
            self._node.secondary.fail(error)

    def _need_primary(self) -> Primary:
        if self._node.primary is None:
            raise Refused(
                f"{self._node.config.node} is a secondary", hint="run this on the primary"
            )
        return self._node.primary

    # -- restoring -----------------------------------------------------------------------------

    async def restore(
        self, entry: Entry, volume: Volume | None, *, while_attached: bool, keep: bool, force: bool
    ) -> dict[str, Any]:
        """Restores the volumes of a snapshot, or one of them: complete on return, durably. Clients
        that are attached need ``while_attached``; ``keep``: the state before becomes a snapshot."""
        indices = entry["volumes"] if volume is None else [volume.index]
        if volume is not None and volume.index not in entry["volumes"]:
            raise Refused(f"the snapshot is not one of volume {volume.name}")
        with self._closed(indices, while_attached):
            return await self._restore(entry, indices, keep=keep, force=force)

    async def _restore(
        self, entry: Entry, indices: list[int], *, keep: bool, force: bool
    ) -> dict[str, Any]:
        for index in indices:
            self._snapshots.volumes[index].source()  # raises: there is no facet to restore
        if self._node.people.clients(entry) and entry["writable"]:
            raise Refused("clients may be writing into the snapshot", hint="detach them first")
        self._check_idle()
        undo = None
        if self._node.primary is not None:
            check_remotes(self._node.primary, force=force)  # no snapshot is left by what is refused
        if keep and self._node.primary is not None:
            undo = await self._node.people.take(
                indices, "restore", protected=False, provisional=True
            )
        with self._undoing(undo):
            async with self._snapshots.lock:
                self._check_idle()
                self._snapshots.busy = f"snapshot {entry['number']} is being restored"
                try:
                    if self._node.secondary is not None:
                        undo = await self._begin_alone(entry, indices, keep=keep, force=force)
                    else:
                        await self._begin(entry, indices, undo, force=force)
                except OSError as error:
                    self._release()
                    raise NbdmirrorError(
                        f"the restore cannot begin: {error.strerror or error}",
                        hint="the volumes are as they were; mend the disk of state_dir",
                    ) from error
                except BaseException:
                    self._release()
                    raise
        return self.status() or {"undo": undo["uuid"] if undo else None}

    @contextmanager
    def _undoing(self, undo: Entry | None) -> Iterator[None]:
        """Where the restore within does not begin, nobody asked for the snapshot of the state
        before, and it goes; where it may have begun, durably, that stays."""
        try:
            yield
        except (Exception, asyncio.CancelledError):  # not where the loop itself is gone
            begun = self._store.state.get("restore") or {}
            if undo is not None and begun.get("undo") != undo["uuid"]:
                self._take_back(undo)
            raise

    def _take_back(self, undo: Entry) -> None:
        undo["deleting"] = True
        if not self._stopped:  # else the next start does it
            self._snapshots.spawn(self._forget, undo)

    async def _forget(self, undo: Entry) -> None:
        """Secondaries have it too, and are told first: a start finds it until they are."""
        if self._node.primary is not None:
            mark = Mark(marks.DELETE, undo["uuid"], tuple(undo["volumes"]))
            await self._node.primary.group.put_mark(mark)
        await self._snapshots.delete(undo)

    def _closed(self, indices: list[int], while_attached: bool) -> AbstractContextManager[None]:
        """Nobody has these volumes attached, and nobody attaches them within."""
        volumes = [] if while_attached else [self._snapshots.volumes[index] for index in indices]
        names = [volume.name for volume in volumes if volume.clients]
        if names:
            raise Refused(
                f"clients are attached to {', '.join(names)}: what they have read or mounted would "
                "change under them",
                hint="unmount and detach them, or give --while-attached",
            )
        return closed(volumes, "volume {} is about to be restored: attach it in a moment")

    def _check_idle(self) -> None:
        if self._snapshots.busy is not None:
            raise Refused(self._snapshots.busy, hint="see its progress in status")

    async def _begin(
        self, entry: Entry, indices: list[int], undo: Entry | None, *, force: bool
    ) -> None:
        """On a primary: beside the log, with the mark and the maps of V11."""
        why = f"snapshot {entry['number']} was restored"
        async with bypass(self._need_primary(), self._facets(), indices, why, force=force) as way:
            running = await self._prepare_maps(entry, indices)
            maps = {one.volume.index: one.left.map for one in running}
            seq = await way.commit(Mark(marks.RESTORE, entry["uuid"], tuple(indices)), maps)
            state = self._state(entry, undo, seq, running)
            self._store.state["restore"] = state
            await self._store.save()
            # Complete: from this step on the volumes read as the snapshot.
            self._started(entry, running)

    async def _begin_alone(
        self, entry: Entry, indices: list[int], *, keep: bool, force: bool
    ) -> Entry | None:
        """On a secondary whose link is inactive (V14): its primary will compare everything.
        Returns the snapshot of the state before, which no other node has; in the middle of a
        resync that is no state to go back to, and the image from before the resync is there."""
        secondary = self._node.secondary
        assert secondary is not None
        keep = keep and bool((self._store.state["upstream"] or {}).get("consistent"))
        await secondary.detach(force=force)
        seq, undo = self._node.log.next_seq - 1, None
        if keep:
            now = self._node.env.clock.time_ns()
            undo = await self._snapshots.take_here(
                "restore", indices, seq, now, protected=False, provisional=True
            )
        with self._undoing(undo):
            running = await self._prepare_maps(entry, indices)
            # Only now: one that cannot begin has cost nothing (X2).
            await secondary.diverge({"restore": self._state(entry, undo, seq, running)})
        self._started(entry, running)
        return undo

    async def _prepare_maps(self, entry: Entry, indices: list[int]) -> list[VolumeRestore]:
        """What is to be restored, durably; the volumes must not change meanwhile."""
        if not self._snapshots.shown(entry):
            raise VolumeFailed("the snapshot is gone: its space was needed")
        uuid = entry["uuid"]
        # Whatever is given up for space from here on, the restore can read it.
        chains = [self._snapshots.chains[index] for index in indices]
        members = [chain.members[chain.index(uuid) :] for chain in chains]
        needed = [member.uuid for some in members for member in some]
        self._snapshots.kept_for_restore = tuple(dict.fromkeys(needed))
        for snapshot, *_ in members:
            if snapshot.own is not None:
                # Nobody writes into it any more; and what the volume is from here on, a power cut
                # must not take back.
                await self._snapshots.sync_own(uuid, snapshot.own)
        maps = [restore_map(chain, uuid) for chain in chains]
        running = []
        for index, some, regions in zip(indices, members, maps, strict=True):
            left = self._map(index)
            left.open(True)
            left.clear()
            left.merge(regions)
            await left.sync()
            running.append(self._volume_restore(index, some, left))
        return running

    def _state(
        self, entry: Entry, undo: Entry | None, seq: int, running: list[VolumeRestore]
    ) -> dict[str, Any]:
        """The ``restore`` part of the superblock; the snapshot of the state before stays from the
        save on in which that goes."""
        if undo is not None:
            del undo["provisional"]
        return {
            "snapshot": entry["uuid"],
            "undo": undo["uuid"] if undo else None,
            "seq": seq,
            "sources": {str(one.volume.index): one.sources for one in running},
            "total_bytes": sum(one.left_bytes for one in running),
            "began_ns": self._node.env.clock.time_ns(),
        }

    def _started(self, entry: Entry, running: list[VolumeRestore]) -> None:
        self._running = running
        self._go()
        state = self._store.state["restore"]
        self._node.events.emit(
            "restored",
            uuid=entry["uuid"],
            number=entry["number"],
            seq=state["seq"],
            volumes=[one.volume.name for one in running],
            total_bytes=state["total_bytes"],
        )

    def _go(self) -> None:
        self._snapshots.busy = "a restore is being copied"
        for one in self._running:
            one.install()
        if not self._stopped:  # what began before that is copied by the next start
            self._task = asyncio.ensure_future(self._copy())

    async def _copy(self) -> None:
        """The copy behind; what ends it before its end ends the node, as for any facet or map."""
        works = [asyncio.ensure_future(one.run()) for one in self._running]
        try:
            await asyncio.gather(*works)
            await self._finish()
        except NbdmirrorError as error:
            self._fail(error)
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    async def _finish(self) -> None:
        state, self._store.state["restore"] = self._store.state["restore"], None
        await self._store.save()
        running, self._running = self._running, []
        for one in running:
            one.remove()
            one.close()
            one.left.close(unlink=True)
        self._release()
        self._node.events.emit("restore-copied", uuid=state["snapshot"])
        if self._node.primary is not None:
            for remote in self._node.primary.remotes:
                remote.verify_wanted.set()  # it waited for this

    def _release(self) -> None:
        """A restore is through, or did not begin: then the next one is to open its maps."""
        self.close()
        self._snapshots.release_restore()
        if self._node.secondary is not None:
            self._node.secondary.detached = False

    async def stop(self) -> None:
        """Ends the copy; the next start goes on with it."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def close(self) -> None:
        """Closes the maps."""
        for left in self._maps:
            left.close()
        self._maps.clear()

    def status(self) -> dict[str, Any] | None:
        """The ``restore`` object of the status: progress of the copy behind; None if none runs."""
        state = self._store.state.get("restore")
        if state is None or not self._running:
            return None
        volumes = [one.status() for one in self._running]
        left = sum(volume["left_bytes"] for volume in volumes)
        return {
            "snapshot": state["snapshot"],
            "undo": state["undo"],
            "total_bytes": state["total_bytes"],
            "done_bytes": state["total_bytes"] - left,
            "volumes": volumes,
        }

    # -- what changed behind our back (V13) ----------------------------------------------------

    async def changed(
        self, volume: Volume, ranges: list[tuple[int, int]], facet: str | None, *, force: bool
    ) -> dict[str, Any]:
        """Takes in that a facet's content was changed in (offset, length) ranges, by whoever it
        was: other facets and remotes follow. Which one, ``facet`` says, by its path; else it is
        the first. Snapshots that do not have the regions' old content are lost by it, with
        ``force``."""
        primary = self._need_primary()
        edit = Edit(volume, facet)
        regions = Dcm(volume.regions)
        for offset, length in ranges:
            if not 0 < length <= volume.size - offset or offset < 0:
                raise UsageError(f"{length} bytes at {offset} are not within volume {volume.name}")
            last = (offset + length - 1) // volume.region_size
            regions.mark(offset // volume.region_size, last)
        # No snapshot is taken until no redo can bring back what the log had before.
        async with self._snapshots.lock:
            self._check_idle()
            await self._drop_spoilt(volume, ranges, force=force)
            why = f"ranges of {volume.name} were changed beside the log"
            async with bypass(primary, self._facets(), [volume.index], why, force=force) as way:
                edit.check()
                mark = Mark(marks.CHANGED, None, (volume.index,))
                seq = await way.commit(mark, {volume.index: regions})
                size = volume.region_size
                runs = [(first * size, count * size) for first, count in regions.runs()]
                async with changing_beside(self._facets(), volume.index, runs):
                    await self._even(volume, regions, edit)
                # All before the mark is in the facets, durably, and redone it would take the change
                # back, here only: remotes get it once they are let go.
                self._store.state["volumes"][volume.index]["redo_seq"] = seq
                await self._store.save()
            await self._settle(seq)
        done = {"facet": edit.facet.path, "regions": regions.count, "seq": seq}
        self._node.events.emit("changed", volume=volume.name, **done)
        return {**done, "bytes": regions.count * volume.region_size}

    async def _even(self, volume: Volume, regions: Dcm, edit: Edit) -> None:
        """Every facet that takes writes holds, durably, what the edited one does: one that is being
        synchronised too, and what was written by somebody else may be in the page cache only.
        VolumeFailed if it cannot be read, Refused if it leaves service."""
        source = edit.facet
        size = volume.region_size
        for first, count in regions.runs():
            for region in range(first, first + count):
                edit.check()
                offset = region * size
                length = min(size, volume.size - offset)
                try:
                    data = await source.read(offset, length)
                except OSError as error:
                    raise read_failed(source, offset, length, error) from error
                for facet in volume.writable():
                    facet.changed_beside()
                    if facet is source or not facet.writable:
                        continue  # it may have left while another one was read
                    try:
                        if await facet.read(offset, length) != data:
                            facet.pwrite(offset, data)
                    except OSError as error:
                        facet.fail("write", error)
                        await self.facets_failed(volume, [facet])
                await asyncio.sleep(0)  # all of it may have been read in memory
        await self._node.housekeeper.sync_facets(everything=True)

    async def _drop_spoilt(
        self, volume: Volume, ranges: list[tuple[int, int]], *, force: bool
    ) -> None:
        chain = self._snapshots.chains[volume.index]
        if not chain.members or not any(chain.holds(*one) for one in ranges):
            return
        uuids = [member.uuid for member in chain.members]
        if not force:
            raise Refused(
                f"{len(uuids)} snapshots of {volume.name} need what these ranges held before",
                hint="delete them, or give --force, which ends them",
            )
        await self._snapshots.lose(uuids, "the volume was changed beside the log")
