"""The configuration of one node of one group, as data: frozen dataclasses, limits, addresses.

Owns the words and the bounds; ``configfile`` reads them from TOML. Reads no file, knows no other
module but ``errors``. Every layer uses it. The keys are those of the product's interface and stay.
"""

from __future__ import annotations

import ipaddress
import re
import urllib.parse
from dataclasses import dataclass, field

from nbdmirror.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

SECTOR_SIZE = 512
REGION_SIZE_MIN = 4 * KIB
REGION_SIZE_MAX = 16 * MIB
VOLUME_SIZE_MAX = 64 * TIB
SNAPSHOTS_MAX = 256
LOG_SIZE_MIN = 1 * MIB
LOG_SIZE_MAX = 16 * TIB
LOG_SIZE_STEP = 4 * KIB
SPILL_THRESHOLD_MIN = 64 * KIB
SPILL_THRESHOLD_STEP = 4 * KIB
SPILL_THRESHOLD_DEFAULT = 64 * MIB
EXTENT_SIZE_MIN = 64 * KIB
EXTENT_SIZE_MAX = 1 * GIB
RATE_MIN = 16 * KIB
RATE_MAX = 1 * TIB
WINDOW_BYTES_MIN = 64 * KIB
WINDOW_BYTES_MAX = 1 * GIB
OPTION_BYTES_MIN = 8 * KIB  # one name of the greatest length, and what goes with it
OPTION_BYTES_MAX = 1 * MIB
FRAME_BYTES_MIN = 3 * MIB  # no node sends a longer one
FRAME_BYTES_MAX = 64 * MIB

# Linux keeps a socket's path in 108 bytes with a zero behind it.
UNIX_PATH_BYTES_MAX = 107

NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Limits:
    """``[limits]``: bounds on everything that a client, a peer or time could make grow (I6).

    Strangers are connections whose handshake has not ended; when there are too many, in total or
    of one address, the oldest goes. ``handshake_seconds`` is what each handshake may take, of TLS
    and of NBD. ``reply_bytes_max`` bounds what one client may have us answer at a time beyond what
    it has read, ``memory_bytes_max`` what large requests, requests that wait, and replies of all
    clients hold together.
    ``options_max`` and ``option_bytes_max`` bound what an NBD client may ask in its handshake.
    ``frame_bytes_max`` is the longest frame that is taken from a peer, ``unpacked_bytes_max`` what
    one may be when it is decompressed.
    ``admin_requests_max`` is how many requests one admin connection may send ahead.
    ``descriptors_reserved`` are kept free of connections, for volumes, links and state."""

    connections_max: int = 100
    strangers_max: int = 64
    strangers_per_address_max: int = 32
    handshake_seconds: float = 10.0
    options_max: int = 64
    option_bytes_max: int = 64 * KIB
    request_bytes_max: int = 64 * MIB
    requests_max: int = 256
    reply_bytes_max: int = 32 * MIB
    memory_bytes_max: int = GIB
    replication_connections_max: int = 32
    frame_bytes_max: int = 4 * MIB
    unpacked_bytes_max: int = 4 * MIB
    admin_connections_max: int = 32
    admin_line_bytes_max: int = 64 * KIB
    admin_requests_max: int = 16
    metrics_connections_max: int = 8
    descriptors_reserved: int = 16
    events_max: int = 10_000


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """A ``tls`` table: this side's certificate and key, and the CA that the other side's must come
    from. All are PEM files; a path may be ``credential:NAME`` (systemd's LoadCredential).

    ``pins``: SHA-256 digests (hex) of the public keys that are taken; none: every key of that CA.
    """

    cert: str
    key: str
    client_ca: str
    pins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may attach one volume, and how. None in a field: it restricts nothing.

    ``names`` are those of client certificates, ``addresses`` networks; both hold for TCP: a unix
    socket is guarded by its mode. ``connections_max`` bounds the clients of this volume."""

    read_only: bool = False
    names: tuple[str, ...] | None = None
    addresses: tuple[str, ...] | None = None
    connections_max: int | None = None


@dataclass(frozen=True, slots=True)
class NbdConfig:
    """``[nbd]``: where clients attach; ``insecure`` allows open TCP addresses beyond loopback.

    ``tls`` (native) and ``psk_file`` (nbdkit: its TLS-PSK keys) make every TCP address speak TLS,
    and only that; with nbdkit the unix sockets too."""

    listen: tuple[str, ...] = ()
    frontend: str = "native"
    insecure: bool = False
    tls: TlsConfig | None = None
    psk_file: str | None = None


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """``[admin]``: the control socket, and where Prometheus may ask.

    ``group`` may connect to the socket and look; root and the daemon's own user may change."""

    socket: str
    metrics: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class LogConfig:
    """``[log]``: the transaction queue, and the active map that goes with it.

    ``mode``: "disk": every entry is in the file before the write is acknowledged; "spill": entries
    are in memory up to ``spill_threshold`` bytes (0: not used), and go to the file only past it.
    ``extent_size`` is what one bit of the active map covers, in bytes; ``hot_extents`` how many
    of them stay marked without being written again."""

    size: int = GIB
    mode: str = "disk"
    on_full: str = "dcm"
    path: str | None = None
    extent_size: int = 4 * MIB
    hot_extents: int = 1024
    spill_threshold: int = 0


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    """One ``[[volume]]``: name, size in bytes, its local facets, region size in bytes."""

    name: str
    size: int
    facets: tuple[str, ...]
    region_size: int = 64 * KIB
    access: AccessConfig = field(default_factory=AccessConfig)


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """One ``[[remote]]``: who gets the data while this node is primary.

    ``on_link_loss`` is what a ``sync`` remote's clients get while it cannot be reached.
    ``max_rate`` caps what is sent to it, in bytes a second: records and resync together.
    ``verify_interval``: seconds from one verify to the next, 0: none by itself; ``verify_rate``:
    bytes of the volume a second; ``verify_repair``: what differs is then sent."""

    name: str
    address: str
    mode: str = "async"
    compression: str = "off"
    max_rate: int | None = None
    apply_delay: float = 0.0
    on_link_loss: str = "continue"
    verify_interval: float = 0.0
    verify_rate: int | None = None
    verify_repair: bool = False


@dataclass(frozen=True, slots=True)
class ReplicationConfig:
    """``[replication]``: where this node takes replication from its peers, and the link's timing.

    ``listen`` is None where the table names no address: such a node can only be primary.
    ``tls`` or ``secret_file`` secure every replication connection, made and taken.
    ``window_bytes`` bounds what is under way to one remote and not yet acknowledged."""

    listen: str | None = None
    insecure: bool = False
    tls: TlsConfig | None = None
    secret_file: str | None = None
    heartbeat_seconds: float = 2.0
    timeout_seconds: float = 10.0
    reconnect_max_seconds: float = 10.0
    window_bytes: int = 32 * MIB


@dataclass(frozen=True, slots=True)
class SnapshotConfig:
    """``[snapshots]``: how many there may be, what their layers may take in bytes (None: the disk),
    where those lie (None: in state_dir), and whether a secondary keeps its last consistent image
    while it is resynchronised (X2). At ``count_max`` no more are taken; where space ends, the
    oldest unprotected one goes, and the volume goes on."""

    count_max: int = 64
    space_max: int | None = None
    path: str | None = None
    before_resync: bool = True


@dataclass(frozen=True, slots=True)
class Config:
    """One node of one group, checked and complete."""

    path: str
    group: str
    node: str
    state_dir: str
    nbd: NbdConfig
    admin: AdminConfig
    log: LogConfig
    volumes: tuple[VolumeConfig, ...]
    remotes: tuple[RemoteConfig, ...] = ()
    replication: ReplicationConfig = field(default_factory=ReplicationConfig)
    limits: Limits = field(default_factory=Limits)
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """``tcp:HOST:PORT``; an IPv6 host is kept without its brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:{self.netloc}"

    @property
    def netloc(self) -> str:
        """``HOST:PORT`` as a URI has it: IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether it can be reached from this host only; a name other than localhost is not."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """``unix:PATH``."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def reachable(address: Address) -> bool:
    """Whether other hosts can reach it."""
    return isinstance(address, TcpAddress) and not address.loopback


_ADDRESS_FORMS = "an address is tcp:HOST:PORT, tcp:[V6]:PORT or unix:PATH"


def parse_address(text: str) -> Address:
    """An address in the form of the configuration; ConfigError says what is wrong with it.

    Ports are 1 to 65535; a unix path has at most 107 bytes."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix":
        check_socket_path(rest)
        return UnixAddress(rest)
    if scheme != "tcp":
        raise ConfigError(f"{text!r} is not an address: {_ADDRESS_FORMS}")
    host, _, port = rest.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
        if not _is_ipv6(host):
            raise ConfigError(f"{text!r} is not an address: {host!r} is not IPv6")
    if not re.fullmatch(r"[A-Za-z0-9._:%-]+", host) or (":" in host and not bracketed):
        raise ConfigError(f"{text!r} is not an address: {_ADDRESS_FORMS}")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{text!r} is not an address: its port must be 1 to 65535")
    return TcpAddress(host, int(port))


def check_socket_path(path: str) -> None:
    """Refuses a path that no unix socket can have (ConfigError)."""
    if not path or "\0" in path:
        raise ConfigError(f"a unix socket needs a path, not {path!r}")
    if len(path.encode()) > UNIX_PATH_BYTES_MAX:
        raise ConfigError(
            f"the socket path {path!r} is too long: Linux allows {UNIX_PATH_BYTES_MAX} bytes"
        )


def check_name(name: str) -> str:
    """Returns the name of a group, node, volume or remote if it is one; ConfigError if not."""
    if not NAME_PATTERN.fullmatch(name) or name in (".", ".."):
        raise ConfigError(f"{name!r} is not a name: 1 to 64 of A-Z a-z 0-9 . _ - make one")
    return name


def uris(config: Config, volume: str) -> list[str]:
    """The NBD URIs of a volume, one for each listener, in the order of the configuration."""
    result = []
    over_tcp = "nbds" if config.nbd.tls or config.nbd.psk_file else "nbd"
    over_unix = "nbds+unix" if config.nbd.psk_file else "nbd+unix"
    for text in config.nbd.listen:
        address = parse_address(text)
        if isinstance(address, UnixAddress):
            path = urllib.parse.quote(address.path, safe="/")
            result.append(f"{over_unix}:///{volume}?socket={path}")
        else:
            result.append(f"{over_tcp}://{address.netloc}/{volume}")
    return result


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
