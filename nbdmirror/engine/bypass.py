"""The one entry point for changes that go by the write path (V11, V13).

Whoever changes a volume beside the log (a restore, an import into a facet) does it within
``bypass``: remotes are out of the log, the volumes stand still, and on the way in the regions are
in every DCM, durably, and a mark stands in the log, so that what the group is after each seq stays
one thing (V4). Afterwards the marked regions are replicated unordered, by a resync, and write order
resumes by itself; replication is not stopped for it, and only what is marked travels.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from nbdmirror.codec.mark import Mark
from nbdmirror.core.dcm import Dcm
from nbdmirror.core.propagation import Link, Step, decide
from nbdmirror.errors import Refused

if TYPE_CHECKING:
    from nbdmirror.engine.facets import Facets
    from nbdmirror.engine.primary import Primary
    from nbdmirror.engine.remote import Remote


class Bypass:
    """An open bypass: the volumes are locked, no remote reads the log."""

    def __init__(self, primary: Primary, facets: Facets) -> None:
        self._primary = primary
        self._facets = facets

    async def commit(self, mark: Mark, maps: Mapping[int, Dcm]) -> int:
        """Marks the regions of ``maps`` {volume index: regions} in every DCM, and the point in the
        log; all durable. Returns its seq. What follows must be made durable by the caller."""
        for remote in self._primary.remotes:
            await remote.merge(maps)
        for index, regions in maps.items():
            size = self._facets.group.volumes[index].region_size
            ranges = [(first * size, count * size) for first, count in regions.runs()]
            await note_beside(self._facets, index, ranges)
        return await self._primary.group.put_mark(mark)


async def relieve_log(facets: Facets) -> None:
    """Local facets that are out of service have what they lack in their maps, not in the log, but
    for a volume's last one."""
    for member in list(facets.members):
        if not member.facet.writable and facets.has_source(member.volume):
            await member.to_map()


async def note_beside(facets: Facets, volume: int, ranges: Iterable[tuple[int, int]]) -> None:
    """(offset, length) ranges of a volume were, or are about to be, changed beside the log: local
    facets that are out of service lack them too, and their maps say so, durably."""
    ranges = list(ranges)
    for member in list(facets.members):
        if member.volume.index != volume or member.facet.writable:
            continue
        if facets.has_source(member.volume):
            await member.to_map()
            for offset, length in ranges:
                member.mark(volume, offset, min(length, member.volume.size - offset))
            await member.sync_map()


@asynccontextmanager
async def changing_beside(
    facets: Facets, volume: int, ranges: list[tuple[int, int]]
) -> AsyncIterator[None]:
    """Within, ranges of a volume are changed beside the log in all facets that take writes. One
    that leaves meanwhile lacks them, whether it is still out of service at the end or back."""
    facets.beside[volume] = ranges
    try:
        await note_beside(facets, volume, ranges)  # one that is about to join has looked
        yield
        await note_beside(facets, volume, ranges)
    finally:
        del facets.beside[volume]


@asynccontextmanager
async def bypass(
    primary: Primary, facets: Facets, volumes: list[int], why: str, *, force: bool
) -> AsyncIterator[Bypass]:
    """Takes the remotes out of the log and locks the volumes; Refused says why they may not be
    (V14, M11), before anything is done."""
    async with primary.roster:
        steps = check_remotes(primary, force=force)
        held = list(primary.remotes)
        try:
            for remote in held:
                remote.hold()
            for remote in held:
                await remote.released()
                primary.check_leaning()  # a facet may have been lost meanwhile
                if not remote.tracking and steps.get(remote.name) is Step.FULL:
                    await remote.fill(why)
                else:
                    await remote.overflow(why)  # or what is left of one that has begun
            await relieve_log(facets)
            async with AsyncExitStack() as stack:
                for index in volumes:
                    volume = primary.group.volumes[index]
                    await stack.enter_async_context(volume.locked(0, volume.size, exclusive=True))
                yield Bypass(primary, facets)
        finally:
            for remote in held:
                remote.go_on()


def check_remotes(primary: Primary, *, force: bool) -> dict[str, Step]:
    """What is to become of each remote; Refused names one that may not be taken out of the log, or
    the volume for which they may not be all."""
    primary.check_leaning()
    steps = {remote.name: _decide(primary, remote, force=force) for remote in primary.remotes}
    for name, step in steps.items():
        if step is Step.REFUSE:
            raise Refused(
                f'changes are not tracked for remote {name}: on_full is "block", so it never '
                "goes to DCM logging",
                hint="--force compares everything with it afterwards",
            )
    return steps


def _decide(primary: Primary, remote: Remote, *, force: bool) -> Step:
    link = Link(
        active=bool(remote.facts["initialised"]) and not remote.facts["full"],
        tracking=remote.tracking,
        trackable=primary.on_full != "block",
        pending=primary.group.log.next_seq - 1 - remote.durable_seq,
    )
    return decide(link, force=force)
