"""A secondary's facets of a volume are one: every write goes to all, and what one of them lacks is
had from the primary.

One that fails ends the node (``engine.secondary``), and the primary tracks what follows. One that
the next start cannot trust, because an empty or another file lies in its place, takes part again
from there on: the primary compares everything with all of them, and sends what any of them lacks.
Until that is through, over restarts, only the others are read. One that is missing keeps the node
from starting: its disk may only not be mounted, and nobody wants its content beside the mount.
"""

from __future__ import annotations

from typing import Any

from nbdmirror.engine.facet import FacetState, LocalFacet, make_facet, open_facet
from nbdmirror.engine.log import Log
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import StateError
from nbdmirror.ports import Disk


async def rejoin(disk: Disk, store: Store, volumes: list[Volume], log: Log) -> list[str]:
    """The paths of the facets that are to be compared; the caller saves. StateError says why one
    cannot be had."""
    found = []
    for volume, saved in zip(volumes, store.state["volumes"], strict=True):
        for facet, entry in zip(volume.facets, saved["facets"], strict=True):
            if not facet.in_service and not _goes_on(facet, entry):
                facet.close()
                if not disk.exists(facet.path):
                    raise StateError(
                        f"the facet {facet.path} is missing",
                        hint="mount its disk; on a new one make an empty file: it will be filled",
                    )
                try:
                    await make_facet(disk, facet.path, volume.size, grow=False)
                    facet.attach(open_facet(disk, facet.path, volume.size))
                    await facet.forget()
                except OSError as error:
                    raise StateError(
                        f"the facet {facet.path} cannot be had: {error.strerror or error}",
                        hint="mount its disk, or put another one there: it will be compared",
                    ) from error
                facet.state, facet.writable = FacetState.BEING_SYNCHRONISED, True
                facet.written_seq = facet.synced_seq = log.next_seq - 1
                facet.kept_seq = None
                entry.update(since=None, tracking=False, fill=False)
                found.append(facet.path)
            entry.update(state=facet.state.value, identity=facet.file.identity())
    return found


def _goes_on(facet: LocalFacet, entry: dict[str, Any]) -> bool:
    """Whether the primary knows already that it is new: what it lacks is marked there."""
    found = facet.file.identity() if facet.state is FacetState.BEING_SYNCHRONISED else ""
    return bool(found) and entry.get("identity") == found


def altered(state: dict[str, Any]) -> dict[str, bool]:
    """What a node says of its state in WELCOME: whether it is what the primary made it."""
    found = {key: bool(state.get(key)) for key in ("altered", "rejoined", "damaged")}
    only_new = found == {"altered": False, "rejoined": True, "damaged": False}
    return {**found, "altered": any(found.values()), "patient": only_new}


def trust(store: Store, volumes: list[Volume]) -> None:
    """All were compared: whoever saves next makes that durable. Nothing, while that is put off."""
    if store.state.get("rejoined"):
        return
    for volume, saved in zip(volumes, store.state["volumes"], strict=True):
        for facet, entry in zip(volume.facets, saved["facets"], strict=True):
            facet.state = FacetState.SYNCHRONISED
            entry.update(state=facet.state.value, compare=False, why=None)
