"""DCMs on disk: one sparse file per remote and volume, written page by page (V1, O12).

A mark is in the page cache before the write that it stands for goes on, so it survives the
process; ``sync`` makes it survive the machine. Between the two the active map covers it. The
default bit of a map lives in the superblock, because ``fill`` voids the pages.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator

from nbdmirror.codec import mappage
from nbdmirror.core.dcm import Dcm
from nbdmirror.engine.groupcommit import GroupCommit
from nbdmirror.errors import DiskFailed, FormatError
from nbdmirror.ports import Disk, File


def map_name(remote: str, volume: str) -> str:
    """The file of a remote's map of a volume. Names may have dots in them, but no colon: remote
    ``a`` with volume ``b.c`` is not remote ``a.b`` with volume ``c``."""
    return f"{remote}:{volume}" if "." in remote else f"{remote}.{volume}"


class DcmFile:
    """One DCM with its file."""

    def __init__(self, disk: Disk, path: str, regions: int, region_size: int) -> None:
        self._disk = disk
        self.path = path
        self.region_size = region_size
        self.map = Dcm(regions)
        self._file: File | None = None
        self._name_unsynced = False
        self._unwritten: dict[int, None] = {}
        """Pages that changed in memory and are not in the file yet: a failed write leaves some."""
        self._unsynced = False
        self.sync = GroupCommit(self._sync)
        """Makes every mark so far durable; DiskFailed if it cannot, and ever after (O16)."""
        self.damage: str | None = None
        """Why the map could not be read back; it was filled then, so nothing is missed (X1)."""

    def open(self, default: bool, *, read_only: bool = False) -> None:
        """Opens or makes the file and loads the pages that were written. O(pages written).

        A damaged map is filled, unless ``read_only``; ``damage`` says so. DiskFailed if the file
        cannot be had at all."""
        try:
            self._open(default, read_only=read_only)
        except OSError as error:
            raise self._failed("opening", error) from error

    async def forget(self) -> None:
        """Before ``open``, where writes go by what is cleared on the disk: in the page cache may be
        more that is, which a sync failed to write (O16). Never raises."""
        with contextlib.suppress(OSError):  # ``open`` tells of it
            file = self._disk.open(self.path)
            with contextlib.closing(file):
                await file.forget()

    def _open(self, default: bool, *, read_only: bool) -> None:
        created = not self._disk.exists(self.path)
        if not read_only:
            self._disk.make_directory(self.path.rpartition("/")[0])
        self._file = self._disk.open(self.path, create=created, read_only=read_only)
        size = self.map.page_count * mappage.PAGE_SIZE
        if default:
            self.map.fill()
        try:
            if not default and self._file.size() != size:
                # Absent pages would read as "nothing differs": a map that is gone proves nothing.
                size += 1  # and goes on to prove nothing until the new default is durable
                raise FormatError("the map is missing or was cut short")
            self._load()
        except FormatError as error:
            self.damage = f"{self.path}: {error}"
        if read_only:
            return
        if self._file.size() != size:
            self._file.truncate(size)
        # What was found may be a former process's, in the page cache only; so may its name.
        self._unsynced = self._name_unsynced = True
        if self.damage is not None:
            self.fill()

    def _load(self) -> None:
        assert self._file is not None
        for number in self._written_pages():
            data = self._file.pread(number * mappage.PAGE_SIZE, mappage.PAGE_SIZE)
            bits = mappage.decode_page(number, data)
            if bits is not None:
                self.map.load_page(number, bits)

    def _written_pages(self) -> Iterator[int]:
        assert self._file is not None
        # A part of one, where a map was cut short, is not one.
        pages = min(self.map.page_count, self._file.size() // mappage.PAGE_SIZE)
        for start, length in self._file.data_ranges(0, pages * mappage.PAGE_SIZE):
            end = -(-(start + length) // mappage.PAGE_SIZE)
            yield from range(start // mappage.PAGE_SIZE, min(end, pages))

    def mark(self, offset: int, length: int) -> None:
        """Marks the regions that [offset, offset + length) touches; DiskFailed if it cannot be
        written down."""
        assert length > 0
        self._write(
            self.map.mark(offset // self.region_size, (offset + length - 1) // self.region_size)
        )

    def finish(self, first: int, count: int, token: int) -> None:
        """The remote has these regions on disk, as read under ``token``."""
        changed = self.map.finish(first, count, token)
        if changed:
            self._write(changed)

    def merge(self, regions: Dcm) -> None:
        """Marks every region that is set in another map; DiskFailed as ``mark``."""
        self._write(self.map.merge(regions))

    def unmark(self, regions: Iterable[int]) -> None:
        """Clears regions; DiskFailed as ``mark``."""
        pages = [page for region in regions if (page := self.map.unmark(region)) is not None]
        self._write(list(dict.fromkeys(pages)))

    def _write(self, pages: list[int]) -> None:
        assert self._file is not None
        # A page that could not be written is tried again: the bits are set, and nothing else
        # would ever say that they are not in the file.
        self._unwritten.update(dict.fromkeys(pages))
        try:
            for number in list(self._unwritten):
                data = mappage.encode_page(number, self.map.page_bits(number))
                self._unsynced = True
                self._file.pwrite(number * mappage.PAGE_SIZE, data)
                del self._unwritten[number]
        except OSError as error:
            raise self._failed("write", error) from error

    def fill(self) -> None:
        """Every region differs, or may. The caller saves the default bit (1) durably.

        Pages are filled, not removed: until the default is durable, what is on disk must not
        read as fewer marks than before."""
        assert self._file is not None
        try:
            for number in self._written_pages():
                data = mappage.encode_page(number, b"\xff" * mappage.BITMAP_BYTES)
                self._file.pwrite(number * mappage.PAGE_SIZE, data)
        except OSError as error:
            raise self._failed("write", error) from error
        self._unwritten.clear()
        self._unsynced = True
        self.map.fill()

    def clear(self) -> None:
        """No region differs. The caller saves the default bit (0) durably; until then the map
        reads as its default, which is more than there is, never less."""
        assert self._file is not None
        try:
            self._file.truncate(0)
            self._file.truncate(self.map.page_count * mappage.PAGE_SIZE)
        except OSError as error:
            raise self._failed("truncation", error) from error
        self._unwritten.clear()
        self._unsynced = True
        self.map.clear()

    async def rewrite(self) -> None:
        """Writes every page again, as it is: after an unclean end one may be in the page cache
        only, marked clean by a sync that failed (O16)."""
        assert self._file is not None
        pages = list(self._written_pages())
        await self._file.forget()
        self._write(pages)

    async def _sync(self) -> None:
        if self._file is None:
            return
        self._write([])
        if not self._unsynced:
            return
        self._unsynced = False
        file = self._file
        try:
            await file.sync()
            if self._name_unsynced:
                directory = self.path.rpartition("/")[0]
                await self._disk.sync_directory(directory)
                await self._disk.sync_directory(directory.rpartition("/")[0] or "/")
                self._name_unsynced = False
        except OSError as error:
            if file is not self._file:
                return  # closed meanwhile: nobody needs it any more
            self._unsynced = True
            raise self._failed("sync", error) from error

    def _failed(self, what: str, error: OSError) -> DiskFailed:
        return DiskFailed(
            f"{what} of the map {self.path} failed: {error.strerror or error}",
            number=error.errno or 5,
            hint="replace the disk of state_dir, then restart the node",
        )

    def dirty_runs(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """See the function of that name."""
        return dirty_runs(self.map, self.region_size, offset, length)

    def close(self, *, unlink: bool = False) -> None:
        """Closes the file, and removes it with ``unlink`` (nobody needs it any more)."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if unlink:
            # A file that stays says nothing: whoever opens it again fills it, or clears it.
            with contextlib.suppress(OSError):
                self._disk.unlink(self.path)


def dirty_runs(dcm: Dcm, region: int, offset: int, length: int) -> list[tuple[int, int, bool]]:
    """(offset, length, marked) pieces that cover the range, for a block-status reply."""
    pieces: list[tuple[int, int, bool]] = []
    at, end = offset, offset + length
    for first, count in itertools.takewhile(
        lambda run: run[0] * region < end, dcm.runs(offset // region)
    ):
        low = max(first * region, at)
        high = min((first + count) * region, end)
        if low > at:
            pieces.append((at, low - at, False))
        pieces.append((low, high - low, True))
        at = high
    if at < end:
        pieces.append((at, end - at, False))
    return pieces
