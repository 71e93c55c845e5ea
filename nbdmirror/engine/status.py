"""The status document: what a node tells of itself, schema 1 (X4).

Each part tells of itself; nothing here depends on a volume's size (I7).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from nbdmirror import __version__
from nbdmirror.config import uris
from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.spill import NO_SPILL
from nbdmirror.engine.volume import Volume

if TYPE_CHECKING:
    from nbdmirror.engine.node import Node


def status_of(node: Node) -> dict[str, Any]:
    """The whole of it, for a node that has started."""
    state, config = node.store.state, node.config
    result: dict[str, Any] = {
        "schema": 1,
        "group": config.group,
        "node": config.node,
        "role": node.role,
        "version": __version__,
        "uptime_s": round(asyncio.get_running_loop().time() - node.started_at, 1),
        "generation": state["generation"],
        "epoch": state["epoch"],
        "volumes": [_volume(node, volume) for volume in node.volumes],
        "log": {
            "in_memory": bool(state.get("log_volatile")),
            **(node.logkeeper.status() if node.primary is not None else NO_SPILL),
            "on_full": config.log.on_full,
            **node.housekeeper.status(),
        },
        "remotes": node.primary.status() if node.primary else [],
        "snapshots": node.people.brief(),
        "restore": node.restorer.status() if node.restorer else None,
        **node.doors.status(),
    }
    if node.secondary is not None:
        result["upstream"] = node.secondary.status()
    return result


def facets_of(node: Node) -> list[dict[str, Any]]:
    """The facets of all volumes, as in the status, each with its volume."""
    volumes = [_volume(node, volume) for volume in node.volumes]
    return [{"volume": one["name"], **facet} for one in volumes for facet in one["facets"]]


def _volume(node: Node, volume: Volume) -> dict[str, Any]:
    access = next(one.access for one in node.config.volumes if one.name == volume.name)
    return {
        "name": volume.name,
        "uuid": volume.uuid,
        "size": volume.size,
        "region_size": volume.region_size,
        "read_only": access.read_only,
        "clients": volume.clients,
        "clients_max": access.connections_max,
        "uris": uris(node.config, volume.name) if node.primary is not None else [],
        "facets": node.facets.status(volume)
        if node.facets is not None
        else [
            {"path": facet.path, "state": _facet_word(node, facet), "errors": facet.errors}
            for facet in volume.facets
        ],
    }


def _facet_word(node: Node, facet: LocalFacet) -> str:
    if facet.failed is not None:
        return FacetState.NOT_SYNCHRONISED.value
    if node.secondary is not None:
        upstream = node.store.state["upstream"]
        if upstream is None:
            return FacetState.NOT_SYNCHRONISED.value
        if not upstream["consistent"]:
            return FacetState.BEING_SYNCHRONISED.value
    return facet.state.value
