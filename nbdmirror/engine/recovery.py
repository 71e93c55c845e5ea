"""From what is on disk to a node that may serve: redo, forks, and what must be compared.

Start costs the log's tail, never the volume (I7). What happened is read off the superblock:

- clean stop: the head of the log is found, nothing is redone;
- the process died, same boot: the page cache holds all that was written, the log at least what
  the facets hold; redo, and count the facets as unsynced from the tail on (O23);
- power loss: the valid part of the log is redone and synced; the end of the epoch becomes a fork,
  and every active extent goes into every remote's DCM, to be compared.

Every step may itself be cut by a crash and is then done again (O19).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nbdmirror.codec.record import Record
from nbdmirror.core.active import volume_extent
from nbdmirror.core.timeline import Timeline
from nbdmirror.engine.activemap import ActiveMapFile
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.log import Cursor, Log
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed, StateError
from nbdmirror.ports import Disk

LEVEL_BYTES = 1 << 20
"""Facets are compared in pieces of this size after a power loss."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What recovery found."""

    clean: bool
    power_loss: bool
    records: int
    end_seq: int
    lost: int
    """Records that were durable once and that the log does not give back: it was damaged."""
    timeline: Timeline
    """When the records in the log were taken, for lag in seconds."""
    healed: tuple[str, ...] = ()
    """Facets that had failed and that the log has brought back."""


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
    clean = bool(state["clean"])
    # A failed sync of the log may have cost as much of it as a power loss (O16).
    volatile = bool(state.get("log_volatile"))  # what it held is gone with the process
    power_loss = not clean and (
        volatile or state["boot_id"] != boot_id or bool(state.get("log_failed"))
    )
    forks = [(int(epoch), int(end)) for epoch, end in state["forks"]]
    healing = _healing(store, volumes, log.ring.tail_seq)
    for volume in volumes:
        for facet in volume.facets:
            facet.synced_seq = log.ring.tail_seq - 1
    timeline = Timeline()
    records = 0
    # The damaged slot of the superblock may have told of a newer epoch.
    epoch_max = int(state["epoch"]) + (store.damaged is not None)
    for record in log.scan(forks, epoch_max):
        records += 1
        timeline.add(record.seq, record.time_ns)
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
    # Within one boot the page cache holds all that was written, so what is behind the damage is in
    # the facets; redoing what lies before it would only bring back what it had replaced.
    behind = 0 if power_loss or end_seq == state.get("cut_seq") else log.seq_behind(forks)
    if power_loss:
        # What lies behind is left from before, and proves nothing until more is appended.
        state["cut_seq"] = end_seq
    if behind:
        healing = []
    if not behind and (not clean or healing):
        await _apply(store, log, until, volumes, healing, before, only_healing=clean)
    for volume in volumes:
        for facet in volume.facets:
            if facet.failed is None:
                facet.written_seq = max(until, log.ring.tail_seq - 1)
                # Redo may have brought back older versions of blocks: nothing counts as synced
                # (O23).
                redone = records and (not clean or facet in healing)
                facet.synced_seq = log.ring.tail_seq - 1 if redone else facet.written_seq
                if facet in healing or (power_loss and facet.in_service):
                    await _sync(store, volume, facet)
    _trust_again(store, [facet for facet in healing if facet.failed is None])
    _note_failed(store, volumes)
    known = 0 if volatile else max(behind, int(state.get("end_seq" if clean else "durable_seq", 0)))
    return Recovered(
        clean=clean,
        power_loss=power_loss,
        records=records,
        end_seq=end_seq,
        lost=max(0, known - end_seq),
        timeline=timeline,
        healed=tuple(facet.path for facet in healing),
    )


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
    cursor = Cursor(log.ring.tail_seq)
    while cursor.seq <= until:
        for record in (await log.read(cursor)).parsed():
            if record.seq > until:
                return
            if not only_healing:
                await before(record)
            volume = volumes[record.volume]
            facets = [f for f in volume.facets if f in healing and f.failed is None]
            for facet in facets if only_healing else volume.writable() + facets:
                try:
                    await facet.apply(record)
                except OSError as error:
                    failure = facet.fail("redo", error)
                    if not volume.in_service() and not _followed(store):
                        raise failure from error


async def _sync(store: Store, volume: Volume, facet: LocalFacet) -> None:
    """Raises DiskFailed if the volume has no other facet, and no remote to stand in."""
    try:
        await facet.sync()
    except DiskFailed:
        if not volume.in_service() and not _followed(store):
            raise


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


def _healing(store: Store, volumes: list[Volume], tail_seq: int) -> list[LocalFacet]:
    """The failed facets for which the log holds everything since their last sync."""
    entries = {
        entry["path"]: entry
        for entry in _entries(store)
        if not entry.get("tracking") and not entry.get("offline")
    }

    def held(facet: LocalFacet) -> bool:
        entry = entries.get(facet.path, {})
        synced = entry.get("since")
        if synced is None or synced + 1 < tail_seq:
            return False
        # Another file in its place has not what the log is added to.
        return entry.get("identity") in (None, facet.file.identity())

    facets = (facet for volume in volumes for facet in volume.facets)
    return [facet for facet in facets if facet.is_open and not facet.writable and held(facet)]


def _trust_again(store: Store, healed: list[LocalFacet]) -> None:
    paths = [facet.path for facet in healed]
    for facet in healed:
        facet.state = FacetState.SYNCHRONISED
        facet.writable, facet.kept_seq = True, None
    for entry in _entries(store):
        if entry["path"] in paths:
            entry.update(state=FacetState.SYNCHRONISED.value, since=None)


def note_fork(store: Store, recovered: Recovered) -> None:
    """Remembers where a power loss, or damage, ended the epoch; the caller saves (O10)."""
    if recovered.power_loss or recovered.lost or store.damaged:
        store.state["forks"].append([store.state["epoch"], recovered.end_seq])


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


async def level(
    volumes: list[Volume], ranges: list[tuple[Volume, int, int]], healed: tuple[str, ...]
) -> None:
    """Makes the facets of each volume equal in the ranges, durably: writes that the log lost may
    have reached one facet and not another, and a read must not depend on which one serves it.

    One that was healed is not what others are made equal to: a write that it failed in the middle
    of may be in it in part, and not in the log."""
    for volume, offset, length in ranges:
        facets = sorted(volume.in_service(), key=lambda facet: facet.path in healed)
        if len(facets) < 2:
            continue
        for at in range(offset, offset + length, LEVEL_BYTES):
            size = min(LEVEL_BYTES, offset + length - at)
            for first, other in ((facets[0], other) for other in facets[1:]):
                data = await first.read(at, size)
                if await other.read(at, size) != data:
                    other.pwrite(at, data)
    for volume in volumes:
        if ranges and len(volume.in_service()) > 1:
            for facet in volume.in_service():
                await facet.sync()


def facet_state(word: str) -> FacetState:
    """A facet's durable state (M6); anything unknown is not trusted."""
    try:
        return FacetState(word)
    except ValueError:
        raise DiskFailed(f"unknown facet state {word!r} in the superblock") from None


def open_volumes(disk: Disk, store: Store) -> list[Volume]:
    """The volumes with their facets, as the superblock names them.

    A facet that cannot be opened is out of service, and nothing is known of its content, if
    another one is in service; else StateError or OSError says why it cannot be."""
    volumes = []
    for index, saved in enumerate(store.state["volumes"]):
        facets: list[LocalFacet] = []
        failures: list[Exception] = []
        for entry in saved["facets"]:
            state = facet_state(entry["state"])
            try:
                facet = LocalFacet.open(disk, entry["path"], saved["size"], state)
            except (StateError, OSError) as error:
                failures.append(error)
                facet = _absent(entry, saved["size"], str(error))
            if state is FacetState.NOT_SYNCHRONISED and not entry.get("tracking"):
                facet.kept_seq = entry.get("since")
            facet.writable = facet.is_open and state is not FacetState.NOT_SYNCHRONISED
            facets.append(facet)
        served = any(facet.in_service for facet in facets) or _followed(store)
        if failures and not served:
            raise failures[0]
        volumes.append(
            Volume(index, saved["name"], saved["uuid"], saved["size"], saved["region_size"], facets)
        )
    return volumes


def _followed(store: Store) -> bool:
    """Whether a remote had all that was written, or gets it from the log: it can be read (M11)."""
    return any(
        facts["initialised"] and facts["consistent"] and not facts["tracking"]
        for facts in store.state["remotes"].values()
    )


def _absent(entry: dict[str, Any], size: int, why: str) -> LocalFacet:
    """A facet that cannot be opened. One that was trusted must be compared when it is back: it may
    be another disk then."""
    if entry["state"] != FacetState.NOT_SYNCHRONISED.value:
        entry.update(
            state=FacetState.NOT_SYNCHRONISED.value,
            since=None,
            tracking=True,
            fill=True,
            compare=True,
            why=why,
        )
    return LocalFacet(None, entry["path"], size, FacetState.NOT_SYNCHRONISED)
