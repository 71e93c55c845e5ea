"""From what is on disk to a node that may serve: redo, forks, and what must be compared.

Start costs the log's tail, never the volume (I7). What happened is read off the superblock:

- clean stop: the head of the log is found, nothing is redone;
- the process died, same boot: the page cache holds all that was written, the log at least what
  the facets hold; redo, and count the facets as unsynced from the tail on (O23);
- power loss: the valid part of the log is redone and synced; the end of the epoch becomes a fork,
  and every active extent goes into every remote's DCM, to be compared;
- either, of a log that was in memory in part (``engine.spill``): the same, but nothing is redone;
- a sync of the log failed, same boot: what it had not synced may be gone as after a power loss
  (O16), but a primary's facets hold all of it, so they are only compared.

Every step may itself be cut by a crash and is then done again (O19).
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nbdmirror.codec.record import MARK, Record
from nbdmirror.core.active import volume_extent
from nbdmirror.core.timeline import Timeline
from nbdmirror.engine.activemap import ActiveMapFile
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.log import Cursor, Log
from nbdmirror.engine.logscan import Forks
from nbdmirror.engine.opening import is_followed
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed
from nbdmirror.ports import Buffer

RUNS_MAX = 1000
"""Starts that a primary remembers; a secondary that last followed an older one is compared. So many
forks, at the most, are told in a HELLO (``fields.ENTRIES_MAX``)."""
ANEW_BYTES = 4 << 20
"""What may be in the page cache only is written anew in stretches of this size: no page of that
cache, large ones too, lies in two of them."""
LEVEL_BYTES = 1 << 20
"""Facets are compared in pieces of this size after a power loss."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What recovery found."""

    clean: bool
    power_loss: bool
    memory_lost: bool
    """The newest entries of the log were in memory only: nothing was redone."""
    log_lost: bool
    """The log lost its newest entries; the facets in service have them, and were not touched."""
    volatile: bool
    """The log was in memory, and nothing is left of it."""
    records: int
    end_seq: int
    lost: int
    """Records that were durable once and that the log does not give back: it was damaged."""
    timeline: Timeline
    """When the records in the log were taken, for lag in seconds."""
    healed: tuple[str, ...] = ()
    """Facets that had failed and that are trusted again: the log has brought them back."""
    unfinished: bool = False
    """A record was being appended when the process was killed."""
    whole: bool = True
    """The log holds all that followed its tail, of a superblock that may be out of date too."""

    @property
    def in_doubt(self) -> bool:
        """Whether the facets, and remotes, may hold what the log does not."""
        return self.power_loss or self.memory_lost

    @property
    def ahead(self) -> bool:
        """Whether the facets hold more than the log, which was not redone."""
        return self.memory_lost or self.log_lost


Before = Callable[[Record], Awaitable[None]]


async def redo(
    store: Store, log: Log, volumes: list[Volume], boot_id: str, before: Before
) -> Recovered:
    """Brings the facets to the end of the log. On return everything that will be relied on is
    durable; the superblock is changed in memory only, and saved by the caller. ``before`` is
    awaited before each record: snapshots may need what it overwrites. A facet that failed is
    brought back too, if the log still holds all that it had not synced then: its disk is tried
    again, and what the page cache may have lost is written anew (O16)."""
    state = store.state
    forks = [(int(epoch), int(end)) for epoch, end in state["forks"]]
    timeline, records = _scan(store, log, forks)
    clean = bool(state["clean"])
    volatile = bool(state.get("log_volatile"))  # what it held is gone with the process
    rebooted = volatile or state["boot_id"] != boot_id
    memory_lost = not clean and bool(state.get("log_spill"))
    # A failed sync of the log may have cost as much of it as a power loss (O16).
    power_loss = not clean and (rebooted or bool(state.get("log_failed")))
    log_lost = power_loss and not (rebooted or memory_lost) and _hold_all(store, volumes)
    only_healing = clean or log_lost
    healing = _last_ones(store, volumes) if memory_lost else _healing(store, volumes, log)
    for facet in (facet for volume in volumes for facet in volume.facets):
        facet.synced_seq = log.ring.tail_seq - 1
    end_seq = log.next_seq - 1
    if clean:
        log.durable_seq = end_seq
    else:
        # A sync that failed before the process died may have left pages marked clean that are
        # not on disk: what was not known to be durable is written once more (O16).
        await log.rewrite(max(int(state.get("durable_seq", 0)) + 1, log.ring.tail_seq))
        await log.sync(end_seq)  # before anything of it reaches a facet (O2)
    # A secondary whose applying is held back comes back to exactly that point (V8).
    limit = (state.get("apply") or {}).get("limit")
    until = end_seq if limit is None else min(limit, end_seq)
    in_doubt = power_loss or memory_lost
    unfinished = not in_doubt and await _is_unfinished(log, forks, volumes)
    behind = await _behind(store, log, forks, in_doubt=in_doubt or unfinished)
    healing = [] if behind else healing
    only_there = memory_lost or volatile  # in the page cache
    relied_on = only_there or only_healing or (behind and state["role"] == "primary")
    await _forget(volumes, [] if only_there else healing, in_service=not relied_on)
    if not (memory_lost or behind) and (not clean or healing):
        await _apply(store, log, until, volumes, healing, before, only_healing=only_healing)
    if memory_lost or log_lost:
        await _follow_marks(log, before)
        state["redo_seq"] = end_seq
    for volume in volumes:
        for facet in (one for one in volume.facets if one.failed is None):
            facet.written_seq = max(until, log.ring.tail_seq - 1)
            # Redo may have brought back older versions of blocks: nothing counts as synced (O23).
            redone = records and not memory_lost and (not only_healing or facet in healing)
            facet.synced_seq = log.ring.tail_seq - 1 if redone else facet.written_seq
            if facet in healing or (in_doubt and facet.in_service):
                await _sync(store, volume, facet)
    _trust_again(store, [facet for facet in healing if facet.failed is None])
    _note_failed(store, volumes)
    known = max(behind, int(state.get("end_seq" if clean else "durable_seq", 0)))
    return Recovered(
        clean=clean,
        power_loss=power_loss,
        memory_lost=memory_lost,
        log_lost=log_lost,
        volatile=volatile,
        records=records,
        end_seq=end_seq,
        lost=0 if volatile else max(0, known - end_seq),
        timeline=timeline,
        healed=tuple(facet.path for facet in healing if facet.failed is None),
        unfinished=unfinished,
        whole=not (memory_lost or volatile or known > end_seq) and _is_whole(store, log, forks),
    )


async def _forget(volumes: list[Volume], healing: list[LocalFacet], *, in_service: bool) -> None:
    """A former process may have seen a sync of theirs fail. What that left in the page cache only,
    the log has, as far as it was promised (O16). The others are forgotten when they return."""
    for volume in volumes:
        for facet in volume.facets:
            if facet in healing or (in_service and facet.writable):
                await facet.forget()


def _is_whole(store: Store, log: Log, forks: Forks) -> bool:
    """Whether nothing was appended that the log does not give back any more, as far as that went to
    its disk. If the superblock is out of date, so may be the tail: what was written over the log
    since begins there, so the first record tells."""
    if store.damaged is None or log.next_seq > log.ring.tail_seq:
        return True
    return not log.seq_behind(forks)


def _scan(store: Store, log: Log, forks: Forks) -> tuple[Timeline, int]:
    """The times, and the number, of the records that the log holds.

    Those of the next epoch count too, if the superblock may be out of date; and tell that it is: an
    epoch is durable before its first record (O10), so a disk has lost that save (fault 16)."""
    epoch, timeline, records = int(store.state["epoch"]), Timeline(), 0
    for record in log.scan(forks, epoch + 1):
        records += 1
        timeline.add(record.seq, record.time_ns)
        if record.epoch > epoch and store.damaged is None:
            store.doubt(f"the log goes on in epoch {record.epoch}, which it does not know")
    return timeline, records


def _hold_all(store: Store, volumes: list[Volume]) -> bool:
    """Whether the facets have, in the page cache, whatever the log ever held: so on a primary. What
    a secondary has applied was durable in the log before (O2); and where a volume has no facet the
    log is what it goes on from, for all."""
    return store.state["role"] == "primary" and all(volume.in_service() for volume in volumes)


async def _is_unfinished(log: Log, forks: Forks, volumes: list[Volume]) -> bool:
    """Whether the log ends with what a killed process was about to append (fault 1). A record goes
    to the facets once all of it is in the log: where a facet has what the header says that it
    carried, it was whole, and the log was damaged since."""
    found = log.unfinished(forks)
    if found is None:
        return False
    record = found.record
    for facet in volumes[record.volume].in_service() if record.kind != MARK else ():
        with contextlib.suppress(OSError):
            if found.was(bytes(await facet.read(record.offset, record.length))):
                return False
    return True


async def _behind(store: Store, log: Log, forks: Forks, *, in_doubt: bool) -> int:
    """The seq of a record behind damage in the log; 0 if it simply ends, or may well do so.

    Within one boot the page cache holds all that was written, so what is behind the damage is in
    the facets; redoing what lies before it would only bring back what it had replaced."""
    if not in_doubt:
        return log.seq_behind(forks)
    if store.state["role"] == "secondary":
        # What lies behind was lost in part: to a later start it must not look like damage. Of a
        # primary's log it is known by the epoch that ended.
        await log.forget_behind()
    return 0


async def _apply(
    store: Store,
    log: Log,
    until: int,
    volumes: list[Volume],
    healing: list[LocalFacet],
    before: Before,
    *,
    only_healing: bool,
) -> None:
    """Carries the log's records up to ``until`` into the facets."""
    # What an earlier start did not redo, the facets have in a newer version.
    cursor = Cursor(max(log.ring.tail_seq, int(store.state.get("redo_seq", 0)) + 1))
    while cursor.seq <= until:
        for record in (await log.read(cursor)).parsed():
            if record.seq > until:
                return
            if not only_healing:
                await before(record)
            volume = volumes[record.volume]
            if record.seq <= store.redo_seq(record.volume):
                continue
            facets = [f for f in volume.facets if f in healing and f.failed is None]
            for facet in facets if only_healing else volume.writable() + facets:
                try:
                    await facet.apply(record)
                except OSError as error:
                    failure = facet.fail("redo", error)
                    if not _goes_on(store, volume):
                        raise failure from error


async def _follow_marks(log: Log, before: Before) -> None:
    """What is not redone may hold the mark of a snapshot that is only planned."""
    cursor = Cursor(log.ring.tail_seq)
    while cursor.seq < log.next_seq:
        for record in (await log.read(cursor)).parsed():
            if record.kind == MARK:
                await before(record)


async def _sync(store: Store, volume: Volume, facet: LocalFacet) -> None:
    """Raises DiskFailed if nobody goes on for it."""
    try:
        await facet.sync()
    except DiskFailed:
        if not _goes_on(store, volume):
            raise


def _goes_on(store: Store, volume: Volume) -> bool:
    """Without a facet that has just failed: the others, or a remote, stand in for it. A secondary's
    are one (``engine.rejoin``): the next start may find the disk mended."""
    if store.state["role"] == "secondary":
        return False
    return bool(volume.in_service()) or is_followed(store, volume.index)


def _note_failed(store: Store, volumes: list[Volume]) -> None:
    """Facets that failed in the redo are out of service; the caller saves (M12)."""
    for volume, saved in zip(volumes, store.state["volumes"], strict=True):
        for facet, entry in zip(volume.facets, saved["facets"], strict=True):
            if facet.failed is not None and facet.state is not FacetState.NOT_SYNCHRONISED:
                facet.state = FacetState.NOT_SYNCHRONISED
                entry.update(
                    state=facet.state.value, since=facet.kept_seq, why=facet.failed.message
                )


def _entries(store: Store) -> Iterator[dict[str, Any]]:
    for volume in store.state["volumes"]:
        yield from volume["facets"]


def _failed(store: Store, volume: Volume) -> list[tuple[int, LocalFacet]]:
    """(last record that it had synced, facet) of those that failed and lack what followed.

    What a log in memory held is gone: then only a volume's last facet has all that was promised,
    and only if no remote went on for it."""
    gone = not store.state["clean"] and bool(store.state.get("log_volatile"))
    entries = {
        entry["path"]: entry
        for entry in _entries(store)
        if not entry.get("tracking") and not entry.get("offline")
    }
    alone = not volume.in_service() and not is_followed(store, volume.index)
    found = []
    for facet in volume.facets:
        entry = entries.get(facet.path, {})
        synced = entry.get("since")
        if synced is None or facet.writable or not facet.is_open:
            continue
        if gone and not entry.get("last"):
            continue
        # Another file in its place has not what is added to here. Where that cannot be told, it is
        # compared with who has the volume (I5).
        identity = entry.get("identity")
        if identity == facet.file.identity() if identity else alone:
            found.append((synced, facet))
    return found


def _healing(store: Store, volumes: list[Volume], log: Log) -> list[LocalFacet]:
    """The failed facets for which the log holds everything since their last sync."""
    found = []
    for volume in volumes:
        begin = max(log.ring.tail_seq - 1, store.redo_seq(volume.index))
        found += [facet for synced, facet in _failed(store, volume) if synced >= begin]
    return found


def _last_ones(store: Store, volumes: list[Volume]) -> list[LocalFacet]:
    """Of volumes without a facet in service, the one that was synced last: no redo will bring back
    what it has not, so it is taken as after a power loss of its own (``engine.spill``). Had there
    been a remote to go on with, the superblock would say that the log is on disk."""
    found = []
    for volume in volumes:
        failed = _failed(store, volume)
        if failed and not volume.in_service():
            found.append(max(failed, key=lambda one: one[0])[1])
    return found


def _trust_again(store: Store, healed: list[LocalFacet]) -> None:
    paths = [facet.path for facet in healed]
    for facet in healed:
        facet.state = FacetState.SYNCHRONISED
        facet.writable, facet.kept_seq = True, None
    for entry in _entries(store):
        if entry["path"] in paths:
            entry.update(state=FacetState.SYNCHRONISED.value, since=None)


def note_end(store: Store, recovered: Recovered) -> None:
    """Remembers where the epoch ended (T6), and whether a power loss, or damage, ended it (O10);
    the caller saves."""
    state = store.state
    ends = state.setdefault("ends", [])
    if recovered.in_doubt or recovered.lost or recovered.unfinished or store.damaged:
        ends = state["forks"]
    ends.append([state["epoch"], recovered.end_seq])


def forget_oldest(state: dict[str, Any]) -> None:
    """Drops the oldest runs, and ends and forks of epochs before those that are left: a secondary
    that last followed one of them is compared whatever its end was (T5). The last fork stays: a
    scan of the log that is told of it takes no record of any epoch that had ended before (O10)."""
    runs, forks = state["runs"], state["forks"]
    del runs[:-RUNS_MAX]
    state["ends"] = [end for end in state["ends"] if end[0] >= runs[0][0]]
    state["forks"] = [fork for fork in forks[:-1] if fork[0] >= runs[0][0]] + forks[-1:]


def doubtful_ranges(active: ActiveMapFile, volumes: list[Volume]) -> list[tuple[Volume, int, int]]:
    """(volume, offset, length) of all that may differ after a power loss."""
    if active.damaged is not None:
        return [(volume, 0, volume.size) for volume in volumes]
    ranges = []
    for key in sorted(active.hot):
        index, extent = volume_extent(key)
        if index < len(volumes):
            offset = extent * active.extent_size
            volume = volumes[index]
            if offset < volume.size:
                length = min(active.extent_size, volume.size - offset)
                ranges.append((volume, offset, length))
    return ranges


async def write_anew(
    store: Store, volumes: list[Volume], ranges: list[tuple[Volume, int, int]]
) -> None:
    """Writes what the facets hold in the ranges once more, and clears their holes, durably. A sync
    that failed before the process died may have left either in the page cache, marked clean; else
    redo does that (O16). A facet that cannot do it leaves service, if others go on; the caller
    saves (M12)."""
    stretches = {
        (volume.index, number)
        for volume, offset, length in ranges
        for number in range(offset // ANEW_BYTES, (offset + length - 1) // ANEW_BYTES + 1)
    }
    if stretches:
        await _sync_all(volumes)
    for index, number in sorted(stretches):
        at, volume = number * ANEW_BYTES, volumes[index]
        for facet in volume.in_service():
            with _left(volume, facet):
                await _write_anew(facet, at, min(ANEW_BYTES, facet.size - at))
    await _sync_all(volumes)
    _note_failed(store, volumes)


async def _write_anew(facet: LocalFacet, offset: int, length: int) -> None:
    pieces = [
        (start, await facet.read(start, size))
        for start, size in facet.file.data_ranges(offset, length)
    ]
    await facet.forget_range(offset, length)  # else it might be written to the cache only
    at = offset
    for start, data in pieces:
        if at < start:
            await facet.punch(at, start - at)
        await facet.copy(start, data)
        at = start + len(data)
    if at < offset + length:
        await facet.punch(at, offset + length - at)


@contextlib.contextmanager
def _left(volume: Volume, facet: LocalFacet) -> Iterator[None]:
    """Within, what its disk refuses takes the facet out of service (M12). Raises DiskFailed if it
    is the last: what was only in its page cache, no remote need have."""
    try:
        yield
    except (OSError, DiskFailed) as error:
        failure = error if isinstance(error, DiskFailed) else facet.fail("redo", error)
        if not volume.in_service():
            raise failure from error


async def _sync_all(volumes: list[Volume]) -> None:
    for volume in volumes:
        for facet in volume.in_service():
            with _left(volume, facet):
                await facet.sync()


async def level(
    store: Store,
    volumes: list[Volume],
    ranges: list[tuple[Volume, int, int]],
    healed: tuple[str, ...],
) -> None:
    """Makes the facets of each volume equal in the ranges, durably: writes that the log lost may
    have reached one facet and not another, and a read must not depend on which one serves it.

    One that was healed is not what others are made equal to: a write that it failed in the middle
    of may be in it in part, and not in the log. One that cannot do it leaves service, if others go
    on; the caller saves (M12)."""
    written = [volume for volume in volumes if ranges and len(volume.in_service()) > 1]
    for volume, offset, length in ranges:
        for at in range(offset, offset + length, LEVEL_BYTES):
            if len(volume.in_service()) > 1:
                await _level(volume, at, min(LEVEL_BYTES, offset + length - at), healed)
    await _sync_all(written)  # also one that is the last by now: others may have been its source
    _note_failed(store, volumes)


async def _level(volume: Volume, offset: int, length: int, healed: tuple[str, ...]) -> None:
    data: Buffer | None = None
    for facet in sorted(volume.in_service(), key=lambda facet: facet.path in healed):
        with _left(volume, facet):
            found = await facet.read(offset, length)
            if data is None:
                data = found
            elif found != data:
                facet.pwrite(offset, data)
