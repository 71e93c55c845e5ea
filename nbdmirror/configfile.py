"""Reads a configuration: TOML text to a checked ``Config``, or a ConfigError that says what to do.

Owns the rules that a file must follow. ``parse`` is pure, ``load`` reads the one file and
``check_files`` looks at what the file names; nothing here writes. Called by the commands and by
the daemon at start and reload.

A key that a later version will have is refused, never ignored: see ``_NOT_YET``.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Callable

from nbdmirror import config as c
from nbdmirror.config import (
    AdminConfig,
    Config,
    Limits,
    LogConfig,
    NbdConfig,
    RemoteConfig,
    ReplicationConfig,
    SnapshotConfig,
    VolumeConfig,
)
from nbdmirror.configsecurity import (
    access,
    check_access,
    check_link,
    insecure_hint,
    psk_table,
    secret_path,
    tls_table,
)
from nbdmirror.errors import ConfigError
from nbdmirror.tomltable import Table, format_size, show

FILE_BYTES_MAX = 1 * c.MIB

_SECONDS_MAX = 86_400.0
_COUNT_MAX = 1_000_000


def _always(_value: object) -> bool:
    return True


_REMOTE_TLS_HINT = "leave it out: [replication] tls or secret_file secures these connections"

# (table, key, which values are refused, what works instead). Delete a row when it is built.
_NOT_YET: tuple[tuple[str, str, Callable[[object], bool], str], ...] = (
    ("remote", "mode", lambda value: value == "checkpoint", 'use "async" or "sync"'),
    ("remote", "tls", _always, _REMOTE_TLS_HINT),
)


def load(path: str) -> Config:
    """Reads and checks one file; ConfigError names the file, the key and what would be right."""
    path = os.path.abspath(path)
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{path}: larger than {format_size(FILE_BYTES_MAX)}: not a configuration")
    try:
        return parse(data.decode(), path)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text: a configuration is TOML") from None


def parse(text: str, path: str) -> Config:
    """Checks the text of a configuration whose file has the absolute name ``path``."""
    assert os.path.isabs(path)
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    top = Table(path, "", data)
    config = Config(
        path=path,
        group=_name(top, "group"),
        node=_name(top, "node"),
        state_dir=_path(top, "state_dir", top.text("state_dir")),
        nbd=_nbd(_open(top, "nbd")),
        admin=_admin(_open(top, "admin")),
        log=_log(_open(top, "log")),
        volumes=tuple(_volume(table) for table in _open_all(top, "volume")),
        remotes=tuple(_remote(table) for table in _open_all(top, "remote")),
        replication=_replication(_open(top, "replication")),
        limits=_limits(_open(top, "limits")),
        snapshots=_snapshots(_open(top, "snapshots")),
    )
    top.finish()
    _check_whole(top, config)
    return config


def check_files(config: Config) -> None:
    """Refuses, for ``check`` and ``create``, files that cannot be: directories, devices, the same
    file twice. A daemon does not ask: one facet that is gone is not the end."""
    top = Table(config.path, "", {})
    seen: dict[object, str] = {}
    for volume in config.volumes:
        for path in volume.facets:
            _check_facet(top, config, volume, path)
            if (file := _file_at(path)) in seen:
                top.fail("facets", f"{path} and {seen[file]} are the same file")
            seen[file] = path
    if config.log.path is not None:
        _check_directory(top, config, "log.path", config.log.path)


def _file_at(path: str) -> object:
    """What all names of a file, or of a device, have in common."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def _open(top: Table, key: str) -> Table:
    return _refuse_not_yet(key, Table(top.file, key, top.table(key)))


def _open_all(top: Table, key: str) -> list[Table]:
    tables = []
    for index, data in enumerate(top.tables(key)):
        name = data.get("name")
        label = f"{key}[{name if isinstance(name, str) and name else f'#{index + 1}'}]"
        tables.append(_refuse_not_yet(key, Table(top.file, label, data)))
    return tables


def _refuse_not_yet(kind: str, table: Table) -> Table:
    for row_kind, key, refused, instead in _NOT_YET:
        if row_kind == kind and key in table and refused(table.raw(key)):
            table.fail(key, f"{show(table.raw(key))} is not in this version", hint=instead)
    return table


def _name(table: Table, key: str) -> str:
    return table.checked(key, c.check_name, table.text(key))


def _path(table: Table, key: str, path: str) -> str:
    """The absolute form; a relative path counts from the directory of the file."""
    absolute = os.path.normpath(os.path.join(os.path.dirname(table.file), path))
    if path.endswith("/") and key != "state_dir":
        table.fail(key, f"{path} names a directory; a file is needed")
    return absolute


def _address(table: Table, key: str, text: str) -> c.Address:
    if text.startswith("unix:") and text != "unix:":
        text = "unix:" + _path(table, key, text.removeprefix("unix:"))
    return table.checked(key, c.parse_address, text)


def _listen(table: Table, texts: list[str], secured: bool) -> tuple[str, ...]:
    """Addresses to listen on: each once, open ones beyond loopback only if that is spelled out."""
    addresses = [_address(table, "listen", text) for text in texts]
    for index, address in enumerate(addresses):
        if address in addresses[:index]:
            table.fail("listen", f"{address} is there twice")
        if c.reachable(address) and not secured:
            problem = f"{address} can be reached from other hosts, unencrypted and unauthenticated"
            table.fail("listen", problem, insecure_hint(table))
    return tuple(map(str, addresses))


def _nbd(table: Table) -> NbdConfig:
    insecure = table.flag("insecure", False)
    frontend = table.choice("frontend", ("native", "nbdkit"), NbdConfig().frontend)
    tls = psk_file = None
    if frontend == "native":
        tls = tls_table(table)
    else:
        psk_file = psk_table(table)
    secured = insecure or tls is not None or psk_file is not None
    result = NbdConfig(
        listen=_listen(table, table.texts("listen", []), secured),
        frontend=frontend,
        insecure=insecure,
        tls=tls,
        psk_file=psk_file,
    )
    table.finish()
    return result


def _admin(table: Table) -> AdminConfig:
    path = _path(table, "socket", table.text("socket"))
    table.checked("socket", c.check_socket_path, path)
    metrics = None
    if "metrics" in table:
        metrics = _address(table, "metrics", table.text("metrics"))
        if c.reachable(metrics):
            hint = "use loopback or a unix socket, and a proxy with authentication before it"
            table.fail("metrics", f"{metrics} can be reached from other hosts", hint)
    table.raw("metrics", None)
    result = AdminConfig(
        socket=path,
        metrics=None if metrics is None else str(metrics),
        group=table.text("group") if "group" in table else None,
    )
    table.raw("group", None)
    table.finish()
    return result


def _log(table: Table) -> LogConfig:
    default = LogConfig()
    size = table.size("size", default.size, c.LOG_SIZE_MIN, c.LOG_SIZE_MAX)
    if size % c.LOG_SIZE_STEP:
        table.fail("size", f"must be a multiple of {format_size(c.LOG_SIZE_STEP)}, not {size}")
    mode = table.choice("mode", ("disk", "spill"), default.mode)
    threshold = _spill_threshold(table, size) if mode == "spill" else 0
    if mode == "disk" and "spill_threshold" in table:
        table.fail("spill_threshold", 'belongs to mode = "spill", the log has mode = "disk"')
    result = LogConfig(
        size=size,
        mode=mode,
        spill_threshold=threshold,
        on_full=table.choice("on_full", ("dcm", "block"), default.on_full),
        path=_path(table, "path", table.text("path")) if "path" in table else None,
        extent_size=_power_of_two(
            table, "extent_size", default.extent_size, c.EXTENT_SIZE_MIN, c.EXTENT_SIZE_MAX
        ),
        hot_extents=table.integer("hot_extents", default.hot_extents, 64, _COUNT_MAX),
    )
    table.raw("path", None)
    table.finish()
    return result


def _spill_threshold(table: Table, log_size: int) -> int:
    step = c.SPILL_THRESHOLD_STEP
    default = min(c.SPILL_THRESHOLD_DEFAULT, log_size)
    size = table.size("spill_threshold", default, c.SPILL_THRESHOLD_MIN, log_size)
    if size % step:
        table.fail("spill_threshold", f"must be a multiple of {format_size(step)}, not {size}")
    return size


def _volume(table: Table) -> VolumeConfig:
    default = VolumeConfig(name="", size=0, facets=())
    size = table.size("size", None, c.SECTOR_SIZE, c.VOLUME_SIZE_MAX)
    if size % c.SECTOR_SIZE:
        table.fail("size", f"must be a multiple of {c.SECTOR_SIZE} bytes, not {size}")
    facets = tuple(_path(table, "facets", path) for path in table.texts("facets"))
    if not facets:
        table.fail("facets", "a volume needs at least one local facet")
    result = VolumeConfig(
        name=_name(table, "name"),
        size=size,
        facets=facets,
        region_size=_power_of_two(
            table, "region_size", default.region_size, c.REGION_SIZE_MIN, c.REGION_SIZE_MAX
        ),
        access=access(table),
    )
    table.finish()
    return result


def _power_of_two(table: Table, key: str, default: int, low: int, high: int) -> int:
    size = table.size(key, default, low, high)
    if size & (size - 1):
        limits = f"from {format_size(low)} to {format_size(high)}"
        table.fail(key, f"must be a power of two {limits}, not {size}")
    return size


def _rate(table: Table, key: str) -> int | None:
    """Bytes a second; None if the key is not there: no cap."""
    return table.size(key, None, c.RATE_MIN, c.RATE_MAX) if key in table else None


def _remote(table: Table) -> RemoteConfig:
    default = RemoteConfig(name="", address="")
    table.raw("max_rate", None)
    table.raw("verify_rate", None)
    result = RemoteConfig(
        name=_name(table, "name"),
        address=str(_address(table, "address", table.text("address"))),
        mode=table.choice("mode", ("async", "sync"), default.mode),
        on_link_loss=table.choice(
            "on_link_loss", ("continue", "hold", "fail"), default.on_link_loss
        ),
        compression=table.choice("compression", ("off", "lz4"), default.compression),
        max_rate=_rate(table, "max_rate"),
        apply_delay=table.seconds("apply_delay", default.apply_delay, 0.0, _SECONDS_MAX),
        verify_interval=table.seconds(
            "verify_interval", default.verify_interval, 0.0, 366 * _SECONDS_MAX
        ),
        verify_rate=_rate(table, "verify_rate"),
        verify_repair=table.flag("verify_repair", default.verify_repair),
    )
    if result.mode == "async" and "on_link_loss" in table:
        table.fail("on_link_loss", "is for a sync remote: an async one never holds a client")
    table.finish()
    return result


def _replication(table: Table) -> ReplicationConfig:
    default = ReplicationConfig()
    insecure = table.flag("insecure", False)
    listen = [table.text("listen")] if "listen" in table else []
    heartbeat = table.seconds("heartbeat_seconds", default.heartbeat_seconds, 0.05, 3600.0)
    timeout = table.seconds("timeout_seconds", default.timeout_seconds, 0.1, 3600.0)
    if timeout <= heartbeat:
        table.fail("timeout_seconds", f"must be longer than heartbeat_seconds ({heartbeat:g})")
    tls = tls_table(table)
    secret_file = secret_path(table, "secret_file") if "secret_file" in table else None
    if tls is not None and secret_file is not None:
        table.fail("secret_file", "there is tls already", "keep one of the two")
    addresses = _listen(table, listen, insecure or tls is not None or secret_file is not None)
    result = ReplicationConfig(
        listen=addresses[0] if addresses else None,
        insecure=insecure,
        tls=tls,
        secret_file=secret_file,
        heartbeat_seconds=heartbeat,
        timeout_seconds=timeout,
        reconnect_max_seconds=table.seconds(
            "reconnect_max_seconds", default.reconnect_max_seconds, 0.05, 3600.0
        ),
        window_bytes=table.size(
            "window_bytes", default.window_bytes, c.WINDOW_BYTES_MIN, c.WINDOW_BYTES_MAX
        ),
    )
    table.raw("listen", None)
    table.raw("secret_file", None)
    table.finish()
    return result


def _limits(table: Table) -> Limits:
    default = Limits()
    result = Limits(
        connections_max=table.integer("connections_max", default.connections_max, 1, 65_536),
        strangers_max=table.integer("strangers_max", default.strangers_max, 1, 65_536),
        strangers_per_address_max=table.integer(
            "strangers_per_address_max", default.strangers_per_address_max, 1, 65_536
        ),
        handshake_seconds=table.seconds(
            "handshake_seconds", default.handshake_seconds, 0.1, _SECONDS_MAX
        ),
        reply_bytes_max=table.size("reply_bytes_max", default.reply_bytes_max, c.MIB, c.GIB),
        memory_bytes_max=table.size(
            "memory_bytes_max", default.memory_bytes_max, 128 * c.MIB, c.TIB
        ),
        options_max=table.integer("options_max", default.options_max, 4, 65_536),
        option_bytes_max=table.size(
            "option_bytes_max", default.option_bytes_max, c.OPTION_BYTES_MIN, c.OPTION_BYTES_MAX
        ),
        request_bytes_max=table.size(
            "request_bytes_max", default.request_bytes_max, 64 * c.KIB, 64 * c.MIB
        ),
        requests_max=table.integer("requests_max", default.requests_max, 1, 65_536),
        replication_connections_max=table.integer(
            "replication_connections_max", default.replication_connections_max, 1, 65_536
        ),
        frame_bytes_max=table.size(
            "frame_bytes_max", default.frame_bytes_max, c.FRAME_BYTES_MIN, c.FRAME_BYTES_MAX
        ),
        unpacked_bytes_max=table.size(
            "unpacked_bytes_max", default.unpacked_bytes_max, c.FRAME_BYTES_MIN, c.FRAME_BYTES_MAX
        ),
        admin_connections_max=table.integer(
            "admin_connections_max", default.admin_connections_max, 1, 65_536
        ),
        admin_line_bytes_max=table.size(
            "admin_line_bytes_max", default.admin_line_bytes_max, 1 * c.KIB, 16 * c.MIB
        ),
        admin_requests_max=table.integer(
            "admin_requests_max", default.admin_requests_max, 1, 65_536
        ),
        metrics_connections_max=table.integer(
            "metrics_connections_max", default.metrics_connections_max, 1, 65_536
        ),
        descriptors_reserved=table.integer(
            "descriptors_reserved", default.descriptors_reserved, 4, 65_536
        ),
        events_max=table.integer("events_max", default.events_max, 1, _COUNT_MAX),
    )
    table.finish()
    return result


def _snapshots(table: Table) -> SnapshotConfig:
    default = SnapshotConfig()
    space = "space_max" in table
    result = SnapshotConfig(
        count_max=table.integer("count_max", default.count_max, 1, c.SNAPSHOTS_MAX),
        space_max=table.size("space_max", c.GIB, c.MIB, 1 << 60) if space else None,
        path=_path(table, "path", table.text("path")) if "path" in table else None,
        before_resync=table.flag("before_resync", default.before_resync),
    )
    table.finish()
    return result


def _check_whole(top: Table, config: Config) -> None:
    """The rules that hold between tables."""
    if not config.volumes:
        top.fail("volume", "a group needs at least one [[volume]]")
    _check_unique(top, "volume", "name", [volume.name for volume in config.volumes])
    _check_unique(top, "remote", "name", [remote.name for remote in config.remotes])
    _check_unique(top, "remote", "address", [remote.address for remote in config.remotes])
    for remote in config.remotes:
        if remote.name == config.node:
            top.fail(f"remote[{remote.name}].name", "is the name of this node itself")
        if remote.address == config.replication.listen:
            top.fail(f"remote[{remote.name}].address", "is where this node itself listens")
        check_link(top, config, remote)
    for volume in config.volumes:
        check_access(top, config, volume)
    uses: dict[str, str] = {}
    for path, use in _paths(config):
        if path in uses:
            top.fail(use, f"{path} is used by {uses[path]} already")
        uses[path] = use
    tcp = [text for text in config.nbd.listen if text.startswith("tcp:")]
    for text, use in (
        (config.replication.listen, "replication.listen"),
        (config.admin.metrics, "admin.metrics"),
    ):
        if text in tcp:
            top.fail(use, f"{text} is used by nbd.listen or replication.listen already")
        tcp.append(text or "")


def _check_unique(top: Table, kind: str, key: str, values: list[str]) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            top.fail(f"{kind}.{key}", f"{show(value)} is there twice; each is its own")


def _paths(config: Config) -> list[tuple[str, str]]:
    """Every path that the node uses, with the key that names it."""
    paths = [(config.state_dir, "state_dir"), (config.admin.socket, "admin.socket")]
    if config.log.path is not None:
        paths.append((config.log.path, "log.path"))
    if config.snapshots.path is not None:
        paths.append((config.snapshots.path, "snapshots.path"))
    for text, use in [(text, "nbd.listen") for text in config.nbd.listen] + [
        (config.replication.listen or "", "replication.listen"),
        (config.admin.metrics or "", "admin.metrics"),
    ]:
        if text.startswith("unix:"):
            paths.append((text.removeprefix("unix:"), use))
    for volume in config.volumes:
        paths += [(path, f"volume[{volume.name}].facets") for path in volume.facets]
    return paths


def _check_facet(top: Table, config: Config, volume: VolumeConfig, path: str) -> None:
    key = f"volume[{volume.name}].facets"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        _check_directory(top, config, key, path)
        return
    except OSError as error:
        top.fail(key, f"{path}: {error.strerror}")
    if stat.S_ISBLK(mode):
        _check_device_size(top, key, volume, path)
    elif not stat.S_ISREG(mode):
        top.fail(key, f"{path} is neither a file nor a block device")


def _check_device_size(top: Table, key: str, volume: VolumeConfig, path: str) -> None:
    try:
        with open(path, "rb") as device:
            size = device.seek(0, os.SEEK_END)
    except OSError as error:
        top.fail(key, f"{path}: {error.strerror}")
    if size < volume.size:
        problem = f"{path} has {size} bytes, volume {volume.name} needs {volume.size}"
        top.fail(key, problem, f"use a larger device, or size = {size - size % c.SECTOR_SIZE}")


def _check_directory(top: Table, config: Config, key: str, path: str) -> None:
    """A file can be made only where a directory is: a missing one may be a file system that is
    not mounted, and a facet beside it would fill the wrong disk."""
    directory = os.path.dirname(path)
    if path.startswith("/dev/") and not path.startswith("/dev/shm/"):
        top.fail(key, f"there is no device {path}")
    inside_state = f"{directory}/".startswith(f"{config.state_dir}/")
    if not os.path.isdir(directory) and not inside_state:
        top.fail(key, f"there is no directory {directory} for {path}", "make it, or mount it")
