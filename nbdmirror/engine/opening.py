"""The volumes of a node that starts, with their facets as the superblock names them.

Decides which of the files that lie there now are the ones that it speaks of, and may be trusted.
"""

from __future__ import annotations

from typing import Any

from nbdmirror.engine.facet import FacetState, LocalFacet
from nbdmirror.engine.remote import may_follow
from nbdmirror.engine.store import Store, same_inode
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import DiskFailed, StateError, refuse_shortage
from nbdmirror.ports import Disk


def facet_state(word: str) -> FacetState:
    """A facet's durable state (M6); anything unknown is not trusted."""
    try:
        return FacetState(word)
    except ValueError:
        raise DiskFailed(f"unknown facet state {word!r} in the superblock") from None


def open_volumes(disk: Disk, store: Store) -> list[Volume]:
    """The volumes with their facets, as the superblock names them.

    A facet that cannot be opened is out of service, and nothing is known of its content, if
    another one is in service; else StateError or OSError says why it cannot be."""
    volumes = []
    for index, saved in enumerate(store.state["volumes"]):
        followed = is_followed(store, index)
        facets: list[LocalFacet] = []
        failures: list[Exception] = []
        in_use: BlockingIOError | None = None
        for entry in saved["facets"]:
            state = facet_state(entry["state"])
            if state is FacetState.BEING_SYNCHRONISED and store.state["role"] == "primary":
                # Its map and the log say what it lacks, also of what is in the page cache only: it
                # returns as after any other absence, and no start waits for its disk (O16, I8).
                state = FacetState.NOT_SYNCHRONISED
                entry["state"] = state.value
            try:
                facet = LocalFacet.open(disk, entry["path"], saved["size"], state)
            except (StateError, OSError) as error:
                refuse_shortage(error)
                failures.append(error)
                if isinstance(error, BlockingIOError) and state is FacetState.SYNCHRONISED:
                    in_use = error
                facet = _absent(entry, saved["size"], str(error))
            if state is FacetState.NOT_SYNCHRONISED and not entry.get("tracking"):
                facet.kept_seq = entry.get("since")
            facet.writable = facet.is_open and state is not FacetState.NOT_SYNCHRONISED
            facets.append(facet)
        _distrust(store, saved, facets, followed=followed)
        if failures and not any(facet.in_service for facet in facets):
            if in_use is not None:
                raise _in_use(in_use)
            if not followed:
                raise failures[0]
        volumes.append(
            Volume(index, saved["name"], saved["uuid"], saved["size"], saved["region_size"], facets)
        )
    for volume, saved in zip(volumes, store.state["volumes"], strict=True):
        for facet, entry in zip(volume.facets, saved["facets"], strict=True):
            if facet.in_service:
                entry["identity"] = facet.file.identity()
    return volumes


def _in_use(error: BlockingIOError) -> StateError:
    """Somebody else has it, and may write to it: then nobody stands in for it."""
    return StateError(
        f"the facet {error.filename} is in use: {error.strerror}",
        hint="stop what uses it (another node, a mount), or give each facet a file of its own",
    )


def _distrust(
    store: Store, saved: dict[str, Any], facets: list[LocalFacet], *, followed: bool
) -> None:
    """Another file in the place of a facet is not what that one was (I5): others, or a remote,
    stand in for it. StateError where nobody can: it would be served on a guess, and sent to who has
    more than it; or where it is what another facet of the node was: nothing is lost then, and what
    it is compared with would take the place of what it holds."""
    known = {entry["path"]: entry.get("identity") for entry in saved["facets"]}
    served = [facet for facet in facets if facet.in_service]
    strange = [
        facet
        for facet in served
        if known[facet.path] and facet.file.identity() not in ("", known[facet.path])
    ]
    _refuse_exchanged(store, strange, facets)
    if strange and len(strange) == len(served):
        if store.copied or any(same_inode(f.file.identity(), known[f.path]) for f in strange):
            return  # all of the node came here from elsewhere, or its disks are numbered anew
        primary = store.state["role"] == "primary"
        if not primary and store.state["upstream"] is None:
            return  # it holds nothing yet
        if not primary or not followed:
            _refuse_strangers(strange, saved["name"], store.state["role"])
    for at, facet in enumerate(facets):
        if facet in strange:
            facet.close()
            why = f"another file lies at {facet.path}"
            facets[at] = _absent(saved["facets"][at], saved["size"], why)


def _refuse_exchanged(store: Store, strange: list[LocalFacet], facets: list[LocalFacet]) -> None:
    entries = [entry for volume in store.state["volumes"] for entry in volume["facets"]]
    paths = {entry["identity"]: entry["path"] for entry in entries if entry.get("identity")}
    for facet in strange:
        former = paths.get(facet.file.identity())
        if former is None:
            continue
        for one in facets:
            one.close()
        raise StateError(
            f"what lies at {facet.path} is the facet that was at {former}",
            hint="put each back in its place; disks whose names change with a boot are named in "
            "the configuration as under /dev/disk/by-id",
        )


def _refuse_strangers(strange: list[LocalFacet], volume: str, role: str) -> None:
    for facet in strange:
        facet.close()
    then = "is compared with the primary's" if role == "secondary" else "counts as it is"
    raise StateError(
        f"another file lies at {strange[0].path} than the one that this node wrote to, and nobody "
        f"here has volume {volume} otherwise",
        hint="mount the disk of that one, or put it back; what lies there now "
        f"{then} after: nbdmirror create CONFIG --role {role} --force",
    )


def is_followed(store: Store, index: int) -> bool:
    """Whether a remote had all that was written to a volume, or gets it from the log: it can be
    read (M11). What the log had in memory only, it does not get: then it may lack what a facet had
    that was still in service."""
    state = store.state
    volume = state["volumes"][index]
    in_memory = state.get("log_spill") or state.get("log_volatile")
    if in_memory and not state["clean"]:
        served = FacetState.SYNCHRONISED.value
        if any(entry["state"] == served or entry.get("last") for entry in volume["facets"]):
            return False
    return any(may_follow(facts, volume["name"]) for facts in state["remotes"].values())


def _absent(entry: dict[str, Any], size: int, why: str) -> LocalFacet:
    """A facet that cannot be opened. One that was trusted must be compared when it is back: it may
    be another disk then."""
    if entry["state"] != FacetState.NOT_SYNCHRONISED.value:
        entry.update(
            state=FacetState.NOT_SYNCHRONISED.value,
            since=None,
            tracking=True,
            fill=True,
            compare=True,
            why=why,
        )
    return LocalFacet(None, entry["path"], size, FacetState.NOT_SYNCHRONISED)
