"""A group on this machine: one primary, its secondaries, a proxy in each link.

Owns: the configuration files, the daemons, their directories. What it does to them it does from
outside, as a person would: the command line, signals, the network. Used by every integration
test and by ``tests.bench``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.integration.process import Process, free_port, wait_until
from tests.integration.proxy import Proxy
from tests.integration.rpc import ask

MIB = 1 << 20
READY_S = 60.0
FAST = {"heartbeat_seconds": 0.3, "timeout_seconds": 2.0, "reconnect_max_seconds": 0.5}
"""Tests wait for lost links: they are noticed in seconds, not in tens of seconds."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Volume:
    """One ``[[volume]]`` of the group; ``facets`` is how many local copies each node keeps."""

    name: str = "data"
    size: int = 64 * MIB
    region_size: int = 64 << 10
    facets: int = 1


@dataclass(frozen=True)
class Result:
    """What a command did."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output as JSON."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """Its output as one JSON object a line."""
        return [json.loads(line) for line in self.out.splitlines() if line.strip()]

    def __str__(self) -> str:
        return f"{' '.join(self.argv)} -> {self.code}\n{self.out}{self.err}"


def nbdmirror(*args: str, timeout: float = 120.0, env: Mapping[str, str] | None = None) -> Result:
    """Runs ``python -m nbdmirror ARGS``; any exit code is a result."""
    argv = (sys.executable, "-m", "nbdmirror", *args)
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=env,
    )
    return Result(("nbdmirror", *args), done.returncode, done.stdout, done.stderr)


class Node:
    """One node: its configuration, its state on disk, its daemon while one runs."""

    def __init__(self, cluster: Cluster, name: str, role: str) -> None:
        self.cluster = cluster
        self.name = name
        self.role = role
        self.directory = cluster.directory / name
        self.directory.mkdir()
        self.config = self.directory / "nbdmirror.toml"
        self.nbd_socket = cluster.sockets / f"{name}.nbd"
        self.admin_socket = cluster.sockets / f"{name}.sock"
        self.replication_port = free_port()
        self.nbd_port = free_port()
        self.process: Process | None = None
        self.starts = 0
        self.keys: dict[str, list[str]] = {}
        """Further lines of TOML by table: admin, nbd, replication, limits, volume."""

    # -- configuration ---------------------------------------------------------------------------

    def facets(self, volume: str) -> list[Path]:
        """The local facet files of a volume."""
        count = self.cluster.volume(volume).facets
        return [self.directory / f"{volume}.{number}.img" for number in range(count)]

    def write_config(self, extra: str = "") -> None:
        """Writes the configuration; ``extra`` is TOML put behind it."""
        cluster = self.cluster
        lines = [
            f'group = "{cluster.group}"',
            f'node = "{self.name}"',
            f'state_dir = "{self.directory}/state"',
            "[admin]",
            f'socket = "{self.admin_socket}"',
            *self.keys.get("admin", []),
            *(["[limits]", *self.keys["limits"]] if "limits" in self.keys else []),
            "[log]",
            f"size = {cluster.log_size if self.role == 'primary' else cluster.remote_log_size}",
            f'mode = "{cluster.log_mode}"',
            f'on_full = "{cluster.on_full}"',
            *self.keys.get("log", []),
            "[nbd]",
            f"listen = {json.dumps(self.nbd_listen())}",
            f'frontend = "{cluster.frontend}"',
            *self.keys.get("nbd", []),
            "[replication]",
            *self.keys.get("replication", []),
            f'listen = "tcp:127.0.0.1:{self.replication_port}"',
            *(f"{key} = {json.dumps(value)}" for key, value in cluster.tuning.items()),
        ]
        for volume in cluster.volumes:
            paths = [str(path) for path in self.facets(volume.name)]
            lines += [
                "[[volume]]",
                f'name = "{volume.name}"',
                f"size = {volume.size}",
                f"region_size = {volume.region_size}",
                f"facets = {json.dumps(paths)}",
                *self.keys.get("volume", []),
            ]
        for remote in cluster.secondaries if self.role == "primary" else []:
            lines += [
                "[[remote]]",
                f'name = "{remote.name}"',
                f'address = "{cluster.remote_address(remote)}"',
                *(f"{key} = {json.dumps(value)}" for key, value in cluster.remote_keys.items()),
            ]
        self.config.write_text("\n".join(lines) + "\n" + extra)

    def nbd_listen(self) -> list[str]:
        """Where clients attach; a secondary offers its snapshots."""
        if self.role != "primary" and self.cluster.frontend != "native":
            return []
        listen = [f"unix:{self.nbd_socket}"]
        return [*listen, f"tcp:127.0.0.1:{self.nbd_port}"] if self.cluster.tcp else listen

    # -- the daemon ------------------------------------------------------------------------------

    def create(self, *flags: str) -> Result:
        """``nbdmirror create`` with this node's role; any exit code is a result."""
        return nbdmirror("create", str(self.config), "--role", self.role, *flags)

    def start(self) -> None:
        """``nbdmirror serve``; returns when the daemon says READY=1."""
        assert self.process is None or not self.process.alive, f"{self.name} already runs"
        self.starts += 1
        self.process = Process(
            self.name,
            [sys.executable, "-m", "nbdmirror", "serve", str(self.config)],
            self.directory / "output",
            notify=READY_S,
        )

    @property
    def daemon(self) -> Process:
        """The daemon's process."""
        assert self.process is not None, f"{self.name} was never started"
        return self.process

    @property
    def alive(self) -> bool:
        """Whether the daemon runs."""
        return self.process is not None and self.process.alive

    def stop(self) -> None:
        """SIGTERM; the daemon must end cleanly, with exit code 0."""
        code = self.daemon.stop()
        assert code == 0, self.daemon.failure("stopped with an error")

    def kill(self) -> None:
        """SIGKILL: what is in the page cache stays, what is in the process is gone."""
        self.daemon.kill()

    def restart(self) -> None:
        """A clean stop and a start."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.daemon.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        self.daemon.thaw()

    def reload(self) -> None:
        """SIGHUP."""
        self.daemon.signal(signal.SIGHUP)

    # -- asking it -------------------------------------------------------------------------------

    def cli(self, *args: str, timeout: float = 120.0) -> Result:
        """A command to this daemon; any exit code is a result."""
        return nbdmirror("-s", str(self.admin_socket), *args, timeout=timeout)

    def ok(self, *args: str, timeout: float = 120.0) -> Result:
        """A command that must succeed."""
        result = self.cli(*args, timeout=timeout)
        assert result.code == 0, f"{result}\n{self.daemon.output()}"
        return result

    def rpc(self, method: str, **params: object) -> Any:
        """One request at the admin socket, answered without an error."""
        return ask(str(self.admin_socket), method, params)

    def status(self) -> Json:
        """``status --json``."""
        status: Json = self.ok("status", "--json").json
        return status

    def events(self, since: int = 0) -> list[Json]:
        """The events that this run of the daemon has seen, newer than a cursor."""
        return self.ok("events", "--json", "--no-follow", "--since", str(since)).lines

    def refusals(self) -> list[str]:
        """Why strangers were refused, as the events tell."""
        return [event["why"] for event in self.events() if event["kind"] == "stranger-refused"]

    def remote(self, name: str = "beta") -> Json:
        """The entry of one remote in the status."""
        found: list[Json] = [r for r in self.status()["remotes"] if r["name"] == name]
        assert len(found) == 1, f"{name} is not in the status of {self.name}"
        return found[0]

    def until(
        self,
        what: str,
        condition: Callable[[Json], Any],
        *,
        remote: str = "beta",
        s: float = 30.0,
    ) -> Json:
        """Waits until the remote's status entry satisfies ``condition``; returns the entry."""
        last: list[Json] = []

        def probe() -> Json | None:
            last[:] = [self.remote(remote)]
            return last[0] if condition(last[0]) else None

        try:
            return wait_until(f"remote {remote} {what}", probe, s)
        except AssertionError as failure:
            raise AssertionError(f"{failure}; last seen {last}") from None

    def uri(self, volume: str = "data", *, tcp: bool = False) -> str:
        """The NBD URI of a volume."""
        if tcp:
            return f"nbd://127.0.0.1:{self.nbd_port}/{volume}"
        return f"nbd+unix:///{volume}?socket={self.nbd_socket}"


class Cluster:
    """The group. A context manager: leaving it stops what still runs and removes the sockets.

    ``remotes``: names of the secondaries. ``proxied``: each link goes through a ``Proxy``.
    ``remote_keys``: further keys of every ``[[remote]]``; ``tuning``: of ``[replication]``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        volumes: Sequence[Volume] = (Volume(),),
        remotes: Sequence[str] = ("beta",),
        log_size: int = 64 * MIB,
        remote_log_size: int | None = None,
        log_mode: str = "disk",
        on_full: str = "dcm",
        frontend: str = "native",
        tcp: bool = False,
        proxied: bool = True,
        group: str = "db",
        remote_keys: Mapping[str, str | int] | None = None,
        tuning: Mapping[str, float] | None = None,
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        # The path of a unix socket is short; a test's directory may be long.
        self.sockets = Path(tempfile.mkdtemp(prefix="nbdm-"))
        self.group = group
        self.volumes = tuple(volumes)
        self.log_size = log_size
        self.remote_log_size = log_size if remote_log_size is None else remote_log_size
        self.log_mode = log_mode
        self.on_full = on_full
        self.frontend = frontend
        self.tcp = tcp
        self.remote_keys = dict(remote_keys or {})
        self.tuning = dict(FAST if tuning is None else tuning)
        self.primary = Node(self, "alpha", "primary")
        self.secondaries = [Node(self, name, "secondary") for name in remotes]
        self.proxies = {
            node.name: Proxy(f"127.0.0.1:{node.replication_port}")
            for node in self.secondaries
            if proxied
        }
        for node in self.nodes:
            node.write_config()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def nodes(self) -> list[Node]:
        """Secondaries first: started in this order, the first connection succeeds."""
        return [*self.secondaries, self.primary]

    @property
    def secondary(self) -> Node:
        """The first secondary."""
        return self.secondaries[0]

    @property
    def proxy(self) -> Proxy:
        """The network to the first secondary."""
        return self.proxies[self.secondary.name]

    def volume(self, name: str) -> Volume:
        """The volume of that name."""
        return next(volume for volume in self.volumes if volume.name == name)

    def remote_address(self, node: Node) -> str:
        """What the primary dials to reach a secondary."""
        proxy = self.proxies.get(node.name)
        return proxy.address if proxy else f"tcp:127.0.0.1:{node.replication_port}"

    def create(self) -> None:
        """Creates the state of every node."""
        for node in self.nodes:
            result = node.create()
            assert result.code == 0, result

    def start(self, *, synced: bool = True) -> Cluster:
        """Creates and starts everything; with ``synced`` it returns when all is in sync."""
        self.create()
        for node in self.nodes:
            node.start()
        if synced:
            self.wait_in_sync()
        return self

    def wait_in_sync(self, seconds: float = 60.0) -> None:
        """``nbdmirror wait --until in-sync`` on the primary, which must succeed in time."""
        result = self.primary.cli(
            "wait",
            "--until",
            "in-sync",
            "--timeout",
            f"{seconds:g}",
            timeout=seconds + 30,
        )
        if result.code != 0:
            state = self.primary.cli("status", "--json")
            outputs = [f"{node.name}: {node.daemon.output()}" for node in self.nodes]
            raise AssertionError("\n".join([str(result), str(state), *outputs]))

    def compare(self) -> None:
        """Every facet of every volume, on every node, equals the primary's first, byte by byte."""
        for volume in self.volumes:
            first = self.primary.facets(volume.name)[0]
            for node in self.nodes:
                for path in node.facets(volume.name):
                    done = subprocess.run(
                        ["cmp", str(first), str(path)],
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                    assert done.returncode == 0, f"{node.name}: {done.stdout}{done.stderr}"

    def check_in_sync(self, seconds: float = 60.0) -> None:
        """In sync within the time, and then equal bit for bit (I2)."""
        self.wait_in_sync(seconds)
        self.compare()

    def kill(self) -> None:
        """Kills every daemon at once: what a test that hangs needs."""
        for node in self.nodes:
            if node.process is not None:
                node.process.kill()

    def close(self) -> None:
        """Ends everything that still runs, without asking how it went."""
        for node in reversed(self.nodes):
            if node.process is not None and node.process.alive:
                with contextlib.suppress(AssertionError):
                    node.process.stop(10.0)
        for proxy in self.proxies.values():
            proxy.close()
        shutil.rmtree(self.sockets, ignore_errors=True)
