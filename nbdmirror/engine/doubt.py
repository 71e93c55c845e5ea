"""After a crash of the primary: what may differ goes into the maps of all who may lack it."""

from __future__ import annotations

from nbdmirror.codec.record import MARK, Record
from nbdmirror.engine.activemap import ActiveMapFile
from nbdmirror.engine.facets import Facets
from nbdmirror.engine.log import Cursor, Log
from nbdmirror.engine.recovery import Recovered, doubtful_ranges, level, write_anew
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume


async def mark_doubtful(
    store: Store,
    remotes: list[Remote],
    facets: Facets,
    recovered: Recovered,
    active: ActiveMapFile,
) -> None:
    """At start, before anything is served; nothing at all after a clean stop."""
    group = facets.group
    # What a damaged log lost is in the facets, perhaps not in all, and in the page cache only.
    uncertain = recovered.in_doubt or recovered.lost
    doubtful = doubtful_ranges(active, group.volumes) if uncertain else []
    if recovered.ahead or recovered.volatile or recovered.lost:
        await write_anew(store, group.volumes, doubtful)
    await level(store, group.volumes, doubtful, recovered.healed)
    copied = store.copied and not recovered.clean
    if copied:
        # From when it ran, it may be: what it did since is in none of these maps (fault 28).
        doubtful = [(volume, 0, volume.size) for volume in group.volumes]
    lost = None
    if recovered.lost:
        lost = f"the log lost {recovered.lost} records: it was damaged"
    elif store.damaged is not None:
        lost = f"the superblock may be out of date: {store.damaged}"
    await facets.recover(recovered.clean, doubtful, lost, spilled=recovered.memory_lost)
    ahead = recovered.ahead and any(volume.in_service() for volume in group.volumes)
    pending = []
    if ahead or any(remote.tracking for remote in remotes):
        pending = await _pending(group.log)
    if ahead and (doubtful or any(record.kind != MARK for record in pending)):
        # Nothing of before is sent: the facets may hold more than that, or less, and behind the
        # copy of a region it would set that back. Where there is nothing to mark either, the log
        # goes on.
        for remote in remotes:
            remote.leave_log()
    leaders = {
        volume.index: _leader(remotes, volume)
        for volume in group.volumes
        if not volume.in_service()
    }
    if recovered.in_doubt:
        for index in leaders:
            # It may have what the log lost: nothing older is to come over that.
            store.state["volumes"][index]["redo_seq"] = group.log.next_seq - 1
    if lost is not None:
        doubtful = [(volume, 0, volume.size) for volume in group.volumes]
    cause = "the primary lost power" if recovered.power_loss else "the primary's process died"
    cause = "the primary was copied while it ran, or since it died" if copied else cause
    for remote in remotes:
        if not recovered.clean:
            for dcm in remote.dcms:
                await dcm.rewrite()
        if remote.tracking:
            # Whether an overflow was finished or not: what the log holds is marked again.
            for record in pending:
                remote.note(record)
        leads = remote in leaders.values() and recovered.whole
        if lost is not None and not leads:
            # Saved with the rest: until all is in the maps, another start must have the same doubt.
            await remote.fill(lost, save=False)
        else:
            # With a whole log a leader has all of what it leads, whatever else is in doubt; and
            # that marked, nobody would have it any more (M11).
            differing = [one for one in doubtful if leaders.get(one[0].index) is not remote]
            _compare(remote, differing, recovered.end_seq, lost, cause)
        remote.save_defaults()
        await remote.sync_maps()


def _leader(remotes: list[Remote], volume: Volume) -> Remote | None:
    """Where no local facet is left, one remote is the truth that the others are compared with: each
    that follows has what was promised, and one that may be gone for good would take the others
    along (I2, M11)."""
    following = [remote for remote in remotes if remote.follows(volume)]
    there = [one for one in following if not (one.facts.get("away") or one.facts["paused"])]
    return next(iter([*there, *following]), None)


def _compare(
    remote: Remote,
    differing: list[tuple[Volume, int, int]],
    end_seq: int,
    lost: str | None,
    cause: str,
) -> None:
    """Marks what may differ on a remote, and has that compared; the caller saves."""
    for volume, offset, length in differing:
        remote.mark(volume.index, offset, length)
    if differing or lost is not None:
        # Records past the end are not in the history: the remote may be set back to there.
        remote.facts["base_seq"] = min(remote.facts["base_seq"], end_seq)
        remote.doubt(lost or remote.facts["why"] or cause)


async def _pending(log: Log) -> list[Record]:
    """What is in the log, without the data that the records carry."""
    cursor, found = Cursor(log.ring.tail_seq), []
    while cursor.seq < log.next_seq:
        for record in (await log.read(cursor)).parsed():
            found.append(record if record.kind == MARK else record._replace(payload=None))
    return found
