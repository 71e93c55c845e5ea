"""The configuration file: what is accepted, and that a refusal names file, key and cure (I9)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdmirror import config as c
from nbdmirror.configfile import check_files, load, parse
from nbdmirror.errors import ConfigError
from nbdmirror.tomltable import format_size, parse_duration, parse_size

FILE = "/etc/nbdmirror/db.toml"

MINIMAL = """
group = "db"
node = "alpha"
state_dir = "/var/lib/nbdmirror/db"
[admin]
socket = "/run/nbdmirror/db.sock"
[[volume]]
name = "data"
size = "1GiB"
facets = ["/srv/db/data.img"]
"""

FULL = """
group = "db"
node  = "alpha"
state_dir = "state"
[nbd]
listen = ["unix:run/db.nbd", "tcp:127.0.0.1:10809", "tcp:[::1]:10809"]
frontend = "nbdkit"
[admin]
socket = "db.sock"
[log]
size = "2MiB"
mode = "disk"
on_full = "block"
path = "/fast/db.log"
extent_size = "1MiB"
hot_extents = 70
[[volume]]
name = "data"
size = 1048576
facets = ["data.img", "../other/data.img"]
region_size = "4KiB"
[[volume]]
name = "wal"
size = "64TiB"
facets = ["/srv/wal.img"]
[[remote]]
name = "beta"
address = "tcp:192.0.2.2:10810"
mode = "async"
compression = "lz4"
apply_delay = "0s"
[replication]
listen = "tcp:0.0.0.0:10810"
insecure = true
heartbeat_seconds = 1
timeout_seconds = "5s"
reconnect_max_seconds = "500ms"
window_bytes = "1MiB"
[limits]
connections_max = 64
handshake_seconds = "2s"
request_bytes_max = "32MiB"
"""


def test_minimal_file_gets_defaults() -> None:
    config = parse(MINIMAL, FILE)
    assert config.path == FILE
    assert (config.group, config.node) == ("db", "alpha")
    assert config.log == c.LogConfig()
    assert config.limits == c.Limits()
    assert config.replication.listen is None
    assert config.volumes[0].region_size == 64 * c.KIB
    assert config.remotes == ()


def test_full_file() -> None:
    config = parse(FULL, FILE)
    assert config.state_dir == "/etc/nbdmirror/state"
    assert config.admin.socket == "/etc/nbdmirror/db.sock"
    assert config.nbd.listen[0] == "unix:/etc/nbdmirror/run/db.nbd"
    assert config.nbd.frontend == "nbdkit"
    assert config.log == c.LogConfig(2 * c.MIB, "disk", "block", "/fast/db.log", c.MIB, 70)
    data, wal = config.volumes
    assert data.facets == ("/etc/nbdmirror/data.img", "/etc/other/data.img")
    assert (data.size, data.region_size) == (c.MIB, 4 * c.KIB)
    assert wal.size == 64 * c.TIB
    assert config.remotes == (c.RemoteConfig("beta", "tcp:192.0.2.2:10810", "async", "lz4"),)
    assert config.replication == c.ReplicationConfig(
        listen="tcp:0.0.0.0:10810",
        insecure=True,
        heartbeat_seconds=1.0,
        timeout_seconds=5.0,
        reconnect_max_seconds=0.5,
        window_bytes=c.MIB,
    )
    assert (config.limits.connections_max, config.limits.handshake_seconds) == (64, 2.0)
    assert config.limits.request_bytes_max == 32 * c.MIB


def test_uris_one_per_listener() -> None:
    assert c.uris(parse(FULL, FILE), "data") == [
        "nbd+unix:///data?socket=/etc/nbdmirror/run/db.nbd",
        "nbd://127.0.0.1:10809/data",
        "nbd://[::1]:10809/data",
    ]


# (what replaces what in MINIMAL, the key that the message names, what else it says)
BAD = [
    ('group = "db"', "", "group", "missing"),
    ('group = "db"', 'group = "d b"', "group", "not a name"),
    ('group = "db"', f'group = "{"x" * 65}"', "group", "not a name"),
    ('group = "db"', "group = 7", "group", "must be a string, not 7"),
    ('node = "alpha"', 'node = ""', "node", "must not be empty"),
    ('node = "alpha"', 'node = "alpha"\nnodes = 1', "nodes", "did you mean node?"),
    ('node = "alpha"', 'node = "alpha"\nnode = "beta"', "line 4", "not valid TOML"),
    ('node = "alpha"', "node = ", "line 3", "not valid TOML"),
    ("[admin]", "[admin]\nmetrics = 'tcp:0.0.0.0:1'", "admin.metrics", "other hosts"),
    ("[admin]", "[admin]\nmode = 1", "admin.mode", "no such key"),
    ('"/run/nbdmirror/db.sock"', f'"/run/{"s" * 120}"', "admin.socket", "107 bytes"),
    ('"/run/nbdmirror/db.sock"', '"/srv/db/data.img"', "facets", "used by admin.socket"),
    ('socket = "/run/nbdmirror/db.sock"', "", "admin.socket", "missing"),
    ("[admin]", "[nbd]\nlisten = 'unix:/x'\n[admin]", "nbd.listen", "array of strings"),
    ("[admin]", "[nbd]\nlisten = ['/x']\n[admin]", "nbd.listen", "tcp:HOST:PORT"),
    ("[admin]", "[nbd]\nlisten = ['tcp:localhost:0']\n[admin]", "nbd.listen", "1 to 65535"),
    ("[admin]", "[nbd]\nlisten = ['tcp:::1:9']\n[admin]", "nbd.listen", "tcp:[V6]:PORT"),
    ("[admin]", "[nbd]\nlisten = ['tcp:[x]:9']\n[admin]", "nbd.listen", "not IPv6"),
    ("[admin]", "[nbd]\nlisten = ['tcp:0.0.0.0:9']\n[admin]", "nbd.listen", "other hosts"),
    ("[admin]", "[nbd]\nlisten = ['tcp:db.example:9']\n[admin]", "nbd.listen", "other hosts"),
    ("[admin]", "[nbd]\nlisten = ['unix:/x', 'unix:/x']\n[admin]", "nbd.listen", "twice"),
    ("[admin]", "[nbd]\ntls = {}\n[admin]", "nbd.tls.cert", "missing"),
    ("[admin]", "[nbd]\nfrontend = 'x'\n[admin]", "nbd.frontend", '"native" or "nbdkit"'),
    ("[admin]", "[nbd]\ninsecure = 1\n[admin]", "nbd.insecure", "true or false"),
    ("[admin]", "[log]\nsize = '512KiB'\n[admin]", "log.size", "from 1MiB"),
    ("[admin]", "[log]\nsize = 1048577\n[admin]", "log.size", "multiple of 4KiB"),
    ("[admin]", "[log]\nsize = '1GB'\n[admin]", "log.size", '"1GiB"'),
    ("[admin]", "[log]\nsize = true\n[admin]", "log.size", "not a size"),
    ("[admin]", "[log]\nmode = 'x'\n[admin]", "log.mode", 'must be "disk" or "spill"'),
    ("[admin]", "[log]\nspill_threshold = 65536\n[admin]", "spill_threshold", 'mode = "spill"'),
    (
        "[admin]",
        "[log]\nmode = 'spill'\nspill_threshold = 1\n[admin]",
        "log.spill_threshold",
        "from 64KiB to 1GiB",
    ),
    (
        "[admin]",
        "[log]\nmode = 'spill'\nspill_threshold = 65537\n[admin]",
        "log.spill_threshold",
        "multiple of 4KiB",
    ),
    ("[admin]", "[log]\non_full = 'drop'\n[admin]", "log.on_full", '"dcm" or "block"'),
    ("[admin]", "[log]\nextent_size = '3MiB'\n[admin]", "log.extent_size", "power of two"),
    ("[admin]", "[log]\nhot_extents = 0\n[admin]", "log.hot_extents", "from 64"),
    ('name = "data"', "", "volume[#1].name", "missing"),
    ('name = "data"', 'name = "a/b"', "volume[a/b].name", "not a name"),
    ('size = "1GiB"', "", "volume[data].size", "missing"),
    ('size = "1GiB"', "size = 1000", "volume[data].size", "multiple of 512"),
    ('size = "1GiB"', "size = 0", "volume[data].size", "from 512 to 64TiB"),
    ('size = "1GiB"', "size = -512", "volume[data].size", "from 512 to 64TiB"),
    ('size = "1GiB"', "size = '65TiB'", "volume[data].size", "from 512 to 64TiB"),
    ('size = "1GiB"', "size = 1e9", "volume[data].size", "not a size"),
    ('["/srv/db/data.img"]', "[]", "volume[data].facets", "at least one"),
    ('["/srv/db/data.img"]', "['/a/']", "volume[data].facets", "directory"),
    ('["/srv/db/data.img"]', "['/a', '/b/../a']", "volume[data].facets", "used by"),
    ('["/srv/db/data.img"]', "['/a', 1]", "volume[data].facets", "array of strings"),
    ('["/srv/db/data.img"]', "['']", "volume[data].facets", "empty"),
    ("[[volume]]", "[[volume]]\nregion_size = 2048", "region_size", "from 4KiB to 16MiB"),
    ("[[volume]]", "[[volume]]\nregion_size = '32MiB'", "region_size", "from 4KiB to 16MiB"),
    ("[[volume]]", "[[volume]]\nregion_size = 12288", "region_size", "power of two"),
    ("[[volume]]", "[volume]", "volume", "must be tables [[volume]]"),
]

REMOTE = "\n[[remote]]\nname = 'beta'\naddress = 'tcp:b:1'\n"

# (what is added behind MINIMAL, the key, what else the message says)
BAD_ADDED = [
    (REMOTE + "mode = 'checkpoint'", "remote[beta].mode", "not in this version"),
    (REMOTE + "mode = 'x'", "remote[beta].mode", 'must be "async"'),
    (REMOTE + "on_link_loss = 'hold'", "remote[beta].on_link_loss", "for a sync remote"),
    (REMOTE + "mode='sync'\non_link_loss = 'x'", "remote[beta].on_link_loss", '"hold" or "fail"'),
    (REMOTE + "max_rate = '1KiB'", "remote[beta].max_rate", "from 16KiB to 1TiB"),
    (REMOTE + "apply_delay = '-5m'", "remote[beta].apply_delay", "apply_delay"),
    (REMOTE + "tls = {}", "remote[beta].tls", "not in this version"),
    (REMOTE + "compression = 'zstd'", "remote[beta].compression", '"off" or "lz4"'),
    (REMOTE + REMOTE, "remote.name", "twice"),
    (REMOTE + REMOTE.replace("beta", "gamma"), "remote.address", "twice"),
    (REMOTE.replace("beta", "alpha"), "remote[alpha].name", "this node itself"),
    (REMOTE.replace("tcp:b:1", "b:1"), "remote[beta].address", "tcp:HOST:PORT"),
    ("[replication]\nlisten = 'tcp:0.0.0.0:1'", "replication.listen", "other hosts"),
    ("[replication]\nsecret_file = ''", "replication.secret_file", "must not be empty"),
    ("[replication]\ntls = {}", "replication.tls.cert", "missing"),
    ("[replication]\napply_delay = '1s'", "replication.apply_delay", "no such key"),
    ("[replication]\ntimeout_seconds = 1", "timeout_seconds", "longer than heartbeat_seconds"),
    ("[replication]\nheartbeat_seconds = '1d'", "heartbeat_seconds", "not a duration"),
    ("[replication]\nwindow_bytes = 1", "window_bytes", "from 64KiB"),
    ("[limits]\nconnections_max = 0", "limits.connections_max", "from 1"),
    ("[limits]\nconnection_max = 9", "limits.connection_max", "did you mean connections_max?"),
    ("[limits]\nrequest_bytes_max = '1GiB'", "limits.request_bytes_max", "to 64MiB"),
    ("[limits]\noption_bytes_max = '4KiB'", "limits.option_bytes_max", "from 8KiB to 1MiB"),
    ("[limits]\nframe_bytes_max = '2MiB'", "limits.frame_bytes_max", "from 3MiB to 64MiB"),
    ("[limits]\nunpacked_bytes_max = 1", "limits.unpacked_bytes_max", "from 3MiB to 64MiB"),
    ("[[volume]]\nname='data'\nsize=512\nfacets=['/z']", "volume.name", "twice"),
    ("[[volume]]\nname='b'\nsize=512\nfacets=['/srv/db/data.img']", "facets", "used by"),
]


def bad_texts() -> list[tuple[str, str, str]]:
    replaced = []
    for old, new, key, problem in BAD:
        assert MINIMAL.count(old) == 1, old
        replaced.append((MINIMAL.replace(old, new), key, problem))
    return replaced + [(MINIMAL + added, key, problem) for added, key, problem in BAD_ADDED]


@pytest.mark.parametrize(("text", "key", "problem"), bad_texts())
def test_bad_input_is_refused_with_file_key_and_cure(text: str, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, FILE)
    message = caught.value.message
    assert message.startswith(FILE + ": ")
    assert key in message
    assert problem in message
    assert caught.value.exit_code == 2


def test_what_is_not_built_has_a_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(MINIMAL + REMOTE + "tls = {}", FILE)
    assert "[replication] tls" in (caught.value.hint or "")


def test_insecure_allows_other_hosts() -> None:
    text = MINIMAL + "[nbd]\nlisten = ['tcp:0.0.0.0:10809']\ninsecure = true"
    assert parse(text, FILE).nbd.listen == ("tcp:0.0.0.0:10809",)


@pytest.mark.parametrize(
    ("text", "size"),
    [(4096, 4096), ("4KiB", 4096), ("2MiB", 2 << 20), ("3GiB", 3 << 30), ("1TiB", 1 << 40)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "1", "1 GiB", "1.5GiB", "1kib", "-1GiB", 1.0, True, None, []])
def test_not_sizes(text: object) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0.0), ("500ms", 0.5), ("5m", 300.0), ("1.5h", 5400.0), (2, 2.0)]
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "5", "-1s", "1d", True, None])
def test_not_durations(text: object) -> None:
    with pytest.raises(ConfigError):
        parse_duration(text)


def test_load_reads_a_file_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "db.toml").write_text(FULL)
    config = load(os.path.relpath(tmp_path / "db.toml"))
    assert config.path == str(tmp_path / "db.toml")
    assert config.volumes[0].facets[0] == str(tmp_path / "data.img")


def test_load_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(tmp_path))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(str(tmp_path / "binary.toml"))
    (tmp_path / "large.toml").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ConfigError, match="larger than 1MiB"):
        load(str(tmp_path / "large.toml"))


def with_facet(tmp_path: Path, facet: str) -> c.Config:
    return parse(MINIMAL.replace("/srv/db/data.img", facet), str(tmp_path / "db.toml"))


def test_check_files_accepts_a_facet_to_be_made(tmp_path: Path) -> None:
    check_files(with_facet(tmp_path, "data.img"))
    check_files(with_facet(tmp_path, "/var/lib/nbdmirror/db/data.img"))


@pytest.mark.parametrize(
    ("facet", "problem"),
    [
        ("mnt/data.img", "there is no directory"),
        (".", "neither a file nor a block device"),
        ("/dev/no-such-disk", "there is no device"),
        ("/dev/null", "neither a file nor a block device"),
    ],
)
def test_check_files_refuses(tmp_path: Path, facet: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        check_files(with_facet(tmp_path, facet))
    assert "volume[data].facets" in caught.value.message


def test_check_files_sees_one_file_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "a.img").touch()
    (tmp_path / "b.img").symlink_to("a.img")
    config = with_facet(tmp_path, 'a.img", "b.img')
    with pytest.raises(ConfigError, match="the same file"):
        check_files(config)


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("tcp:127.0.0.1:1", True),
        ("tcp:127.9.9.9:1", True),
        ("tcp:[::1]:1", True),
        ("tcp:localhost:1", True),
        ("tcp:0.0.0.0:1", False),
        ("tcp:[::]:1", False),
        ("tcp:192.0.2.2:1", False),
        ("tcp:localhost.example:1", False),
    ],
)
def test_addresses_and_loopback(text: str, loopback: bool) -> None:
    address = c.parse_address(text)
    assert isinstance(address, c.TcpAddress)
    assert address.loopback is loopback
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "threshold"),
    [
        ("mode = 'disk'", 0),
        ("mode = 'spill'", 64 << 20),
        ("mode = 'spill'\nspill_threshold = '1MiB'", 1 << 20),
        ("mode = 'spill'\nsize = '16MiB'", 16 << 20),
    ],
    ids=["disk", "default", "given", "no larger than the log"],
)
def test_how_much_of_the_log_is_in_memory(text: str, threshold: int) -> None:
    """M4: what each mode means for the memory that the log takes."""
    config = parse(MINIMAL.replace("[admin]", f"[log]\n{text}\n[admin]"), FILE)
    assert config.log.spill_threshold == threshold
