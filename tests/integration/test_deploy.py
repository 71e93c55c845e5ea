"""``deploy/``: the units are good and locked down, the examples run, the daemon keeps to its units.

Holds O16 (a disk that failed is not asked again by a restart loop) and what the units rely on:
sd_notify, the watchdog, exit codes, the system calls that are left to the daemon.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdmirror import errors
from nbdmirror.edge import daemon, env, notify, sockets
from nbdmirror.edge.journal import JOURNAL
from tests.integration.cluster import MIB, READY_S, Cluster, nbdmirror
from tests.integration.pki import Authority
from tests.integration.process import NotifySocket, Process, children, free_port, wait_until
from tests.integration.tools import connect, pattern, run

TREE = Path(__file__).parents[2]
DEPLOY = TREE / "deploy"
EXAMPLES = DEPLOY / "examples"
EXPOSURE_MAX = 1.5
WATCHDOG_S = 2.0


def settings(path: Path) -> dict[str, list[str]]:
    """The settings of a unit: each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


SERVICE = settings(DEPLOY / "nbdmirror@.service")


def unit(directory: Path, instance: str, *drop_ins: str) -> Path:
    """An instance of a template as ``systemctl edit`` leaves it: with these examples beside it."""
    template = re.sub(r"@.*\.", "@.", instance)
    path = directory / instance
    shutil.copy(DEPLOY / template, path)
    beside = directory / f"{instance}.d"
    beside.mkdir(exist_ok=True)
    for name in drop_ins:
        shutil.copy(EXAMPLES / name, beside)
    return path


def analyze(*argv: str, directory: Path) -> str:
    """What systemd-analyze says about units of this directory; it must not complain."""
    done = subprocess.run(
        ["systemd-analyze", *argv],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{directory}:"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# -- the units -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instance", "drop_ins"),
    [
        ("nbdmirror@db.service", ()),
        ("nbdmirror@db.service", ("peers.conf", "block-device.conf")),
        ("nbdmirror@db.socket", ()),
        ("nbdmirror-attach@nbd0.service", ()),
        ("nbd-client@nbd0.service", ()),
    ],
)
def test_units_verify(tmp_path: Path, instance: str, drop_ins: tuple[str, ...]) -> None:
    """systemd knows every setting, and finds nothing to say about any."""
    path = unit(tmp_path, instance, *drop_ins)
    if instance.endswith(".socket"):
        unit(tmp_path, instance.replace(".socket", ".service"))
    assert analyze("verify", "--man=no", str(path), directory=tmp_path) == ""


def exposure(path: Path) -> float:
    """What ``systemd-analyze security`` gives a unit."""
    text = analyze("security", "--offline=true", "--no-pager", str(path), directory=path.parent)
    found = re.search(r"Overall exposure level .*?: ([0-9.]+)", text)
    assert found, text
    return float(found[1])


@pytest.mark.parametrize("drop_ins", [(), ("peers.conf",), ("block-device.conf",)])
def test_exposure(tmp_path: Path, drop_ins: tuple[str, ...]) -> None:
    """``systemd-analyze security``: 1.5 or better, with each example too."""
    assert exposure(unit(tmp_path, "nbdmirror@db.service", *drop_ins)) <= EXPOSURE_MAX


@pytest.mark.parametrize("instance", ["nbdmirror-attach@nbd0.service", "nbd-client@nbd0.service"])
def test_exposure_of_who_attaches(tmp_path: Path, instance: str) -> None:
    """What asks the kernel for devices needs CAP_SYS_ADMIN, root's device nodes and the network,
    which cost 1.5 by themselves; all else is locked."""
    assert exposure(unit(tmp_path, instance)) <= 2.1


def test_a_failed_disk_is_not_restarted_a_crash_is() -> None:
    """O16: codes that need a person end it; signals, the watchdog and mistakes do not."""
    assert SERVICE["Restart"] == ["on-failure"]  # code other than 0, signal, watchdog
    prevented = {int(code) for code in SERVICE["RestartPreventExitStatus"][0].split()}
    assert prevented == {
        kind.exit_code
        for kind in (errors.DiskFailed, errors.StateError, errors.ConfigError, errors.Refused)
    }
    assert env.EXIT_MISTAKE not in prevented
    assert "SuccessExitStatus" not in SERVICE


def test_a_failed_disk_is_not_started_by_a_client_either() -> None:
    """O16: with the same codes the socket unit ends, so that clients are refused."""
    (command,) = SERVICE["ExecStopPost"]
    assert command.startswith("-+"), "systemctl needs root, and there may be no socket unit"
    assert "systemctl --no-block stop nbdmirror@%i.socket" in command
    for code in (*range(5), errors.DiskFailed.exit_code, env.EXIT_MISTAKE, "KILL", ""):
        words = shlex.split(command.replace("$$", "$").replace("exec systemctl", "echo"))[1:]
        told = subprocess.run(
            ["/bin/sh", *words],
            env={"EXIT_STATUS": str(code)},
            capture_output=True,
            text=True,
            check=True,
        )
        prevented = str(code) in SERVICE["RestartPreventExitStatus"][0].split()
        assert ("nbdmirror@%i.socket" in told.stdout) == prevented, code


def test_the_socket_unit_makes_what_the_daemon_would() -> None:
    """The paths of the examples, the same owner and mode."""
    made = settings(DEPLOY / "nbdmirror@.socket")
    config = tomllib.loads((EXAMPLES / "alpha.toml").read_text())
    listen = [path.replace("%i", config["group"]) for path in made["ListenStream"]]
    assert listen == [
        config["nbd"]["listen"][0].removeprefix("unix:"),
        config["admin"]["socket"],
    ]
    assert int(made["SocketMode"][0], 8) == sockets.UNIX_MODE
    assert made["SocketUser"] == SERVICE["User"] and made["SocketGroup"] == SERVICE["Group"]
    assert made["FileDescriptorName"][0] in sockets.NAMES


def test_a_mistake_of_the_program_is_no_failed_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python's own exit code for a traceback is 1, which means something else here."""

    def broken(path: str) -> None:
        raise AssertionError("a mistake")

    monkeypatch.setattr(daemon, "load", broken)
    assert daemon.serve(str(tmp_path / "x.toml")) == env.EXIT_MISTAKE
    assert JOURNAL.flush()
    assert "a mistake" in capfd.readouterr().err


def test_a_client_waits_longer_than_a_restart_takes() -> None:
    """A hang is noticed, and the daemon started again, within attach's default patience (60 s)."""
    assert float(SERVICE["WatchdogSec"][0]) + float(SERVICE["RestartSec"][0]) <= 45


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away: needs root")
def test_user_and_directories(tmp_path: Path) -> None:
    """sysusers and tmpfiles make what the units name."""
    (tmp_path / "etc").mkdir()
    run("systemd-sysusers", f"--root={tmp_path}", str(DEPLOY / "nbdmirror.sysusers"))
    passwd = (tmp_path / "etc/passwd").read_text()
    (user,) = SERVICE["User"]
    assert re.search(rf"^{user}:.*:/usr/sbin/nologin$", passwd, re.MULTILINE), passwd
    run("systemd-tmpfiles", "--create", f"--root={tmp_path}", str(DEPLOY / "nbdmirror.tmpfiles"))
    uid = int(passwd.split(f"{user}:x:")[1].split(":")[0])
    for path, owner, mode in (
        ("etc/nbdmirror", 0, 0o750),
        ("run/nbdmirror", uid, int(SERVICE["RuntimeDirectoryMode"][0], 8)),
        ("var/lib/nbdmirror", uid, int(SERVICE["StateDirectoryMode"][0], 8)),
        ("srv/nbdmirror", uid, 0o700),
    ):
        found = (tmp_path / path).stat()
        assert (found.st_uid, found.st_mode & 0o777) == (owner, mode), path
        assert found.st_gid != 0, path


# -- sd_notify -----------------------------------------------------------------------------------


class Service:
    """The daemon as systemd runs it: a notify socket and a watchdog."""

    def __init__(self, config: Path, log: Path) -> None:
        self.notifier = NotifySocket()
        usec = str(int(WATCHDOG_S * 1e6))
        self.process = Process(
            "service",
            [sys.executable, "-m", "nbdmirror", "serve", str(config)],
            log,
            env={"NOTIFY_SOCKET": self.notifier.path, "WATCHDOG_USEC": usec},
        )

    def message(self, seconds: float) -> list[str]:
        """The next message, as its lines; none after so many seconds."""
        ready, _, _ = select.select([self.notifier.socket], [], [], seconds)
        return self.notifier.socket.recv(4096).decode().split("\n") if ready else []

    def until(self, line: str, seconds: float) -> None:
        """Reads messages up to the one with this line."""
        end = time.monotonic() + seconds
        while line not in (lines := self.message(max(end - time.monotonic(), 0))):
            if not lines:
                raise self.process.failure(f"does not say {line} within {seconds:g} s")

    def silent(self) -> bool:
        """Whether the watchdog would bite: behind what was under way already, nothing comes."""
        end = time.monotonic() + WATCHDOG_S / 4
        while (left := end - time.monotonic()) > 0:
            self.message(left)
        return self.message(WATCHDOG_S * 1.2) == []

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.notifier.close()


@pytest.fixture
def service(
    make_cluster: Callable[..., Cluster], frontend: str, tmp_path: Path
) -> Iterator[Service]:
    """A primary alone, started; it has not said anything yet."""
    cluster = make_cluster(frontend=frontend, remotes=())
    cluster.create()
    made = Service(cluster.primary.config, tmp_path / "log")
    yield made
    made.close()


def test_ready_alive_stopping(service: Service) -> None:
    """READY=1, WATCHDOG=1 again and again in time, STOPPING=1, exit code 0."""
    service.until("READY=1", READY_S)
    for _ in range(3):
        service.until(notify.WATCHDOG, WATCHDOG_S)
    service.process.signal(signal.SIGHUP)
    service.until("RELOADING=1", READY_S)
    service.until("READY=1", READY_S)
    service.process.signal(signal.SIGTERM)
    service.until("STOPPING=1", READY_S)
    assert service.process.stop() == 0


def test_a_loop_that_hangs_is_silent(service: Service, frontend: str) -> None:
    """The sign of life is that of the loop with the volumes in it: nbdkit's, where it is there."""
    service.until("READY=1", READY_S)
    pid = service.process.pid
    if frontend == "nbdkit":
        (pid,) = children(pid)
    os.kill(pid, signal.SIGSTOP)
    assert service.silent()
    os.kill(pid, signal.SIGCONT)
    service.until(notify.WATCHDOG, WATCHDOG_S)
    assert service.process.stop() == 0


def test_an_nbdkit_that_comes_back_is_waited_for(
    make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """Between two nbdkits the supervisor gives the sign of life."""
    cluster = make_cluster(frontend="nbdkit", remotes=())
    cluster.create()
    service = Service(cluster.primary.config, tmp_path / "log")
    try:
        service.until("READY=1", READY_S)
        (old,) = children(service.process.pid)
        os.kill(old, signal.SIGKILL)
        wait_until("another nbdkit runs", lambda: set(children(service.process.pid)) - {old})
        service.until("READY=1", READY_S)
        service.until(notify.WATCHDOG, WATCHDOG_S)
        assert service.process.stop() == 0
    finally:
        service.close()


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        (None, None, None),
        ("30000000", None, 30.0),
        ("30000000", "1", None),  # meant for another process
        ("30000000", "ours", 30.0),
        ("0", None, None),
        ("x", None, None),
    ],
)
def test_watchdog_is_asked_for(
    usec: str | None, pid: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sd_watchdog_enabled(3)."""
    pid = str(os.getpid()) if pid == "ours" else pid
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert notify.watchdog_seconds() == seconds


# -- the examples --------------------------------------------------------------------------------


class Pair:
    """The two example configurations on this machine: other places and sizes, all else as it is."""

    def __init__(self, frontend: str) -> None:
        # Sockets have short paths.
        self.root = Path(tempfile.mkdtemp(prefix="pair-"))
        self.replication = f"tcp:127.0.0.1:{free_port()}"
        self.processes: dict[str, Process] = {}
        authority = Authority(self.root / "ca")
        for node in ("alpha", "beta"):
            tls = self.root / node / "etc/nbdmirror/tls"
            shutil.copytree(authority.node(node), tls)
            text = (EXAMPLES / f"{node}.toml").read_text()
            for old, new in (
                ('"/', f'"{self.root}/{node}/'),
                ("unix:/", f"unix:{self.root}/{node}/"),
                ("tcp:192.0.2.2:10810", self.replication),
                ('"8GiB"', '"32MiB"'),
                ('"100GiB"', '"64MiB"'),
                ("[nbd]\n", f'[nbd]\nfrontend = "{frontend}"\n'),
            ):
                assert old in text or node == "beta", f"{old} is not in the example any more"
                text = text.replace(old, new)
            for directory in ("srv/nbdmirror/db", "run/nbdmirror", "var/lib/nbdmirror"):
                (self.root / node / directory).mkdir(parents=True)
            self.config(node).write_text(text)

    def config(self, node: str) -> Path:
        """The configuration file of a node."""
        return self.root / f"{node}.toml"

    def serve(self, node: str) -> None:
        """Starts a daemon under strace; returns when it is ready."""
        self.processes[node] = Process(
            node,
            ["strace", "-f", "-qq", "-o", str(self.root / f"{node}.strace"), "-e", "signal=none"]
            + [sys.executable, "-m", "nbdmirror", "serve", str(self.config(node))],
            self.root / f"{node}.log",
            notify=READY_S,
        )

    def stop(self, node: str) -> None:
        """A clean stop: the signal goes to the daemon, not to strace."""
        process = self.processes[node]
        (pid,) = children(process.pid)
        os.kill(pid, signal.SIGTERM)
        assert process.popen.wait(READY_S) == 0, process.failure("did not stop cleanly")

    def calls(self, node: str) -> set[str]:
        """The system calls that a daemon made."""
        text = (self.root / f"{node}.strace").read_text()
        return set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)(?:\(| resumed)", text, re.MULTILINE))

    def ok(self, *args: str) -> str:
        """A command that must succeed."""
        result = nbdmirror(*args)
        assert result.code == 0, result
        return result.out

    def close(self) -> None:
        """Ends what runs."""
        for process in self.processes.values():
            for pid in children(process.pid) if process.alive else []:
                os.kill(pid, signal.SIGKILL)
            process.kill()
        shutil.rmtree(self.root)


@pytest.fixture
def pair(frontend: str) -> Iterator[Pair]:
    """The examples, not created yet."""
    made = Pair(frontend)
    yield made
    made.close()


def allowed_calls() -> set[str]:
    """The system calls that the unit leaves to the daemon."""
    allowed: set[str] = set()
    for value in SERVICE["SystemCallFilter"]:
        names = {name for part in value.removeprefix("~").split() for name in call_set(part)}
        allowed = allowed - names if value.startswith("~") else allowed | names
    return allowed


def call_set(name: str) -> set[str]:
    """A system call, or those of a ``@set``, as systemd knows it."""
    if not name.startswith("@"):
        return {name}
    listed = run("systemd-analyze", "--no-pager", "syscall-filter", name).splitlines()[1:]
    parts = [line.strip() for line in listed if not line.strip().startswith("#")]
    return {call for part in parts if part for call in call_set(part)}


def test_examples_run_with_the_calls_that_the_unit_allows(pair: Pair) -> None:
    """check, create, serve, write, stop with the examples; the seccomp filter would not bite."""
    for node, role in (("beta", "secondary"), ("alpha", "primary")):
        assert "good" in pair.ok("check", str(pair.config(node)))
        pair.ok("create", str(pair.config(node)), "--role", role)
        pair.serve(node)
    pair.ok("-c", str(pair.config("alpha")), "wait", "--until", "in-sync", "--timeout", "60")
    handle = connect(f"nbd+unix:///data?socket={pair.root}/alpha/run/nbdmirror/db.nbd")
    handle.pwrite(pattern(MIB, 1), 0)
    handle.zero(MIB, 2 * MIB)
    handle.trim(64 << 10, 0)
    handle.flush()
    assert handle.pread(4096, MIB - 4096) == pattern(MIB, 1)[-4096:]
    handle.shutdown()
    pair.ok("-c", str(pair.config("alpha")), "wait", "--until", "in-sync", "--timeout", "60")
    for node in ("alpha", "beta"):
        pair.stop(node)
        calls = pair.calls(node)
        assert {"pwritev", "pwrite64"} & calls and "bind" in calls, "strace saw nothing"
        assert calls - allowed_calls() == set()
    run("cmp", *(f"{pair.root}/{node}/srv/nbdmirror/db/data.img" for node in ("alpha", "beta")))


def test_examples_fit_each_other() -> None:
    """As they are: the same group and volumes, alpha sends to where beta listens."""
    alpha, beta = (tomllib.loads((EXAMPLES / f"{n}.toml").read_text()) for n in ("alpha", "beta"))
    assert alpha["group"] == beta["group"] and alpha["volume"] == beta["volume"]
    (remote,) = alpha["remote"]
    assert (remote["name"], remote["address"]) == (beta["node"], beta["replication"]["listen"])


# -- the text ------------------------------------------------------------------------------------


def test_every_event_is_explained() -> None:
    """The table of events has all kinds that the program emits, and no other."""
    emitted = set()
    for path in (TREE / "nbdmirror").rglob("*.py"):
        text = path.read_text()
        emitted |= set(re.findall(r'\bemit\(\s*"([a-z-]+)"', text))
        emitted |= set(re.findall(r'\.tell\("(snapshot[a-z-]*)"', text))
    table = (DEPLOY / "README.md").read_text().split("## Events")[1].split("\n\n", 2)[2]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {kind for cell in first for kind in re.findall("`(.*?)`", cell)} == emitted


def test_the_fields_of_events_that_the_table_names_are_there() -> None:
    """A script looks for them by that name."""
    source = "".join(path.read_text() for path in (TREE / "nbdmirror").rglob("*.py"))
    table = (DEPLOY / "README.md").read_text().split("## Events")[1]
    for field in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", table):
        assert re.search(rf"\b{field}\b", source), field


def test_the_text_names_files_that_are_there() -> None:
    """Every file of ``deploy/`` is in its README, and every example that it names exists."""
    text = (DEPLOY / "README.md").read_text()
    for path in (*DEPLOY.glob("nb*"), *EXAMPLES.iterdir()):
        assert path.name in text, path
    for name in re.findall(r"examples/([\w.-]+)", text):
        assert (EXAMPLES / name).exists(), name
