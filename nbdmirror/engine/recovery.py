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

from nbdmirror.codec.record import MARK, Record
from nbdmirror.core.active import volume_extent
from nbdmirror.core.timeline import Timeline
from nbdmirror.engine.activemap import ActiveMapFile
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.log import Cursor, Log
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed

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
    awaited before each record: snapshots may need what it overwrites.

    A facet that failed is brought back too, if the log still holds all that it had not synced
    then: its disk is tried again, and what the page cache may have lost is written anew (O16)."""
    state = store.state
    clean = bool(state["clean"])
    # A failed sync of the log may have cost as much of it as a power loss (O16).
    power_loss = not clean and (state["boot_id"] != boot_id or bool(state.get("log_failed")))
    forks = [(int(epoch), int(end)) for epoch, end in state["forks"]]
    healing = _healing(store, volumes, log.ring.tail_seq)
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
    behind = 0 if power_loss else log.seq_behind(forks)
    if not behind and (not clean or healing):
        await _apply(log, until, volumes, healing, before, only_healing=clean)
    for volume in volumes:
        for facet in volume.facets:
            facet.written_seq = max(until, log.ring.tail_seq - 1)
            # Redo may have brought back older versions of blocks: nothing counts as synced (O23).
            redone = records and (not clean or facet in healing)
            facet.synced_seq = log.ring.tail_seq - 1 if redone else facet.written_seq
            if facet in healing or (power_loss and facet.in_service):
                await facet.sync()
    _trust_again(store, healing)
    known = max(behind, int(state.get("end_seq" if clean else "durable_seq", 0)))
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
            facets = [facet for facet in volume.facets if facet in healing]
            for facet in facets if only_healing else volume.in_service() + facets:
                try:
                    await facet.apply(record)
                except OSError as error:
                    raise facet.fail("redo", error) from error


async def pending(log: Log) -> list[tuple[int, int, int]]:
    """(volume, offset, length) of every change that the log holds."""
    cursor, found = Cursor(log.ring.tail_seq), []
    while cursor.seq < log.next_seq:
        for record in (await log.read(cursor)).parsed():
            if record.kind != MARK:
                found.append((record.volume, record.offset, record.length))
    return found


def _entries(store: Store) -> Iterator[dict[str, Any]]:
    for volume in store.state["volumes"]:
        yield from volume["facets"]


def _healing(store: Store, volumes: list[Volume], tail_seq: int) -> list[LocalFacet]:
    """The failed facets for which the log holds everything since their last sync."""
    since = {entry["path"]: entry.get("since") for entry in _entries(store)}

    def held(facet: LocalFacet) -> bool:
        synced = since.get(facet.path)
        return synced is not None and synced + 1 >= tail_seq

    facets = (facet for volume in volumes for facet in volume.facets)
    return [facet for facet in facets if not facet.in_service and held(facet)]


def _trust_again(store: Store, healed: list[LocalFacet]) -> None:
    paths = [facet.path for facet in healed]
    for facet in healed:
        facet.state = FacetState.SYNCHRONISED
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


async def level(volumes: list[Volume], ranges: list[tuple[Volume, int, int]]) -> None:
    """Makes the facets of each volume equal in the ranges, durably: writes that the log lost may
    have reached one facet and not another, and a read must not depend on which one serves it."""
    for volume, offset, length in ranges:
        facets = volume.in_service()
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
