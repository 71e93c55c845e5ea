"""The superblock: a node's durable state as one document, saved whole, never half (O11).

Everything that must survive and is not bulk is in ``Store.state``; whoever changes it awaits
``save`` before acting on the change. The log, the maps and the facets are files of their own.

    format         1
    group, node    names, as in the configuration
    uuid           of the group; null on a secondary that no primary has initialised yet
    role           "primary" or "secondary"
    generation     id of the current lineage; history: [[generation, end seq], ...] before it
    epoch          of the records written now (O10)
    forks          [[epoch, end seq], ...]: where a power loss ended an epoch, oldest first
    runs           on a primary: [[epoch, random id], ...]: one for each start, oldest first; an
                   empty id if what that run saved is lost
    ends           on a primary: [[epoch, end seq], ...]: where each of these ended that did not end
                   in a fork
    run            on a secondary: the id of the last run that it followed
    extent_size    bytes that one entry of the active map stands for; fixed at creation
    active_sectors  so many sectors of the active map were written, durably; on a primary
    identity       of this file (``ports.File.identity``) at the last start: another one shows that
                   the state was copied
    boot_id        of the boot in which the node was last started
    clean          true between a clean stop and the next start
    tail           {position, seq}: where the log's valid part begins
    durable_seq    the log was durable up to here when this was saved; 0 if that is not known
    end_seq        the log's last record at the last clean stop
    volumes        [{name, uuid, size, region_size, facets: [{path, state}], redo_seq}]; redo_seq,
                   if any: no record up to here is redone in this volume: it had no facet after a
                   power loss, and the remote that stands in may be ahead of the log; or it was
                   changed beside the log (V13)
    remotes        {name: {address, mode, ...}}: see ``engine.remote.FACTS``
    configured     what the configuration said of paths: see ``engine.agreement``
    removed        {name: address} of remotes that the configuration has and a command removed, and
                   perhaps added again on its own terms
    log_path       where the log is, if it was moved; log_volatile: true while it is in memory only
    log_spill      true while the log's newest records may be in memory only: see ``engine.spill``
    redo_seq       no record up to here is redone: the facets were ahead of the log there
    log_failed     true after a sync of the log failed: what it had not synced may be gone
    snapshots      see ``engine.snapshots``; snapshot_number: the last that was given out;
                   marked_seq: on a secondary, the last marker of a snapshot that it followed
    restore        what is being copied behind: see ``engine.restore``; null if nothing is
    altered        on a secondary: its volumes were changed by something else than its primary (V14)
    rejoined       on a secondary: a facet of it is new, see ``engine.rejoin``
    damaged        on a secondary: its log, or this file, has lost something
    copies         on a secondary: grows before region copies are acknowledged, so that an older
                   copy of the node says less (``core.identity``)
    upstream       on a secondary: {name, consistent, since}; null before the first session
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from nbdmirror.codec import slots
from nbdmirror.engine.groupcommit import GroupCommit
from nbdmirror.errors import DiskFailed, FormatError, Refused, StateError
from nbdmirror.ports import Disk, File

FILE_NAME = "superblock"
FORMAT = 1


class Store:
    """The open superblock of one node."""

    def __init__(self, file: File, counter: int, slot: int, state: dict[str, Any]) -> None:
        self.state = state
        self._file = file
        self._counter = counter
        self._slot = slot
        self._doubtful: bytes | None = None
        """The slot that counts, if it may be in the page cache only: a former process wrote it."""
        self.on_failed: Callable[[DiskFailed], None] = lambda error: None
        """Called when it cannot be saved: final, whoever asked for it (O16)."""
        self.damaged: str | None = None
        """Why ``state`` may be out of date: the other slot was damaged, or a save was lost."""
        known = str(state.get("identity") or "")
        self.copied = bool(known) and not same_inode(known, file.identity())
        """The state directory was copied here: that files are others than they were says nothing of
        what they hold."""
        self.save = GroupCommit(self._save)
        """Makes ``state``, as it is at the call or later, durable; DiskFailed if it cannot."""

    @classmethod
    async def create(cls, disk: Disk, directory: str, state: dict[str, Any]) -> Store:
        """Makes the file, both slots written through; FileExistsError if it is there."""
        path = f"{directory}/{FILE_NAME}"
        file = disk.open(path, create=True)
        await file.allocate(slots.SLOT_SIZE * slots.SLOT_COUNT)
        store = cls(file, 0, 1, state)
        await store.save()
        await disk.sync_directory(directory)
        return store

    @classmethod
    def open(cls, disk: Disk, directory: str, *, read_only: bool = False) -> Store:
        """Opens an existing one; StateError if it is missing, damaged or of another format."""
        path = f"{directory}/{FILE_NAME}"
        if not disk.exists(path):
            raise StateError(
                f"no state of a node in {directory}", hint="make it with: nbdmirror create CONFIG"
            )
        try:
            file = disk.open(path, read_only=read_only)
        except BlockingIOError:
            raise StateError(
                f"{directory} is in use by a running node", hint="stop that node first"
            ) from None
        images = _read_slots(file)
        try:
            slot, counter, state = slots.choose(images)
        except FormatError as error:
            file.close()
            raise StateError(
                f"{path} cannot be used: {error}",
                hint="restore the state directory, or create it anew and compare with the remote",
            ) from error
        if state.get("format") != FORMAT:
            file.close()
            raise StateError(f"{path} has format {state.get('format')}, this program has {FORMAT}")
        if slots.home(counter) != slot:
            counter += 1  # it went astray: the next save is one for the slot that it was meant for
        store = cls(file, counter, slot, state)
        store._doubtful = slots.trimmed(images[slot])
        damage = slots.damage(images)
        if damage is not None:
            store.doubt(damage)
        return store

    def doubt(self, why: str) -> None:
        """The state may be out of date: that it was saved at a clean stop says nothing then."""
        self.damaged = f"{self._file.path}, {why}"
        self.state["clean"] = False

    async def _save(self) -> None:
        # The slot that counts now stays untouched until the other one is durable.
        slot = 1 - self._slot
        try:
            data = slots.encode(self._counter + 1, self.state)
            await self._settle()
            self._file.pwrite(slot * slots.SLOT_SIZE, data)
            await self._file.sync()
        except FormatError as error:
            raise self._failed(OSError(errno.ENOSPC, error.message)) from error
        except OSError as error:
            raise self._failed(error) from error
        self._counter += 1
        self._slot = slot

    async def save_twice(self) -> None:
        """The same, in both slots: for what nothing makes good that is not known, should one rot
        (I5)."""
        for _ in range(slots.SLOT_COUNT):
            await self.save()

    def begin(self, boot_id: str) -> None:
        """The node runs from here on; whoever has concluded from the state what became of it before
        saves this with that."""
        self.state.update(
            clean=False, boot_id=boot_id, log_failed=False, identity=self._file.identity()
        )

    def redo_seq(self, volume: int) -> int:
        """The last record that no redo brings into the volume of that index."""
        entry = self.state["volumes"][volume]
        return max(int(self.state.get("redo_seq", 0)), int(entry.get("redo_seq", 0)))

    def full(self) -> str | None:
        """Why nothing may be added to the state that can be refused (a snapshot, a facet, a
        remote): the last quarter is kept for what cannot be."""
        if slots.room(self.state) * 4 >= slots.SLOT_SIZE:
            return None
        return f"the superblock {self._file.path} of {slots.SLOT_SIZE} bytes is nearly full"

    def check_room(self) -> None:
        """Refused if it is ``full``."""
        why = self.full()
        if why is not None:
            raise Refused(why, hint="delete snapshots that are not needed any more")

    async def settle(self) -> None:
        """Makes durable what was read, before anything is done that relies on it: a former process
        may have left it in the page cache only (O16). DiskFailed if it cannot be."""
        try:
            await self._settle()
        except OSError as error:
            raise self._failed(error) from error

    async def _settle(self) -> None:
        if self._doubtful is not None:
            self._file.pwrite(self._slot * slots.SLOT_SIZE, self._doubtful)
            await self._file.sync()
            self._doubtful = None

    def _failed(self, error: OSError) -> DiskFailed:
        failure = DiskFailed(
            f"cannot save {self._file.path}: {error.strerror or error}",
            number=error.errno or 5,
            hint="replace or free the disk of state_dir, then restart the node",
        )
        self.on_failed(failure)
        return failure

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def same_inode(one: str, other: str) -> bool:
    """Whether two identities (``ports.File.identity``) are one, or differ in the file system alone,
    which a kernel may number anew with each boot."""
    return one == other or (":" in one and _inode(one) == _inode(other))


def _inode(identity: str) -> str:
    return identity.partition(":")[2]


def _read_slots(file: File) -> list[bytes]:
    """What there is of each slot: the file may have been cut short."""
    size, step = file.size(), slots.SLOT_SIZE
    starts = range(0, slots.SLOT_COUNT * step, step)
    return [file.pread(at, max(0, min(step, size - at))) for at in starts]
