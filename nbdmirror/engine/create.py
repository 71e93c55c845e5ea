"""Makes a node's durable state: superblock, log, active map, missing facet files."""

from __future__ import annotations

from typing import Any

from nbdmirror.config import Config
from nbdmirror.engine import activemap, store
from nbdmirror.engine.facet import FacetState, make_facet
from nbdmirror.engine.layer import is_layer
from nbdmirror.engine.log import MAGIC, RING_AT, Log
from nbdmirror.errors import ConfigError, NbdmirrorError, Refused, StateError
from nbdmirror.ports import Env

MARK = "incomplete"
"""A file of this name stands in the state directory until everything in it is durable."""


def log_path(config: Config) -> str:
    """Where the log lies: ``log.path``, or in the state directory."""
    return config.log.path or f"{config.state_dir}/log"


def snapshot_directory(config: Config) -> str:
    """Where the layers of snapshots lie: in the state directory, or in one of the node's own below
    ``snapshots.path``: a start removes layers there that it does not know."""
    if config.snapshots.path is None:
        return f"{config.state_dir}/snapshots"
    return f"{config.snapshots.path}/{config.group}/{config.node}"


def is_created(env: Env, config: Config) -> bool:
    """Whether the state directory holds a node, whole or in part."""
    return env.disk.exists(f"{config.state_dir}/{store.FILE_NAME}") or env.disk.exists(
        f"{config.state_dir}/{MARK}"
    )


async def create(env: Env, config: Config, role: str, *, force: bool = False) -> dict[str, Any]:
    """Makes the state; Refused if there is some already, unless ``force``.

    Returns what was made. Facet files that exist keep their content: a first synchronisation
    compares before it copies (X1)."""
    if role not in ("primary", "secondary"):
        raise ConfigError(f"role {role!r}: it is either primary or secondary")
    disk, directory = env.disk, config.state_dir
    created = is_created(env, config)
    if created and not force:
        raise Refused(
            f"{directory} already holds the state of a node",
            hint=f"--force replaces it: {_lost(env, directory)} is lost",
        )
    try:
        if created:
            _check_unused(env, config)
            if config.log.path is not None:
                _check_log(env, config.log.path)
        disk.make_directory(directory)
        # The mark stands before anything is removed, or a half-removed state were none (O18).
        if not disk.exists(f"{directory}/{MARK}"):
            disk.open(f"{directory}/{MARK}", create=True).close()
        await disk.sync_directory(directory)
        if created:
            _remove(env, config)
        await Log.create(disk, log_path(config), config.log.size)
        await activemap.ActiveMapFile.create(disk, directory, config.log.hot_extents)
        facets = [await _facets(env, volume.facets, volume.size) for volume in config.volumes]
        state = _state(env, config, role, facets)
        (await store.Store.create(disk, directory, state)).close()
        await disk.sync_directory(log_path(config).rpartition("/")[0])
        disk.unlink(f"{directory}/{MARK}")
        await disk.sync_directory(directory)
    except OSError as error:
        raise NbdmirrorError(
            f"cannot create the node in {directory}: {error.strerror or error}"
            + (f" ({error.filename})" if error.filename else ""),
            hint="free space or mend the path, then create again with --force",
        ) from error
    return {
        "group": config.group,
        "node": config.node,
        "role": role,
        "state_dir": directory,
        "log": log_path(config),
        "facets": [facet for volume in facets for facet in volume],
    }


def _lost(env: Env, directory: str) -> str:
    """What a new state takes away: also records, where the volumes lack what the log has."""
    knows = "what it knows of the remotes"
    try:
        opened = store.Store.open(env.disk, directory, read_only=True)
    except (StateError, OSError):  # there is none yet, or no start could use it
        return knows
    state = opened.state
    opened.close()
    unapplied = f"{knows}, and what its log has and the volumes lack"
    if not state["clean"]:
        return f"{unapplied} (a start applies it)"
    if state["role"] == "secondary" and state["tail"]["seq"] <= state.get("end_seq", 0):
        return f"{unapplied} (a start, and nbdmirror apply thaw --now, apply it)"
    return knows


def _check_unused(env: Env, config: Config) -> None:
    """StateError if a node runs on the state."""
    superblock = f"{config.state_dir}/{store.FILE_NAME}"
    if env.disk.exists(superblock):
        try:
            env.disk.open(superblock).close()
        except BlockingIOError:
            raise StateError(
                f"{config.state_dir} is in use by a running node", hint="stop that node first"
            ) from None


def _check_log(env: Env, path: str) -> None:
    """StateError for a file that is no log, not even one that was being made: it is somebody's."""
    if not env.disk.exists(path):
        return
    file = env.disk.open(path, read_only=True)
    try:
        head = file.pread(0, min(RING_AT, file.size()))
    finally:
        file.close()
    if not head.startswith(MAGIC) and any(head):
        raise StateError(
            f"{path} is no log of this program",
            hint="name another file in log.path, or move that one away",
        )


def _remove(env: Env, config: Config) -> None:
    disk, directory = env.disk, config.state_dir
    names = [store.FILE_NAME, activemap.FILE_NAME]
    paths = [f"{directory}/{name}" for name in names] + [log_path(config)]
    for maps in (f"{directory}/dcm", f"{directory}/restore"):
        if disk.exists(maps):
            paths += [f"{maps}/{name}" for name in disk.list(maps)]
    if disk.exists(snapshot_directory(config)):
        layers = filter(is_layer, disk.list(snapshot_directory(config)))
        paths += [f"{snapshot_directory(config)}/{name}" for name in layers]
    for path in paths:
        if disk.exists(path):
            disk.unlink(path)


async def _facets(env: Env, paths: tuple[str, ...], size: int) -> list[dict[str, Any]]:
    made = []
    for path in paths:
        if not env.disk.exists(path):
            env.disk.make_directory(path.rpartition("/")[0])
        created = await make_facet(env.disk, path, size, grow=True)
        made.append({"path": path, "created": created})
    return made


def _state(
    env: Env, config: Config, role: str, facets: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    def fresh() -> str:
        return f"{env.random.getrandbits(128):032x}"

    primary = role == "primary"
    trusted = FacetState.SYNCHRONISED.value
    return {
        "format": store.FORMAT,
        "group": config.group,
        "node": config.node,
        "uuid": fresh() if primary else None,
        "role": role,
        "generation": fresh() if primary else None,
        "history": [],
        "epoch": 1 if primary else 0,
        "forks": [],
        "boot_id": env.clock.boot_id(),
        "clean": True,
        "extent_size": config.log.extent_size,
        "configured": {
            "state_dir": config.state_dir,
            "log": config.log.path,
            "snapshots": config.snapshots.path,
        },
        "tail": {"position": 0, "seq": 1},
        "durable_seq": 0,
        "volumes": [
            {
                "name": volume.name,
                "uuid": fresh() if primary else "",
                "size": volume.size,
                "region_size": volume.region_size,
                "facets": [{"path": facet["path"], "state": trusted} for facet in made],
                "configured": list(volume.facets),
            }
            for volume, made in zip(config.volumes, facets, strict=True)
        ],
        "remotes": {},
        "upstream": None,
    }
