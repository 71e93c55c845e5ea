"""``nbdmirror dump``: what a stopped node's files hold. Opens everything read-only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nbdmirror.codec import mappage, record
from nbdmirror.config import Config
from nbdmirror.core.active import volume_extent
from nbdmirror.edge.files import LinuxDisk
from nbdmirror.engine import activemap
from nbdmirror.engine.create import log_path
from nbdmirror.engine.log import Log
from nbdmirror.engine.maps import DcmFile, map_name
from nbdmirror.engine.store import Store
from nbdmirror.errors import FormatError, StateError, UsageError

Json = dict[str, Any]


def dump(what: str, config: Config) -> Json | Iterator[Json]:
    """The superblock as one object; records, marked regions or extents one by one.

    UsageError for anything else; StateError or FormatError where the files cannot be read."""
    disk = LinuxDisk()
    store = Store.open(disk, config.state_dir, read_only=True)
    state = store.state
    store.close()
    if what == "superblock":
        return state
    if what == "log":
        return _log(disk, config, state)
    if what == "dcm":
        return _dcm(disk, config, state)
    if what == "active":
        return _active(disk, config, state)
    raise UsageError(f"dump {what}: it is superblock, log, dcm or active")


def _log(disk: LinuxDisk, config: Config, state: Json) -> Iterator[Json]:
    tail = state["tail"]
    log = Log.open(
        disk,
        state.get("log_path") or log_path(config),
        tail["position"],
        tail["seq"],
        read_only=True,
    )
    forks = [(int(epoch), int(end)) for epoch, end in state["forks"]]
    names = [volume["name"] for volume in state["volumes"]]
    for found in log.scan(forks, int(state["epoch"])):
        yield {
            "seq": found.seq,
            "epoch": found.epoch,
            "kind": record.KIND_NAMES[found.kind],
            "volume": names[found.volume],
            "offset": found.offset,
            "length": found.length,
            "time_ns": found.time_ns,
        }
    log.close()


def _dcm(disk: LinuxDisk, config: Config, state: Json) -> Iterator[Json]:
    for remote, facts in state["remotes"].items():
        for volume in state["volumes"]:
            name, size, region_size = volume["name"], volume["size"], volume["region_size"]
            path = f"{config.state_dir}/dcm/{map_name(remote, name)}"
            if not disk.exists(path):
                raise StateError(f"the map {path} is missing")
            dcm = DcmFile(disk, path, -(-size // region_size), region_size)
            dcm.open(bool(facts["defaults"].get(name, True)), read_only=True)
            if dcm.damage is not None:
                raise FormatError(dcm.damage)
            for first, count in dcm.map.runs():
                yield {
                    "remote": remote,
                    "volume": name,
                    "offset": first * region_size,
                    "length": min(count * region_size, size - first * region_size),
                }
            dcm.close()


def _active(disk: LinuxDisk, config: Config, state: Json) -> Iterator[Json]:
    file = disk.open(f"{config.state_dir}/{activemap.FILE_NAME}", read_only=True)
    names = [volume["name"] for volume in state["volumes"]]
    for number in range(file.size() // mappage.SECTOR_SIZE):
        data = file.pread(number * mappage.SECTOR_SIZE, mappage.SECTOR_SIZE)
        for slot in mappage.decode_sector(number, data):
            if slot:
                volume, extent = volume_extent(slot - 1)
                size = config.log.extent_size
                yield {"volume": names[volume], "offset": extent * size, "length": size}
    file.close()
