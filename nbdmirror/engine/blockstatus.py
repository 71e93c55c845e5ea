"""What a block status says of a range, for each meta context that the client selected."""

from __future__ import annotations

from collections.abc import Iterable

from nbdmirror.codec import nbd
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.volume import Volume

ALLOCATION_CONTEXT = "base:allocation"
DIRTY_CONTEXT = "nbdmirror:dirty:"
BLOCK_STATUS_EXTENTS_MAX = 4096


async def block_status(
    volume: Volume, contexts: Iterable[str], remotes: Iterable[Remote], offset: int, length: int
) -> dict[str, list[tuple[int, int]]]:
    """Context: (length, flags) of pieces from the range's beginning on; bounded, so they may end
    before it does."""
    result = {}
    for context in contexts:
        if context == ALLOCATION_CONTEXT:
            pieces = volume.pieces(offset, length, BLOCK_STATUS_EXTENTS_MAX)
            flag = nbd.STATE_HOLE | nbd.STATE_ZERO
        else:
            name = context.removeprefix(DIRTY_CONTEXT)
            remote = next((r for r in remotes if r.name == name), None)
            if remote is None:  # removed since: all of it is what the remote lacks
                pieces = [(offset, length, True)]
            else:
                pieces = await remote.lacking(volume.index, offset, length)
            flag = 1
        pieces = pieces[:BLOCK_STATUS_EXTENTS_MAX]
        result[context] = [(length, flag if on else 0) for _, length, on in pieces]
    return result
