"""Whether facets have kept what somebody copied from them (O16).

A disk may refuse a write long after it was taken, when the kernel writes the page back; who reads
the page then may get what was there before, and only the next sync of the file says that anything
was lost. So a copy of a facet is trusted when the facet was synced after it was read, not sooner.
Asked by ``engine.facetcopy`` and ``engine.resync`` before they are done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nbdmirror.engine.facet import LocalFacet, to_the_end
from nbdmirror.engine.volume import Volume

if TYPE_CHECKING:
    from nbdmirror.engine.group import Group


class Sources:
    """The facets of some volumes, from the moment on that they are read; ``but`` for the one that
    is copied to."""

    def __init__(
        self, group: Group, volumes: Sequence[Volume], *, but: LocalFacet | None = None
    ) -> None:
        self._group = group
        self._volumes = volumes
        self._but = but
        self._failures = {facet: facet.failures for _, facet in self._facets()}

    def in_reach(self, volume: Volume) -> bool:
        """Whether a remote that has all of a volume can be asked now."""
        return self._group.in_reach(volume)

    async def lost(self) -> list[tuple[Volume, LocalFacet]]:
        """The facets that failed since the last time, or do now that they are synced: what was read
        from one of them may lack what it did not have on disk (``LocalFacet.lost_seq``).
        DiskFailed if a volume's last one failed."""
        # To its end: of a facet that it sees fail that has to be noted.
        await to_the_end(asyncio.ensure_future(self._group.sync_facets()))
        failed = []
        for volume, facet in self._facets():
            if facet.failures > self._failures.get(facet, 0):
                failed.append((volume, facet))
            self._failures[facet] = facet.failures
        return failed

    def _facets(self) -> list[tuple[Volume, LocalFacet]]:
        return [(v, f) for v in self._volumes for f in v.facets if f is not self._but]
