"""What people may ask of a primary's local facets: out, back, one more, another disk (M8, M17).

One command at a time: two people may mean the same facet. Each returns when what it asks for has
begun; how a facet then comes back is ``engine.facets``'.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from nbdmirror.engine.facet import FacetState, LocalFacet, make_facet
from nbdmirror.engine.facetmember import Member
from nbdmirror.engine.facets import RELEASE_SECONDS, Facets
from nbdmirror.errors import DiskFailed, NbdmirrorError, Refused, StateError, UsageError
from nbdmirror.ports import Disk


class FacetCommands:
    """The commands of one node."""

    def __init__(self, facets: Facets, disk: Disk) -> None:
        self._facets = facets
        self._disk = disk
        self._lock = asyncio.Lock()

    async def do(self, action: str, path: str, other: str | None) -> None:
        """One of the commands; ``other`` is the volume to add to, or the path of the new facet."""
        async with self._lock:
            match action:
                case "offline":
                    await self._offline(path)
                case "online":
                    await self._online(path)
                case "add":
                    await self._add(other or "", path)
                case "remove":
                    await self._remove(path)
                case "replace":
                    await self._replace(path, other)
                case _:
                    raise AssertionError(action)

    async def _offline(self, path: str) -> None:
        """Takes a facet out of service until ``online`` (M8); Refused if it is the last."""
        facets, member = self._facets, self._facets.member(path)
        facet, volume = member.facet, member.volume
        self._check_last(member)
        with _in_hand(member):
            if facet.in_service:
                try:
                    await facet.sync()
                except DiskFailed:
                    await facets.lost(volume, facet)
            await facets.end(member)
        try:
            self._check_last(member)  # another one may have failed meanwhile
        except Refused:
            self._serve(member)
            raise
        # Both or neither, whenever somebody saves.
        member.saved["offline"] = True
        if facet.writable:
            facets.take_out(member, "by a person")
            facet.unnoted = True  # what it misses before the other is durable waits, too (M12)
        await facets.store.save()
        facet.unnoted = False
        facet.close()
        await facets.settle_owed()
        facets.events.emit("facet-offline", volume=volume.name, facet=path)

    def _check_last(self, member: Member) -> None:
        """Refused for a volume's last facet. Out of service already it may be what a restart heals,
        if nobody else has the volume."""
        volume = member.volume
        if volume.in_service() == [member.facet] or not self._facets.has_source(volume):
            raise Refused(
                f"{member.facet.path} is the last facet of volume {volume.name}",
                hint="bring another into service first: nbdmirror facet online, or facet add",
            )
        self._check_passed(member)

    def _check_passed(self, member: Member) -> None:
        """Refused for a facet that failed, and alone has what was flushed while the log, which is
        in memory, has not passed that on to those who stand in for it (I3, M13)."""
        volatile = self._facets.store.state.get("log_volatile")
        if volatile and member.saved["last"] and not member.volume.in_service():
            raise Refused(
                f"{member.facet.path} may still be the only one to have what was flushed",
                hint="a remote has it soon after it is in reach: see nbdmirror status, try again",
            )

    async def _online(self, path: str) -> None:
        """Brings a facet back: only what it lacks is copied (M8)."""
        member = self._facets.member(path)
        try:
            if not member.facet.writable and await self._settle(member):
                with _in_hand(member):
                    await self._facets.open(member)
            if member.facet.in_service:
                return
            member.saved.update(offline=False, why=None)
            await self._facets.store.save()
        except NbdmirrorError:
            self._serve(member)  # one that could not be opened is tried again, as before
            raise
        self._serve(member)

    async def _add(self, volume_name: str, path: str) -> None:
        """A further facet for a volume in use (M17); what is there is compared, not trusted."""
        facets = self._facets
        volume = next((v for v in facets.group.volumes if v.name == volume_name), None)
        if volume is None:
            names = ", ".join(v.name for v in facets.group.volumes)
            raise UsageError(f"there is no volume {volume_name!r} (volumes: {names})")
        if any(member.facet.path == path for member in facets.members):
            raise UsageError(f"{path} is a facet already")
        facets.store.check_room()
        await self._make_file(path, volume.size)
        facet = LocalFacet(None, path, volume.size, FacetState.NOT_SYNCHRONISED)
        saved: dict[str, Any] = {"path": path, "state": facet.state.value}
        member = Member(facets, volume, facet, saved)
        saved.update(compare=True)
        try:
            member.fill()
            await member.sync_map()
            await facets.open(member)
        except BaseException:  # also who is cancelled: nothing of it stays
            await member.forget()
            raise
        volume.facets.append(facet)
        facets.members.append(member)
        facets.store.state["volumes"][volume.index]["facets"].append(saved)
        await facets.store.save()
        facets.events.emit("facet-added", volume=volume.name, facet=path)
        self._serve(member)

    async def _remove(self, path: str) -> None:
        """Forgets a facet; its file stays (M17). Refused if it is the last in service."""
        await self._offline(path)
        facets, member = self._facets, self._facets.member(path)
        volume = member.volume
        volume.facets.remove(member.facet)
        facets.members.remove(member)
        entries: list[dict[str, Any]] = facets.store.state["volumes"][volume.index]["facets"]
        entries[:] = [entry for entry in entries if entry["path"] != path]
        await facets.store.save()
        await member.forget()
        facets.events.emit("facet-removed", volume=volume.name, facet=path)

    async def _replace(self, path: str, new: str | None) -> None:
        """Puts a new disk in the place of a facet that is out of service: under its path, or under
        ``new``. All of it is compared with a facet in service."""
        member = self._facets.member(path)
        in_service = Refused(
            f"{path} is in service",
            hint="nbdmirror facet offline takes it out; facet add makes a further one",
        )
        if member.facet.writable:
            raise in_service
        if new is not None and new != path:
            self._check_last(member)  # what is refused leaves no new facet behind
            await self._add(member.volume.name, new)
            try:
                await self._remove(path)
            except Refused:  # for what has changed meanwhile
                with contextlib.suppress(Refused):
                    await self._remove(new)
                raise
            return
        if not await self._settle(member):
            raise in_service
        try:
            self._check_passed(member)
            with _in_hand(member):
                member.facet.close()  # an attempt to return may have opened what is there
                await self._make_file(path, member.volume.size)
                await member.distrust()
                await self._facets.open(member)
            member.saved["offline"] = False
            await self._facets.store.save()
        finally:  # its attempts to return were ended above, whatever has become of the command
            self._serve(member)

    async def _settle(self, member: Member) -> bool:
        """Before a facet out of service gets another file: that it failed may still be about to be
        noted, and a new file with its old state would be read. No attempt to return goes on, unless
        one has just succeeded: then this is false."""
        facet = member.facet
        if facet.unnoted:
            await self._facets.lost(member.volume, facet)
        await self._facets.end(member)
        if facet.writable and not facet.in_service:
            self._serve(member)
        return not facet.writable

    def _serve(self, member: Member) -> None:
        self._facets.serve(member, pause=0.0)

    async def _make_file(self, path: str, size: int) -> None:
        """A file that is not there is made, as large as the volume."""
        end = asyncio.get_running_loop().time() + RELEASE_SECONDS
        while True:
            try:
                await make_facet(self._disk, path, size, grow=False)
                return
            except BlockingIOError as error:
                if asyncio.get_running_loop().time() > end:
                    raise StateError(f"the facet {path} is in use: {error}") from error
                await asyncio.sleep(0.05)
            except OSError as error:
                raise StateError(
                    f"cannot make the facet {path}: {error.strerror or error}",
                    hint="make its directory, or mount its disk",
                ) from error


@contextlib.contextmanager
def _in_hand(member: Member) -> Iterator[None]:
    """Within, it is given a file, and does not come back by itself."""
    member.in_hand = True
    try:
        yield
    finally:
        member.in_hand = False
