"""Whether a node's state and its configuration agree, and what of a change a start takes over.

The superblock says what the node is, the file what a person wants. What commands change at run time
(facets, the log's place) stays, whatever the file says; so the superblock keeps what the file said
when it was last agreed with, and it is a change to that which counts:

    configured   of the superblock: ``state_dir``; log, ``log.path``, and snapshots,
                 ``snapshots.path``, or null; of each volume: its facets' paths

A file that was only moved is followed. Anything else is refused: a node would go on with files that
nobody means any more, those of the node that it was copied from among them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nbdmirror.config import Config
from nbdmirror.engine.create import log_path, snapshot_directory
from nbdmirror.errors import StateError
from nbdmirror.ports import Disk

State = dict[str, Any]


def agree(disk: Disk, state: State, config: Config, *, copied: bool) -> None:
    """Takes over into the state of a superblock what may be; the caller saves. ``copied``: that was
    copied here, and what it names may have been too. StateError names both values, and says what
    would be right; the state is good for nothing then."""
    _check_node(state, config)
    _check_volumes(state, config)
    for saved, volume in zip(state["volumes"], config.volumes, strict=True):
        _agree_facets(disk, state, saved, volume.facets, copied=copied)
    _agree_places(disk, state, config, copied=copied)


def objection(disk: Disk, state: State, config: Config) -> str | None:
    """Why a start would refuse this configuration of a node that runs, if it would."""
    try:
        agree(disk, copy.deepcopy(state), config, copied=False)
    except StateError as error:
        return str(error)
    return None


def _check_node(state: State, config: Config) -> None:
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


def _check_volumes(state: State, config: Config) -> None:
    kept = [(v["name"], v["size"], v["region_size"]) for v in state["volumes"]]
    wanted = [(v.name, v.size, v.region_size) for v in config.volumes]
    if kept != wanted:
        raise StateError(
            f"{config.state_dir} holds volumes {kept}, the configuration says {wanted} "
            "(name, size, region_size)",
            hint="restore them, in this order; other volumes need another node, or this one anew, "
            f"here and on its peers: nbdmirror create CONFIG --role {state['role']} --force",
        )


def _agree_facets(
    disk: Disk, state: State, saved: State, wanted: Sequence[str], *, copied: bool
) -> None:
    entries = saved["facets"]
    paths = [entry["path"] for entry in entries]
    known = saved.get("configured", list(wanted))
    if sorted(wanted) not in (sorted(known), sorted(paths)):
        if copied and known == paths and len(wanted) == len(paths):
            moved = dict(zip(paths, wanted, strict=True))
        else:
            moved = _moved(disk, entries, known, wanted)
        for entry in entries:
            entry["path"] = moved.get(entry["path"], entry["path"])
        if {entry["path"] for entry in entries if entry["path"] in known} - {*wanted} or (
            {*wanted} - {*known} - {entry["path"] for entry in entries}
        ):
            raise _other_facets(state, saved["name"], paths, wanted)
    saved["configured"] = list(wanted)


def _moved(
    disk: Disk, entries: Sequence[dict[str, Any]], known: Sequence[str], wanted: Sequence[str]
) -> dict[str, str]:
    """Former path: new one, of the facets that lie where the configuration says now."""
    found = {}
    for path in (path for path in wanted if path not in known):
        for entry in (entry for entry in entries if entry["path"] not in wanted):
            if _is_at(disk, entry.get("identity"), path):
                found[entry["path"]] = path
    return found


def _other_facets(
    state: State, volume: str, paths: Sequence[str], wanted: Sequence[str]
) -> StateError:
    return StateError(
        f"the facets of volume {volume} are {', '.join(paths)}, the configuration says "
        f"{', '.join(wanted)}",
        hint="restore the paths (a file that was moved, not copied, is found); "
        + (
            "a secondary on other disks: nbdmirror create CONFIG --role secondary --force"
            if state["role"] == "secondary"
            else "while the node runs: nbdmirror facet add, remove, replace"
        ),
    )


def _agree_places(disk: Disk, state: State, config: Config, *, copied: bool) -> None:
    known = state.setdefault("configured", {})
    log, snapshots = config.log.path, config.snapshots.path
    _follow_state_dir(state, known.get("state_dir", config.state_dir), config.state_dir)
    if known.get("log", log) != log and not state.get("log_volatile"):
        former = replace(config, log=replace(config.log, path=known["log"]))
        place, wanted = state.get("log_path") or log_path(former), log_path(config)
        # What it lacks, should it be a copy, recovery tells.
        if not _has_moved(disk, place, wanted, copied=copied):
            raise StateError(
                f"the log is {place}, the configuration says {wanted}",
                hint="restore log.path, or move the file, while the node is stopped; while a "
                f"primary runs: nbdmirror log replace {wanted}",
            )
        state["log_path"] = None
    if known.get("snapshots", snapshots) != snapshots and (
        state.get("restore") or any(not one.get("lost") for one in state.get("snapshots", ()))
    ):
        former = replace(config, snapshots=replace(config.snapshots, path=known["snapshots"]))
        place, wanted = snapshot_directory(former), snapshot_directory(config)
        if not _has_moved(disk, place, wanted, copied=copied):
            raise StateError(
                f"the snapshots are in {place}, the configuration says {wanted}",
                hint="restore snapshots.path, or move that directory to the new place while the "
                "node is stopped; without any snapshot the place is free",
            )
    known.update(state_dir=config.state_dir, log=log, snapshots=snapshots)


def _follow_state_dir(state: State, former: str, directory: str) -> None:
    """A log that a command put into the state directory has moved, or was copied, with that."""
    path = state.get("log_path")
    if path is not None and path.startswith(f"{former}/"):
        state["log_path"] = directory + path.removeprefix(former)


def _has_moved(disk: Disk, place: str, wanted: str, *, copied: bool) -> bool:
    """Whether what was at one path is at another one now."""
    return place == wanted or (disk.exists(wanted) and (copied or not disk.exists(place)))


def _is_at(disk: Disk, identity: str | None, path: str) -> bool:
    """Whether the file that this is the identity of lies at a path."""
    if not identity or not disk.exists(path):
        return False
    try:
        file = disk.open(path, read_only=True)
    except OSError:
        return False
    try:
        return file.identity() == identity
    finally:
        file.close()
