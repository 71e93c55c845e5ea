"""What a node's superblock says of its volumes, held against the configuration, and opened."""

from __future__ import annotations

from nbdmirror.config import Config
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.recovery import facet_state
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import StateError
from nbdmirror.ports import Disk


def check_state(store: Store, config: Config) -> None:
    """The state must be that of the configuration; StateError names both values."""
    state = store.state
    fixed: tuple[tuple[str, str | int], ...] = (
        ("group", config.group),
        ("node", config.node),
        ("extent_size", config.log.extent_size),
    )
    for key, wanted in fixed:
        if state[key] != wanted:
            raise StateError(
                f"{config.state_dir} holds {key} {state[key]!r}, the configuration says {wanted!r}",
                hint="point state_dir to the right directory, or restore the value",
            )
    kept = [(v["name"], v["size"], v["region_size"]) for v in state["volumes"]]
    wanted_volumes = [(v.name, v.size, v.region_size) for v in config.volumes]
    if kept != wanted_volumes:
        raise StateError(
            f"{config.state_dir} holds volumes {kept}, the configuration says "
            f"{wanted_volumes} (name, size, region_size)",
            hint="volumes cannot be changed in the configuration of an existing node",
        )


def open_volumes(disk: Disk, store: Store) -> list[Volume]:
    """The volumes with their facets; StateError if a facet is missing or too small."""
    volumes = []
    for index, saved in enumerate(store.state["volumes"]):
        facets = []
        for facet in saved["facets"]:
            state = facet_state(facet["state"])
            facets.append(LocalFacet.open(disk, facet["path"], saved["size"], state))
        name, uuid, region_size = saved["name"], saved["uuid"], saved["region_size"]
        volumes.append(Volume(index, name, uuid, saved["size"], region_size, facets))
    return volumes
