"""Commands, exit codes, status, events and the admin socket of running daemons (A6, X4, I9)."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import MIB, Cluster, Json, nbdmirror
from tests.integration.process import wait_until
from tests.integration.test_replication import MakeCluster
from tests.integration.tools import connect, pattern

STATUS = {
    "schema": int,
    "group": str,
    "node": str,
    "role": str,
    "version": str,
    "uptime_s": float,
    "generation": str,
    "epoch": int,
    "volumes": list,
    "log": dict,
    "remotes": list,
    "snapshots": list,
    "limits": dict,
}
VOLUME = {
    "name": str,
    "size": int,
    "region_size": int,
    "clients": int,
    "uris": list,
    "facets": list,
}
FACET = {"path": str, "state": str, "errors": int}
LOG = {
    "mode": str,
    "size": int,
    "used": int,
    "first_seq": int,
    "next_seq": int,
    "durable_seq": int,
}
REMOTE = {
    "name": str,
    "address": str,
    "mode": str,
    "link": str,
    "state": str,
    "received_seq": int,
    "durable_seq": int,
    "lag": dict,
    "dirty": dict,
    "resync": (dict, type(None)),
    "why": (str, type(None)),
    "next_action": (str, type(None)),
}
UPSTREAM = {
    "name": str,
    "link": str,
    "received_seq": int,
    "durable_seq": int,
    "applied_seq": int,
}


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    """A group that is in sync."""
    return make_cluster().start()


def _check(found: Json, fields: dict[str, Any]) -> None:
    for name, kind in fields.items():
        assert name in found, f"{name} is missing in {found}"
        assert isinstance(found[name], kind), f"{name} is {found[name]!r}"


# -- status --------------------------------------------------------------------------------------


def test_status_has_every_field_of_schema_1(cluster: Cluster) -> None:
    """X4: documented, stable JSON, on the primary."""
    status = cluster.primary.status()
    _check(status, STATUS)
    assert (status["schema"], status["role"], status["group"]) == (1, "primary", "db")
    for volume in status["volumes"]:
        _check(volume, VOLUME)
        for facet in volume["facets"]:
            _check(facet, FACET)
            assert facet["state"] == "synchronised"
    _check(status["log"], LOG)
    for remote in status["remotes"]:
        _check(remote, REMOTE)
        assert set(remote["lag"]) >= {"records", "bytes", "seconds"}
        assert set(remote["dirty"]) >= {"regions", "bytes"}
    assert status["limits"]["connections_max"] > 0


def test_status_of_a_secondary(cluster: Cluster) -> None:
    """X4: role, upstream and facets on the other side."""
    connect(cluster.primary.uri()).pwrite(pattern(MIB, 1), 0)
    cluster.wait_in_sync()
    status = cluster.secondary.status()
    assert status["role"] == "secondary"
    _check(status["upstream"], UPSTREAM)
    assert status["upstream"]["name"] == "alpha"
    assert status["upstream"]["link"] == "connected"
    assert status["upstream"]["durable_seq"] == cluster.primary.remote()["durable_seq"]
    assert status["volumes"][0]["facets"][0]["state"] == "synchronised"


def test_status_as_text(cluster: Cluster) -> None:
    """X4: one screen; every name is on it, and what to do when the link is gone."""
    text = cluster.primary.ok("status").out
    for word in ("db", "alpha", "beta", "data", "primary"):
        assert word in text, text
    cluster.proxy.refuse()
    cluster.primary.until("lost its link", lambda one: one["link"] != "connected")
    action = cluster.primary.remote()["next_action"]
    assert action and action in cluster.primary.ok("status").out
    assert len(text.splitlines()) < 40


def test_status_finds_the_daemon_by_config(cluster: Cluster) -> None:
    """A6: ``-c CONFIG`` before or behind the command."""
    config = str(cluster.primary.config)
    for argv in (("status", "-c", config, "--json"), ("-c", config, "status", "--json")):
        assert nbdmirror(*argv).json["node"] == "alpha"


def test_status_finds_the_only_daemon(cluster: Cluster, tmp_path: Path) -> None:
    """A6: with neither -c nor -s: the only socket under the runtime directory."""
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    environment = {**os.environ, "NBDMIRROR_RUNTIME_DIR": str(runtime)}
    assert nbdmirror("status", env=environment).code == 5
    (runtime / "one.sock").symlink_to(cluster.primary.admin_socket)
    found = nbdmirror("status", "--json", env=environment)
    assert found.code in (0, 5), "a link may or may not count as a socket"


# -- wait ----------------------------------------------------------------------------------------


def test_wait_exit_codes(cluster: Cluster) -> None:
    """A6: 0 when true, 3 on time-out with the reason, 2 for what cannot be waited for, 5 nobody."""
    primary = cluster.primary
    for condition in ("in-sync", "connected", "consistent"):
        assert primary.cli("wait", "--until", condition, "--timeout", "20").code == 0
    assert primary.cli("wait", "--until", "in-sync", "--remote", "beta", "--timeout", "9").code == 0
    assert primary.cli("wait", "--until", "in-sync", "--remote", "nobody").code in (1, 2)
    assert primary.cli("wait", "--until", "nonsense").code == 2
    assert primary.cli("wait").code == 2
    cluster.proxy.refuse()
    primary.until("lost its link", lambda one: one["link"] != "connected")
    connect(primary.uri()).pwrite(pattern(4096, 1), 0)
    for condition in ("in-sync", "connected"):
        result = primary.cli("wait", "--until", condition, "--timeout", "0.5")
        assert result.code == 3, result
        assert "beta" in result.err, result
    cluster.proxy.heal()
    assert primary.cli("wait", "--until", "in-sync", "--timeout", "30").code == 0
    primary.stop()
    result = primary.cli("wait", "--until", "in-sync")
    assert result.code == 5
    assert "serve" in result.err


def test_unknown_remote(cluster: Cluster) -> None:
    """A6: the message names the remotes that there are."""
    for command in ("pause", "resume", "resync"):
        result = cluster.primary.cli(command, "nobody")
        assert result.code in (1, 2), result
        assert "nobody" in result.err and "beta" in result.err, result


def test_wait_on_a_secondary_is_about_itself(cluster: Cluster) -> None:
    """X2, X4: it says of whom that is true, and takes no remote for its own."""
    cluster.check_in_sync()
    node = cluster.secondary
    assert node.ok("wait", "--until", "consistent").out == f"{node.status()['node']}: consistent\n"
    refused = node.cli("wait", "--until", "connected", "--remote", "nobody", "--timeout", "5")
    assert refused.code == 4 and "without --remote" in refused.err, refused
    assert cluster.primary.ok("wait", "--until", "consistent").out == "all remotes: consistent\n"


def test_a_daemon_that_cannot_listen_says_what_is_missing(make_cluster: MakeCluster) -> None:
    """I9: exit 1, and what to do about it; not the number of an error."""
    cluster = make_cluster()
    node = cluster.primary
    cluster.create()
    text = node.config.read_text()
    node.config.write_text(text.replace(str(node.admin_socket), "/nowhere/a.sock"))
    result = nbdmirror("serve", str(node.config))
    assert result.code == 1, result
    assert "there is no directory /nowhere" in result.err and "Errno" not in result.err


# -- create and check ----------------------------------------------------------------------------


def test_create_refuses_to_overwrite(cluster: Cluster) -> None:
    """A6: exit 4, the flag is named, the state is as it was; a running daemon is never forced."""
    connect(cluster.primary.uri()).pwrite(pattern(MIB, 1), 0)
    cluster.primary.stop()
    result = cluster.primary.create()
    assert result.code == 4, result
    assert "--force" in result.err and "lack" not in result.err
    cluster.primary.start()
    cluster.primary.kill()
    assert "the volumes lack (a start applies it)" in cluster.primary.create().err
    cluster.primary.start()
    assert connect(cluster.primary.uri()).pread(MIB, 0) == pattern(MIB, 1)
    cluster.check_in_sync()
    forced = cluster.primary.create("--force")
    assert forced.code != 0, "the state was overwritten under a running daemon"
    cluster.check_in_sync()


def test_create_force_begins_anew(make_cluster: MakeCluster) -> None:
    """A6: with --force a new identity; the facet files are kept."""
    cluster = make_cluster()
    cluster.create()
    facet = cluster.primary.facets("data")[0]
    with facet.open("r+b") as file:
        file.write(b"kept")
    cluster.primary.start()
    generation = cluster.primary.status()["generation"]
    cluster.primary.stop()
    result = cluster.primary.create("--force")
    assert result.code == 0, result
    cluster.primary.start()
    assert cluster.primary.status()["generation"] != generation
    assert connect(cluster.primary.uri()).pread(4, 0) == b"kept"


def test_facets_that_hold_data_are_synchronised_first(make_cluster: MakeCluster) -> None:
    """I5, M6: nothing proves that two facet files are equal: they are compared, then equal."""
    cluster = make_cluster()
    for number, node in enumerate(cluster.nodes):
        facet = node.facets("data")[0]
        facet.write_bytes(pattern(5 * MIB, number))
        os.truncate(facet, cluster.volumes[0].size)
    cluster.start()
    cluster.compare()
    assert connect(cluster.primary.uri()).pread(5 * MIB, 0) == pattern(5 * MIB, 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('group = "db"', 'group = "d b"', ["group"]),
        ('group = "db"', "", ["group"]),
        ('node = "', 'nod = "x"\nnode = "', ["nod", "node"]),
        ("size = 67108864\nregion", "size = 1000\nregion", ["size"]),
        ("size = 67108864\nregion", 'size = "64 parsecs"\nregion', ["size"]),
        ("region_size = 65536", "region_size = 65537", ["region_size"]),
        ("region_size = 65536", "region_size = 1024", ["region_size"]),
        ('on_full = "dcm"', 'on_full = "explode"', ["on_full", "dcm", "block"]),
        ('frontend = "native"', 'frontend = "fancy"', ["frontend", "native", "nbdkit"]),
        ('listen = ["unix', 'listen = ["carrier-pigeon', ["listen"]),
        ('listen = ["unix', 'listen = ["tcp:0.0.0.0:10809", "unix', ["listen", "insecure"]),
        ('state_dir = "', "state_dir = 7 # ", ["state_dir"]),
        ('name = "data"', 'name = "../data"', ["name"]),
        ("[log]", "[log", ["TOML"]),
        ("[log]\n", "[log]\nmode = 3\nmode = 4\n", ["TOML"]),
    ],
)
def test_check_refuses(make_cluster: MakeCluster, old: str, new: str, words: list[str]) -> None:
    """A6, I9: exit 2; the message names the file, the key, and what would be right."""
    cluster = make_cluster()
    config = cluster.primary.config
    text = config.read_text()
    assert nbdmirror("check", str(config)).code == 0
    assert old in text, "the test does not change anything"
    config.write_text(text.replace(old, new, 1))
    for command in ("check", "create", "serve"):
        result = nbdmirror(command, str(config), timeout=30)
        assert result.code == 2, result
        for word in [str(config), *words]:
            assert word in result.err, result
        assert "Traceback" not in result.err
    assert not (cluster.primary.directory / "state").exists()


def test_check_shows_what_would_be_served(make_cluster: MakeCluster) -> None:
    """A6: names, sizes, URIs, remotes."""
    cluster = make_cluster()
    text = nbdmirror("check", str(cluster.primary.config)).out
    for word in ("db", "alpha", "data", "beta", str(cluster.primary.nbd_socket)):
        assert word in text, text


def test_missing_config_file() -> None:
    """I9: exit 2 and the name."""
    result = nbdmirror("check", "/nowhere/at/all.toml")
    assert result.code == 2
    assert "/nowhere/at/all.toml" in result.err


def test_usage_errors_exit_2() -> None:
    """A6: no command, unknown command, unknown option, wrong number of arguments."""
    for argv in ([], ["frobnicate"], ["status", "--frobnicate"], ["check"], ["check", "a", "b"]):
        result = nbdmirror(*argv)
        assert result.code == 2, result
        assert "Traceback" not in result.err


# -- events --------------------------------------------------------------------------------------


def test_events_and_cursors(cluster: Cluster) -> None:
    """A6: one object a line, cursors rise, ``--since`` gives exactly what is newer."""
    cluster.proxy.refuse()
    cluster.primary.until("lost its link", lambda one: one["link"] != "connected")
    cluster.proxy.heal()
    cluster.wait_in_sync()
    events = cluster.primary.events()
    cursors = [event["cursor"] for event in events]
    assert cursors == sorted(set(cursors))
    assert all(event["kind"] and event["time"] for event in events)
    middle = cursors[len(cursors) // 2]
    newer = cluster.primary.events(middle)
    assert [event["cursor"] for event in newer][: len(cursors)] == [
        cursor for cursor in cursors if cursor > middle
    ]
    cluster.primary.ok("pause", "beta")
    latest = cluster.primary.events(cursors[-1])
    assert any("pause" in json.dumps(event) for event in latest), latest


# -- the admin socket ----------------------------------------------------------------------------


class Admin:
    """A raw connection to the admin socket."""

    def __init__(self, cluster: Cluster) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(cluster.primary.admin_socket))
        self.lines = self.socket.makefile("rb")

    def ask(self, line: bytes) -> Json:
        """Sends a line; the next line that comes back."""
        self.socket.sendall(line + b"\n")
        answer: Json = json.loads(self.lines.readline())
        return answer

    def close(self) -> None:
        """Hangs up."""
        self.lines.close()
        self.socket.close()


@pytest.fixture
def admin(cluster: Cluster) -> Iterator[Admin]:
    """One connection."""
    connection = Admin(cluster)
    yield connection
    connection.close()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"this is no JSON", -32700),
        (b"\xff\xfe\x00\x01", -32700),
        (b"[" * 50_000, -32700),
        (b'{"jsonrpc": "2.0", "id": 1}', -32600),
        (b'{"jsonrpc": "1.0", "id": 1, "method": "status"}', -32600),
        (b'[{"jsonrpc": "2.0", "id": 1, "method": "status"}]', -32600),
        (b"17", -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "no.such.method"}', -32601),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "__class__"}', -32601),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "pause", "params": {}}', -32602),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "pause", "params": {"remote": 7}}', -32602),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "status", "params": {"x": 1}}', -32602),
    ],
)
def test_bad_admin_input(cluster: Cluster, admin: Admin, line: bytes, code: int) -> None:
    """I9: JSON-RPC's own error code and a message; the daemon and its data stay as they are."""
    answer = admin.ask(line)
    assert answer["error"]["code"] == code, answer
    assert answer["error"]["message"]
    assert cluster.primary.rpc("status")["role"] == "primary"
    cluster.check_in_sync()


def test_admin_errors_carry_hints(admin: Admin) -> None:
    """A6: ``code``, ``message`` and ``data.hint``."""
    answer = admin.ask(
        b'{"jsonrpc": "2.0", "id": 1, "method": "pause", "params": {"remote": "nobody"}}'
    )
    assert set(answer["error"]) >= {"code", "message", "data"}
    assert "hint" in answer["error"]["data"]


def test_endless_admin_line(cluster: Cluster, admin: Admin) -> None:
    """I6, I9: a line without an end is refused before it is stored, then hung up on."""
    with pytest.raises(OSError):
        for _ in range(2000):
            admin.socket.sendall(b"x" * 65536)
        pytest.fail("128 MiB were taken")
    assert cluster.primary.status()["role"] == "primary"


def test_admin_connections_are_limited(cluster: Cluster) -> None:
    """I6: idle connections beyond the limit are closed; when they are gone all is well."""
    idle: list[Admin] = []
    for _ in range(100):
        try:
            idle.append(Admin(cluster))
        except OSError:
            break
    connect(cluster.primary.uri()).pwrite(pattern(4096, 1), 0)
    for admin in idle:
        admin.close()
    wait_until("status works", lambda: cluster.primary.cli("status").code == 0)
    cluster.check_in_sync()


def test_admin_socket_mode(cluster: Cluster) -> None:
    """interface: mode 0660."""
    assert cluster.primary.admin_socket.stat().st_mode & 0o777 == 0o660


# -- dump ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["superblock", "log", "dcm", "active"])
def test_dump_of_a_stopped_node(cluster: Cluster, what: str) -> None:
    """A6: reads the state of a stopped node and changes nothing."""
    cluster.proxy.refuse()
    connect(cluster.primary.uri()).pwrite(pattern(MIB, 1), 0)
    cluster.primary.stop()
    state = cluster.primary.directory / "state"
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    for flags in ([], ["--json"]):
        result = nbdmirror("dump", what, str(cluster.primary.config), *flags)
        assert result.code == 0, result
        assert result.out.strip() or what in ("dcm", "active"), result
    after = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    assert before == after, "dump changed the state"
    cluster.primary.start()
    cluster.proxy.heal()
    cluster.check_in_sync()


def test_version() -> None:
    """A6."""
    assert nbdmirror("--version").out.startswith("nbdmirror ")


# -- SIGHUP --------------------------------------------------------------------------------------


def test_sighup_with_a_bad_config_changes_nothing(cluster: Cluster) -> None:
    """interface: SIGHUP reloads; a file that is wrong is told of and the daemon goes on."""
    config = cluster.primary.config
    text = config.read_text()
    config.write_text("this is no configuration")
    cluster.primary.reload()
    connect(cluster.primary.uri()).pwrite(pattern(MIB, 1), 0)
    cluster.check_in_sync()
    config.write_text(text)
    cluster.primary.reload()
    cluster.check_in_sync()
