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
from collections.abc import Callable, Iterator
from dataclasses import replace

from nbdmirror.config import AdminConfig, Config
from nbdmirror.edge.net import LinuxNetwork
from nbdmirror.edge.peers import SecurePeers
from nbdmirror.edge.secrets import check_secret
from nbdmirror.edge.tls import NbdTls
from nbdmirror.errors import ConfigError
from nbdmirror.ports import Env

CONNECTIONS_MIN = 4
"""With descriptors for fewer connections a node is of no use."""


class Security:
    """The proofs of one node."""

    def __init__(self, config: Config, network: LinuxNetwork) -> None:
        """ConfigError names the file or the group that is not as it must be."""
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

    @property
    def report(self) -> Callable[..., object] | None:
        """Who is told of peers that are refused: (listener, address, why)."""
        return None if self._peers is None else self._peers.report

    @report.setter
    def report(self, tell: Callable[..., object]) -> None:
        if self._peers is not None:
            self._peers.report = tell

    def reload(self, config: Config) -> None:
        """Reads every file again; ConfigError, and nothing has changed, if one cannot be used."""
        apply: list[Callable[[], None]] = []
        replication, nbd = config.replication, config.nbd
        if self._peers is not None and (replication.tls or replication.secret_file):
            with _about(config, _link_key(config)):
                apply.append(self._peers.prepare(replication))
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


def connections_left(reserved: int) -> int:
    """For how many connections there are descriptors, when all files are open and ``reserved``
    stay free; ConfigError if those are too few to serve."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    left = limit - len(os.listdir("/proc/self/fd")) - reserved
    if left < CONNECTIONS_MIN:
        raise ConfigError(
            f"{limit} descriptors leave room for {max(left, 0)} connections",
            hint="raise LimitNOFILE (ulimit -n), or lower limits.descriptors_reserved",
        )
    return left


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
