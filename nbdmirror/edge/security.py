"""What the process needs before it lets anybody in: proofs, descriptors, the admin socket's group.

Made from the configuration when the daemon starts; everything that is missing or open to others
keeps it from starting. Certificates and secrets are read again at SIGHUP: all of them are taken, or
none.
"""

from __future__ import annotations

import contextlib
import grp
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from nbdmirror.config import AdminConfig, Config
from nbdmirror.edge.net import LinuxNetwork
from nbdmirror.edge.peers import Report, SecurePeers
from nbdmirror.edge.secrets import check_secret
from nbdmirror.edge.tls import NbdTls
from nbdmirror.engine.admission import CONNECTIONS_MIN, Room
from nbdmirror.errors import MORE_DESCRIPTORS, ConfigError
from nbdmirror.ports import Env

COUNT_SECONDS = 1.0
"""Descriptors are counted so often, while there are newcomers."""


class Security:
    """The proofs of one node."""

    def __init__(self, config: Config, network: LinuxNetwork) -> None:
        """ConfigError names the file or the group that is not as it must be."""
        self._config = config
        self._peers: SecurePeers | None = None
        self._nbd: NbdTls | None = None
        if config.replication.tls is not None or config.replication.secret_file is not None:
            with _about(config, _link_key(config)):
                self._peers = SecurePeers(config, network)
        if config.nbd.tls is not None:
            with _about(config, "nbd.tls"):
                self._nbd = NbdTls(config.nbd.tls, config.limits.handshake_seconds)
        if config.nbd.psk_file is not None:
            with _about(config, "nbd.tls.psk"):
                check_secret(config.nbd.psk_file)
        if config.admin.group is not None:
            with _about(config, "admin.group"):
                _group_id(config.admin.group)

    def env(self, env: Env) -> Env:
        """The world with the doors locked as configured."""
        return replace(env, peers=self._peers, nbd_tls=self._nbd)

    def admit(self, room: Room, report: Report) -> None:
        """Peers that have not proved themselves take their places from ``room``; of those that are
        refused ``report`` is told."""
        if self._peers is not None:
            self._peers.room, self._peers.report = room, report

    def reload(self, config: Config) -> None:
        """Reads every file again; ConfigError, and nothing has changed, if one cannot be used.
        Another kind of proof is for the next start: the old kind's stays in use."""
        apply: list[Callable[[], None]] = []
        replication, nbd = config.replication, config.nbd
        same = _link_key(config) == _link_key(self._config)
        if self._peers is not None and same and (replication.tls or replication.secret_file):
            with _about(config, _link_key(config)):
                apply.append(self._peers.prepare(replication))
        if self._config.nbd.psk_file is not None and nbd.psk_file is not None:
            with _about(config, "nbd.tls.psk"):
                check_secret(nbd.psk_file)
        if self._nbd is not None and nbd.tls is not None:
            with _about(config, "nbd.tls"):
                apply.append(self._nbd.prepare(nbd.tls))
        for put_to_use in apply:
            put_to_use()


@contextlib.contextmanager
def _about(config: Config, key: str) -> Iterator[None]:
    """A refusal names the configuration and the key, as those of ``configfile`` do."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{config.path}: {key}: {error.message}", hint=error.hint) from None


def _link_key(config: Config) -> str:
    return "replication.tls" if config.replication.tls is not None else "replication.secret_file"


def check_security(config: Config) -> None:
    """Refuses what would keep the daemon from starting (ConfigError); for ``nbdmirror check``."""
    Security(config, LinuxNetwork())


def raise_descriptors() -> None:
    """Takes as many descriptors as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError):  # a filter of system calls may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Descriptors:
    """Those of this process."""

    def __init__(self, reserved: int) -> None:
        """When all files are open; ConfigError if there are too few to serve, when ``reserved``
        stay free."""
        self._counted_at = time.monotonic()
        left = self._free() - reserved
        if left < CONNECTIONS_MIN:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            raise ConfigError(
                f"{limit} descriptors leave room for {max(left, 0)} connections",
                hint=f"{MORE_DESCRIPTORS}, or lower limits.descriptors_reserved",
            )

    @staticmethod
    def _free() -> int:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return limit - len(os.listdir("/proc/self/fd"))

    def count(self, at_once: bool) -> int | None:
        """How many are free; None: they were counted a moment ago (``Room.count``)."""
        now = time.monotonic()
        if not at_once and now - self._counted_at < COUNT_SECONDS:
            return None
        self._counted_at = now
        return self._free()


def give_to_group(admin: AdminConfig) -> None:
    """Lets the members of ``[admin] group`` open the socket; its mode (0660) keeps others out."""
    if admin.group is None:
        return
    try:
        os.chown(admin.socket, -1, _group_id(admin.group))
    except PermissionError:
        raise ConfigError(
            f"{admin.socket} cannot be given to group {admin.group}",
            hint="make the user of the daemon a member of it",
        ) from None


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"there is no group {name!r} on this machine") from None
