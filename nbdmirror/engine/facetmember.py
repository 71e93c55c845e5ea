"""One local facet of a primary: what is durable of it, what it lacks, and where that is kept.

What is durable of a facet stands in its entry of the superblock:

    path, state   as in ``engine.facet``
    since         the log after this seq holds what it lacks; null where the map does, or nothing
    tracking      its map holds what it lacks, and changes are marked there
    default       default bit of the map
    fill          the map is to be filled before it is used: nothing is known of the content
    compare       the marked regions may be equal: what is, is not written again
    offline       by a person: it does not return by itself
    id            names the map's file
    identity      of the file (``ports.File.identity``) that all this is said of
    why           the cause, for people
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from nbdmirror.codec.record import MARK
from nbdmirror.core.active import volume_extent
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.facetcopy import FacetCopy
from nbdmirror.engine.log import Cursor
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed, FormatError

if TYPE_CHECKING:
    from nbdmirror.engine.facets import Facets

NEW: dict[str, Any] = {
    "since": None,
    "tracking": False,
    "default": False,
    "fill": False,
    "compare": False,
    "offline": False,
    "last": False,
    "why": None,
}


class Member:
    """One facet with its entry in the superblock and, while it lacks something, its map."""

    def __init__(self, owner: Facets, volume: Volume, facet: LocalFacet, saved: dict[str, Any]):
        self._owner = owner
        self.volume = volume
        self.facet = facet
        self.saved = saved
        for key, value in NEW.items():
            saved.setdefault(key, value)
        self.dcm: DcmFile | None = None
        self.copy: FacetCopy | None = None
        self.task: asyncio.Task[None] | None = None
        self.in_hand = False
        """Somebody gives it a file: it does not come back by itself meanwhile."""
        self.mapping = asyncio.Lock()
        """Held while what it lacks is on its way: from the log into the map, or into the facet."""

    # -- as what holds the log (see ``engine.housekeeper``) -----------------------------------

    starting = False

    @property
    def name(self) -> str:
        """What events call it."""
        return self.facet.path

    @property
    def tracking(self) -> bool:
        """Whether the log is not kept for it."""
        return self.facet.kept_seq is None

    @property
    def durable_seq(self) -> int:
        """It lacks what the log holds after this seq."""
        return self.facet.kept_seq or 0

    @property
    def owed(self) -> bool:
        """Whether it lacks something that the log has no more, and no map has yet."""
        kept_seq = self.facet.kept_seq
        return kept_seq is not None and kept_seq + 1 < self._owner.group.log.ring.tail_seq

    async def overflow(self, why: str) -> None:
        """Gives up its part of the log: what it lacks is in its map afterwards (O12), unless it
        can come back from the log at once."""
        await self._owner.hurry(self)
        if self.facet.writable:
            return
        self._owner.events.emit("facet-overflow", facet=self.name, why=why)
        await self.to_map()

    def mark(self, volume: int, offset: int, length: int) -> None:
        """Marks a change in its map (see ``group.Tracker``)."""
        if volume == self.volume.index and self.dcm is not None:
            self.dcm.mark(offset, length)

    # -- the map -------------------------------------------------------------------------------

    def open_map(self) -> None:
        """Opens the map that is in use; a damaged or doubtful one is filled."""
        saved = self.saved
        self.dcm = self._owner.map_of(self)
        self.dcm.open(bool(saved["default"]))
        if self.dcm.damage is not None:
            saved["fill"] = True
        elif saved["fill"]:
            self.dcm.fill()
        if not self.facet.writable and self not in self._owner.group.trackers:
            self._owner.group.trackers.append(self)

    def is_same(self) -> bool:
        """Whether the open file is the one that the entry speaks of; what cannot be told is doubted
        (I5). If not the caller has it compared, and says that it is this one, not sooner than that.
        """
        found = self.facet.file.identity()
        return bool(found) and self.saved.get("identity") == found

    async def distrust(self) -> None:
        """Nothing is known of its content, durably, when this returns."""
        async with self.mapping:
            self.fill()
            # Not sooner: taken for the old disk, a new one would only get what that lacked.
            self.saved.update(compare=True, why=None)
            await self.sync_map()
            await self._owner.store.save()

    def fill(self) -> None:
        """Nothing is known of its content; the caller makes that durable. Until the map is, a start
        fills it again: what is on disk may have fewer marks."""
        self.facet.kept_seq = None
        self.saved.update(tracking=True, since=None, fill=True)
        if self.dcm is None:
            self.open_map()
        else:
            self.dcm.fill()

    async def to_map(self) -> None:
        """Returns when the map holds, durably, all that the facet lacks and will lack."""
        async with self.mapping:
            owner, facet, saved = self._owner, self.facet, self.saved
            if facet.kept_seq is None:
                return
            if self.dcm is None:
                self._new_map()
            await self.sync_map()  # empty, durably so, before it is said to be in use
            if not saved["tracking"]:
                saved.update(default=False, fill=False)
            log = owner.group.log
            # From this step on changes are marked; what is pending is, piece by piece.
            if self not in owner.group.trackers:
                owner.group.trackers.append(self)
            saved["tracking"] = True
            upto = log.next_seq
            await owner.store.save()
            try:
                await self._mark_pending(upto)
            except FormatError as error:
                # What cannot be read back cannot be marked: then everything is.
                owner.events.emit("log-damaged", facet=facet.path, why=error.message)
                self.fill()
            await self.sync_map()
            facet.kept_seq = saved["since"] = None
            await owner.store.save()

    async def _mark_pending(self, upto: int) -> None:
        log, facet = self._owner.group.log, self.facet
        assert facet.kept_seq is not None
        if self.owed:
            if self._owner.spill is None:  # a move of the log was cut short
                raise FormatError(f"the log begins at {log.ring.tail_seq}, not before")
            self._mark_active(facet.kept_seq)
        cursor = Cursor(max(facet.kept_seq + 1, log.ring.tail_seq))
        while cursor.seq < upto:
            chunk = await log.read(cursor)
            for record in chunk.parsed():
                if record.kind != MARK:
                    self.mark(record.volume, record.offset, record.length)
            await self.sync_map()
            facet.kept_seq = chunk.last_seq

    def _mark_active(self, since: int) -> None:
        """Marks the extents written after ``since``: they are active until the facet has them. They
        are not compared: what it holds of them may be in the page cache only (O16)."""
        active = self._owner.group.active
        for key, seq in active.hot.items():
            index, extent = volume_extent(key)
            if seq > since and index == self.volume.index:
                offset = extent * active.extent_size
                self.mark(index, offset, min(active.extent_size, self.volume.size - offset))

    def _new_map(self) -> None:
        """An empty map, open from now on, whoever is cancelled; DiskFailed if there is none to be
        had, for the whole node: what the facet lacks could not be told."""
        dcm = self._owner.map_of(self)
        try:
            dcm.open(True)
            dcm.clear()
        except DiskFailed as error:
            self._owner.group.fail(error)
            raise
        self.dcm = dcm

    async def sync_map(self) -> None:
        """Makes every mark so far durable; DiskFailed if it cannot, for the whole node (O16)."""
        filled = bool(self.saved["fill"])
        if self.dcm is not None:
            try:
                await self.dcm.sync()
            except DiskFailed as error:
                self._owner.group.fail(error)
                raise
            if filled:
                self.saved.update(default=True, fill=False)

    async def forget(self) -> None:
        """Neither log nor map is kept for it any more."""
        async with self.mapping:
            self.facet.kept_seq = None
            self.drop_map()

    def drop_map(self) -> None:
        """The map is not needed any more."""
        if self in self._owner.group.trackers:
            self._owner.group.trackers.remove(self)
        if self.dcm is not None:
            self.dcm.close(unlink=True)
            self.dcm = None

    def status(self, now: float) -> dict[str, Any]:
        """Its object in the status."""
        facet, log = self.facet, self._owner.group.log
        pending = 0 if facet.kept_seq is None else log.next_seq - 1 - facet.kept_seq
        dcm = self.dcm
        return {
            "path": facet.path,
            "state": FacetState.NOT_SYNCHRONISED.value if facet.failed else facet.state.value,
            "errors": facet.errors,
            "offline": self.saved["offline"],
            "queue": {"count": 0 if facet.writable else pending},
            "dirty": {
                "regions": dcm.map.count if dcm else 0,
                "bytes": dcm.map.count * dcm.region_size if dcm else 0,
            },
            "resync": None if self.copy is None else self.copy.progress.status(now),
            "why": self.saved["why"],
            "next_action": self._next_action(),
        }

    def _next_action(self) -> str | None:
        if self.facet.writable:
            return None
        if self.saved["offline"]:
            return f"nbdmirror facet online {self.facet.path}"
        return (
            f"mend its disk, then: nbdmirror facet online {self.facet.path}; on a new disk: "
            f"nbdmirror facet replace {self.facet.path}"
        )
