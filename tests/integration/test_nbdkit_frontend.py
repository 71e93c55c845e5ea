"""What is special about the nbdkit front end: its supervisor, its end, and nbdkit's own faults.

That it serves volumes as the native one does is shown by the tests with the ``frontend`` fixture.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration import rawnbd
from tests.integration.cluster import MIB, Cluster, Json, Node, Volume, nbdmirror
from tests.integration.process import Process, wait_until
from tests.integration.rawnbd import RawClient
from tests.integration.tools import Fio, Writer, connect, nbd_error, pattern, requires

pytestmark = requires("nbdkit")
GIB = 1 << 30
RESTARTS_MAX = 5
MakeCluster = Callable[..., Cluster]


@pytest.fixture
def alone(make_cluster: MakeCluster) -> Iterator[Node]:
    """A primary without remotes, served by nbdkit."""
    cluster = make_cluster(frontend="nbdkit", remotes=()).start(synced=False)
    yield cluster.primary


def nbdkit_of(node: Node, *, after: int = 0) -> int:
    """The process id of the nbdkit below the daemon; ``after``: of the one that follows this."""
    pid = node.daemon.pid

    def find() -> int | None:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return next((int(child) for child in children if int(child) != after), None)

    return wait_until("nbdkit runs", find)


def gone(pid: int) -> bool:
    """Whether there is no such process (a zombie is gone)."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def exit_code(node: Node) -> int:
    """Waits for the end of a daemon that ends by itself."""
    code = node.daemon.popen.wait(60)
    node.kill()  # gives back what the harness holds for it
    return code


def superblock(node: Node) -> Json:
    """The durable state of a stopped node."""
    result = nbdmirror("dump", "superblock", str(node.config), "--json")
    assert result.code == 0, result
    state: Json = result.json
    return state


def last_start(node: Node) -> Json:
    """The ``started`` event of the run that serves now."""
    return next(event for event in node.events() if event["kind"] == "started")


# -- the end -------------------------------------------------------------------------------------


@requires("fio")
def test_sigterm_under_load_stops_cleanly(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """Point 3 of the nbdkit front end: SIGTERM with four busy and one silent client; the end is
    clean, and what was acknowledged is there, on both sides."""
    cluster = make_cluster(frontend="nbdkit").start()
    node = cluster.primary
    silent = connect(node.uri())
    silent.pwrite(pattern(MIB, 7), 60 * MIB)
    load = {"rw": "randwrite", "bs": "4k", "iodepth": 16, "size": "32m", "time_based": True}
    with Fio(node.uri(), tmp_path, numjobs=4, runtime=60, **load) as client:
        records = node.status()["log"]["next_seq"]
        wait_until("the load runs", lambda: node.status()["log"]["next_seq"] > records + 2000)
        node.stop()
        client.kill()
    assert superblock(node)["clean"] is True
    node.start()
    assert last_start(node)["clean"] is True
    assert connect(node.uri()).pread(MIB, 60 * MIB) == pattern(MIB, 7)
    cluster.check_in_sync()


def test_request_in_flight_is_answered_at_the_end(alone: Node) -> None:
    """A request that was begun when SIGTERM comes is finished and answered, then comes the end of
    the connection: never a reply that is half."""
    replies = bytearray()
    with RawClient(alone.nbd_socket) as client:
        client.go("data")
        burst = (request(rawnbd.WRITE, n, n * 4096, 4096) + bytes(4096) for n in range(64))
        client.send(b"".join(burst))
        replies += client.receive(16)
        alone.daemon.signal(signal.SIGTERM)
        # What nbdkit had not read of the requests makes the end of the connection a reset.
        with contextlib.suppress(ConnectionResetError):
            while part := client.socket.recv(1 << 16):
                replies += part
    assert len(replies) % 16 == 0
    assert exit_code(alone) == 0
    assert superblock(alone)["clean"] is True


def test_sigterm_at_nbdkit_itself(alone: Node) -> None:
    """nbdkit waits for its clients when it ends; a silent one must not keep it. It ends cleanly,
    and the supervisor, which was not told to stop, starts it again."""
    first = nbdkit_of(alone)
    handle = connect(alone.uri())
    handle.pwrite(pattern(4096, 3), 0)
    os.kill(first, signal.SIGTERM)
    wait_until("nbdkit has ended", lambda: gone(first))
    assert connect(alone.uri()).pread(4096, 0) == pattern(4096, 3)
    assert last_start(alone)["clean"] is True


def test_sighup_reads_the_configuration(alone: Node) -> None:
    """interface.md: SIGHUP reloads; to a bare nbdkit it would be the end. Connections stay."""
    handle = connect(alone.uri())
    first = nbdkit_of(alone)
    alone.write_config("[limits]\nconnections_max = 7\n")
    alone.reload()
    reloaded = wait_until(
        "the reload is an event",
        lambda: [event for event in alone.events() if event["kind"] == "reloaded"],
    )
    assert reloaded[0]["needs_restart"] == ["limits"]
    handle.pwrite(pattern(4096, 1), 0)
    assert nbdkit_of(alone) == first


def test_a_reload_while_nbdkit_starts_again(alone: Node) -> None:
    """It may have read already what is to be read again: it is told once it serves."""
    first = nbdkit_of(alone)
    os.kill(first, signal.SIGKILL)
    nbdkit_of(alone, after=first)
    alone.daemon.signal(signal.SIGHUP)

    def reloaded() -> bool:
        return alone.cli("status").code == 0 and "reloaded" in {e["kind"] for e in alone.events()}

    wait_until("the reload is an event", reloaded)


# -- nbdkit dies ---------------------------------------------------------------------------------


@requires("fio")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_nbdkit_dies_under_load(
    make_cluster: MakeCluster, tmp_path: Path, number: signal.Signals
) -> None:
    """An nbdkit that aborts or is killed is started again and recovers (semantics 4, same boot):
    whoever connects waits for it, no acknowledged write is lost, no resync is needed."""
    cluster = make_cluster(frontend="nbdkit").start()
    node = cluster.primary
    first = nbdkit_of(node)
    handle = connect(node.uri())
    handle.pwrite(pattern(16 * MIB, 5), 32 * MIB)
    with pytest.raises(nbd_error()), Writer(node.uri()) as writer:
        wait_until("the load runs", lambda: writer.writes > 200)
        os.kill(first, number)
        # The sockets are the supervisor's: no connection is refused.
        assert connect(node.uri()).pread(16 * MIB, 32 * MIB) == pattern(16 * MIB, 5)
    events = {event["kind"]: event for event in node.events()}
    assert number.name in events["nbdkit-restarted"]["why"]
    assert events["started"]["clean"] is False
    cluster.check_in_sync()
    node.stop()
    assert superblock(node)["clean"] is True


def test_restarts_are_bounded(alone: Node) -> None:
    """One that dies again and again ends the daemon, with exit code 1 and the reason."""
    pid = nbdkit_of(alone)
    for _ in range(RESTARTS_MAX):
        os.kill(pid, signal.SIGKILL)
        pid = nbdkit_of(alone, after=pid)
        wait_until("it serves", lambda: alone.cli("status").code == 0)
    os.kill(pid, signal.SIGKILL)
    assert exit_code(alone) == 1
    assert "SIGKILL" in alone.daemon.output() and "6 times" in alone.daemon.output()
    assert not alone.nbd_socket.exists()


def test_killed_supervisor_takes_nbdkit_with_it(alone: Node) -> None:
    """No nbdkit is left over to write to the state beside its successor."""
    first = nbdkit_of(alone)
    connect(alone.uri()).pwrite(pattern(4096, 9), 0)
    for _ in range(3):
        alone.kill()
        alone.start()
        assert gone(first)
        first = nbdkit_of(alone)
    assert connect(alone.uri()).pread(4096, 0) == pattern(4096, 9)


# -- what aborts Debian's nbdkit -----------------------------------------------------------------


def request(kind: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    """A request without its payload."""
    return struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length)


def test_hang_up_with_requests_in_flight(alone: Node) -> None:
    """nbd.md 1.8, 1: clients that go with 16 slow requests in flight; nbdkit stays."""
    first = nbdkit_of(alone)
    durable = (request(rawnbd.WRITE, n, n << 16, 4096, rawnbd.FUA) + bytes(4096) for n in range(16))
    burst = b"".join(durable)
    for _ in range(20):
        with RawClient(alone.nbd_socket) as client:
            client.go("data")
            client.send(burst)
    connect(alone.uri()).pwrite(pattern(4096, 1), 0)
    assert nbdkit_of(alone) == first


def test_fast_zero_does_not_abort(alone: Node) -> None:
    """nbd.md 1.8, 2: FAST_ZERO is offered and kept: the range is zeros, at once."""
    first = nbdkit_of(alone)
    handle = connect(alone.uri())
    assert handle.can_fast_zero()
    handle.pwrite(pattern(MIB, 1), 0)
    flag = 1 << 4
    handle.zero(MIB, 0, flag)
    handle.zero(MIB, 0, flag | 1 << 1)
    assert handle.pread(MIB, 0) == bytes(MIB)
    assert nbdkit_of(alone) == first


def test_block_status_beyond_4_gib(make_cluster: MakeCluster) -> None:
    """nbd.md 1.8, 3: one hole of 9 GiB, asked for with the largest length there is."""
    volume = Volume(size=9 * GIB)
    node = make_cluster(frontend="nbdkit", remotes=(), volumes=[volume]).start(synced=False).primary
    first = nbdkit_of(node)
    handle = connect(node.uri(), contexts=["base:allocation"], strict=False)
    seen: list[int] = []
    handle.block_status(0xFFFFFFFF, 0, lambda _name, _at, entries, _error: seen.extend(entries))
    assert seen[0] <= 0xFFFFFFFF and seen[1] == 3
    assert nbdkit_of(node) == first


# -- limits and refusals -------------------------------------------------------------------------


def test_connections_are_bounded(make_cluster: MakeCluster) -> None:
    """I6: connections above the limit are refused, silent ones count, one that goes makes room."""
    cluster = make_cluster(frontend="nbdkit", remotes=())
    node = cluster.primary
    node.write_config("[limits]\nconnections_max = 4\n")
    cluster.start(synced=False)

    def connected() -> bool:
        try:
            connect(node.uri())
        except nbd_error():
            return False
        return True

    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(RawClient(node.nbd_socket)) for _ in range(4)]
        assert not connected()
        silent[0].socket.close()
        wait_until("there is room again", connected)


def test_no_state_is_said(make_cluster: MakeCluster) -> None:
    """A node that was never created: exit code, message and hint as with the native front end."""
    node = make_cluster(frontend="nbdkit", remotes=()).primary
    result = nbdmirror("serve", str(node.config))
    assert result.code == 1
    assert "no state of a node in" in result.err and "nbdmirror create" in result.err
    assert "Traceback" not in result.err
    assert not node.nbd_socket.exists()


def test_recovery_error_is_said(alone: Node) -> None:
    """What only the start of the node finds out: the log is missing."""
    alone.stop()
    (alone.directory / "state" / "log").unlink()
    result = nbdmirror("serve", str(alone.config))
    assert result.code == 1
    assert "is missing" in result.err and "Traceback" not in result.err


def test_missing_nbdkit_is_said(alone: Node, tmp_path: Path) -> None:
    """Exit code 2, and what to do."""
    alone.stop()
    shutil.copy("/bin/true", tmp_path / "true")
    environment = {**os.environ, "PATH": str(tmp_path)}
    result = nbdmirror("serve", str(alone.config), env=environment)
    assert result.code == 2
    assert "nbdkit" in result.err and "native" in result.err


def test_another_python_comes_first_in_the_path(
    alone: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nbdkit's Python takes its library from there by itself, as for who uses pyenv."""
    alone.stop()
    library = tmp_path / f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    (library / "lib-dynload").mkdir(parents=True)
    (library / "os.py").write_text("raise ImportError('of another Python')\n")
    (tmp_path / "bin").mkdir()
    shutil.copy("/bin/true", tmp_path / "bin/python3")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    alone.start()
    assert connect(alone.uri()).pread(4096, 0) == bytes(4096)


def test_another_build_of_the_same_python(
    alone: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon's Python has a library of its own, whose extension modules are not for nbdkit's
    Python, which is of the same version but for the last number."""
    alone.stop()
    library = tmp_path / f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    library.mkdir(parents=True)
    for entry in Path(os.__file__).parent.iterdir():
        (library / entry.name).symlink_to(entry)
    ssl = library / "ssl.py"
    text = ssl.read_text()
    ssl.unlink()
    not_in_nbdkit = "import sys\nif not sys.orig_argv: raise ImportError('undefined symbol')\n"
    ssl.write_text(not_in_nbdkit + text)
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    alone.start()
    assert connect(alone.uri()).pread(4096, 0) == bytes(4096)


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_started_with_standard_streams_closed(alone: Node, tmp_path: Path, closed: str) -> None:
    """What the daemon has opened in their place is there for nbdkit, which refuses to run without
    them: it did so without a word, or seemed to have no Python plugin."""
    alone.stop()
    words = f'exec "$0" -m nbdmirror serve "$1" {closed}'
    argv = ["/bin/sh", "-c", words, sys.executable, str(alone.config)]
    daemon = Process("serve", argv, tmp_path / "output", notify=60)
    try:
        assert connect(alone.uri()).pread(4096, 0) == bytes(4096)
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_a_journal_that_nobody_reads_stops_nobody(alone: Node, tmp_path: Path) -> None:
    """I8: stderr is a pipe that is full. nbdkit itself says which export there is not, and has the
    interpreter meanwhile: it must not wait for anyone."""
    alone.stop()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)  # the daemon's own end waits for room
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"-" * MIB)
    words = 'exec "$0" -m nbdmirror serve "$1" 2>"$2"'
    argv = ["/bin/sh", "-c", words, sys.executable, str(alone.config), str(fifo)]
    daemon = Process("serve", argv, tmp_path / "output", notify=60)
    try:
        with RawClient(alone.nbd_socket) as other:
            other.go("data")
            for _ in range(200):  # more than what a pipe to the supervisor would take unread
                with RawClient(alone.nbd_socket) as client:
                    assert client.go("x" * 1000)[-1].kind == rawnbd.REP_ERR_UNKNOWN
            other.check_usable()
            assert alone.cli("status").code == 0
        said = bytearray()

        def told() -> bool:
            with contextlib.suppress(BlockingIOError):
                said.extend(os.read(pipe, MIB))
            return said.count(b"no export") >= 200

        wait_until("what was said comes once somebody reads", told)
        # Whole lines; which of the two processes that share the pipe is first, nothing says.
        assert re.search(rb"[-\n]started {", said) and re.search(rb"[-\n]nbdkit: python", said)
        assert daemon.stop() == 0
    finally:
        daemon.kill()
        os.close(pipe)


def test_the_last_words_of_nbdkit_are_told(alone: Node, tmp_path: Path) -> None:
    """All of what one says that cannot start, also without an end of line, and however long."""
    alone.stop()
    script = tmp_path / "nbdkit"
    script.write_text(
        "#!/bin/sh\n"
        f"[ $2 = --dump-plugin ] && echo python_version={sys.version.split()[0]} && exit\n"
        "printf '%0200000d, this is the end' 1 >&2\n"
        "exit 3\n"
    )
    script.chmod(0o755)
    environment = {**os.environ, "PATH": str(tmp_path)}
    result = nbdmirror("serve", str(alone.config), env=environment)
    assert result.code == 1
    long, end = result.err.split("1, this is the end\n")
    assert long.replace("\n", "") == "0" * 199_999
    assert end.startswith("nbdmirror: nbdkit ended with exit code 3 before it served")


def test_one_process_per_state(alone: Node, tmp_path: Path) -> None:
    """A second daemon for the same state waits a moment, then refuses; the first is untouched."""
    second = tmp_path / "second.toml"
    text = alone.config.read_text().replace('frontend = "nbdkit"', 'frontend = "native"')
    for path in (alone.nbd_socket, alone.admin_socket):
        text = text.replace(str(path), f"{path}2")
    second.write_text(text)
    result = nbdmirror("serve", str(second))
    assert result.code == 1 and "another process" in result.err
    connect(alone.uri()).pwrite(pattern(4096, 1), 0)


@requires("strace")
def test_failed_log_ends_the_daemon(alone: Node, tmp_path: Path) -> None:
    """O16: a sync of the log that fails is final: the client gets the error, the daemon ends with
    exit code 1 and the reason; it is not started again on a disk that lied."""
    handle = connect(alone.uri())
    handle.pwrite(pattern(4096, 1), 0)
    log = tmp_path / "strace"
    argv = ["strace", "-f", "-p", str(nbdkit_of(alone)), "-o", str(log)]
    argv += ["-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO"]
    tracer = Process("strace", argv, tmp_path / "tracer")
    try:
        wait_until("strace is attached", lambda: "attached" in tracer.output())
        with pytest.raises(nbd_error()):
            handle.flush()
        assert exit_code(alone) == 1
    finally:
        tracer.kill()
    assert "sync of the log" in alone.daemon.output()


# -- snapshots -----------------------------------------------------------------------------------


def test_what_is_written_into_a_snapshot_stays_there(make_cluster: MakeCluster) -> None:
    """V9: as with the native front end; the volume, and its remote, know nothing of it."""
    cluster = make_cluster(frontend="nbdkit").start()
    primary = cluster.primary
    handle = connect(primary.uri())
    handle.pwrite(pattern(MIB, 1), 0)
    handle.flush()
    primary.ok("snapshot", "create")
    handle.pwrite(pattern(MIB, 2), 0)
    reader = connect(primary.uri("data@1"))
    assert reader.is_read_only() and bytes(reader.pread(MIB, 0)) == pattern(MIB, 1)
    reader.shutdown()
    primary.ok("snapshot", "export", "1", "--writable")
    writer = connect(primary.uri("data@1"))
    writer.pwrite(pattern(4096, 3), 8192)
    writer.trim(4096, 65536)
    writer.flush()
    assert bytes(writer.pread(4096, 8192)) == pattern(4096, 3)
    assert bytes(writer.pread(4096, 65536)) == bytes(4096)
    assert bytes(handle.pread(MIB, 0)) == pattern(MIB, 2)
    cluster.check_in_sync()
