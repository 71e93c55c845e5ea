"""How a volume's last facet comes back from the log alone, while the node runs.

As at a start: what the log holds after its last sync is written anew, for the page cache may have
lost it (O16). ``engine.facets`` calls it, and makes all of it durable before the facet is trusted
(O5).
"""

from __future__ import annotations

from nbdmirror.codec.record import MARK
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.log import Cursor, Log


async def redo(facet: LocalFacet, log: Log, volume: int) -> None:
    """Brings an open facet of the volume with that index to the log's head. In the step in which
    this returns it takes every write, and most of what it got is durable: flushes sync the facet
    from then on, and are not to wait for all of it. It is trusted when the caller has made durable
    the rest, and then that it is back: what is flushed by its sync alone would else be lost, where
    the log is in memory (M13). DiskFailed or OSError if its disk refuses."""
    assert facet.kept_seq is not None
    cursor = Cursor(facet.kept_seq + 1)
    await _carry(cursor, facet, log, volume)
    await facet.sync()
    await _carry(cursor, facet, log, volume)
    facet.written_seq = log.next_seq - 1
    facet.kept_seq = None
    facet.writable = True
    facet.state = FacetState.BEING_SYNCHRONISED


async def _carry(cursor: Cursor, facet: LocalFacet, log: Log, volume: int) -> None:
    """Returns, within the same step, when all records are in the facet."""
    while cursor.seq < log.next_seq:
        for record in (await log.read(cursor)).parsed():
            if record.volume == volume and record.kind != MARK:
                await facet.apply(record)
