"""The facet that somebody wrote to beside the volume, until what was written is taken in (V13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdmirror.errors import Refused, UsageError

if TYPE_CHECKING:
    from nbdmirror.engine.volume import Volume


class Edit:
    """One facet, as it was when the edit was told of. No other one stands in for it: by that one's
    content the edit would be undone, and be said to be taken in. Nor does the facet itself, once it
    has left service and come back: it was made equal to the others."""

    def __init__(self, volume: Volume, path: str | None) -> None:
        """The facet of this path, or the first. UsageError if there is none, Refused if it is not
        in service."""
        for facet in volume.facets:
            if path in (None, facet.path):
                break
        else:
            paths = ", ".join(facet.path for facet in volume.facets)
            raise UsageError(f"volume {volume.name} has no facet {path} (facets: {paths})")
        if not facet.in_service:
            raise Refused(
                f"facet {facet.path} is not in service: what was written to it is not the volume's",
                hint="write it to a facet in service, or bring that one back first: facet online",
            )
        self.facet = facet
        self._stint = facet.stint

    def check(self) -> None:
        """Refused unless it has been in service all the time."""
        if not (self.facet.in_service and self.facet.stint == self._stint):
            raise Refused(
                f"facet {self.facet.path} has left service: what was written to it may be gone",
                hint="write it again, to a facet in service, and say so again",
            )
