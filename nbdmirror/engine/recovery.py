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

from dataclasses import dataclass

from nbdmirror.codec import record as codec
from nbdmirror.core.active import volume_extent
from nbdmirror.engine.activemap import ActiveMapFile
from nbdmirror.engine.facet import FacetState
from nbdmirror.engine.log import Log
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed


@dataclass(frozen=True, slots=True)
class Recovered:
    """What recovery found."""

    clean: bool
    power_loss: bool
    records: int
    end_seq: int
    times: list[tuple[int, int]]
    """(seq, time) of the records in the log, for lag in seconds."""


async def redo(store: Store, log: Log, volumes: list[Volume], boot_id: str) -> Recovered:
    """Brings the facets to the end of the log. On return everything that will be relied on is
    durable; the superblock is not changed but for failed facets."""
    state = store.state
    clean = bool(state["clean"])
    power_loss = not clean and state["boot_id"] != boot_id
    forks = [(int(epoch), int(end)) for epoch, end in state["forks"]]
    times: list[tuple[int, int]] = []
    records = 0
    limit = (state.get("apply") or {}).get("limit")
    for record in log.scan(forks, int(state["epoch"])):
        records += 1
        times.append((record.seq, record.time_ns))
        # A secondary whose applying is held back comes back to exactly that point (V8).
        if not clean and (limit is None or record.seq <= limit):
            await _apply(volumes[record.volume], record)
    end_seq = log.next_seq - 1
    for volume in volumes:
        for facet in volume.facets:
            facet.written_seq = end_seq
            # Redo may have brought back older versions of blocks: nothing counts as synced (O23).
            facet.synced_seq = log.ring.tail_seq - 1 if records and not clean else end_seq
    if clean:
        log.durable_seq = end_seq
    elif power_loss:
        await log.sync(end_seq)
        for volume in volumes:
            for facet in volume.in_service():
                await facet.sync()
    return Recovered(clean, power_loss, records, end_seq, times)


async def _apply(volume: Volume, record: codec.Record) -> None:
    for facet in volume.in_service():
        try:
            await facet.apply(record)
        except OSError as error:
            raise facet.fail("redo", error) from error


def note_fork(store: Store, recovered: Recovered) -> None:
    """Remembers where a power loss ended the epoch; the caller saves (O10)."""
    if recovered.power_loss:
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


def facet_state(word: str) -> FacetState:
    """A facet's durable state (M6); anything unknown is not trusted."""
    try:
        return FacetState(word)
    except ValueError:
        raise DiskFailed(f"unknown facet state {word!r} in the superblock") from None
