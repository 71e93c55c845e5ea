"""The command line against a real admin socket: output, exit codes, discovery (X4)."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror import __version__
from nbdmirror.cli import online
from nbdmirror.cli.main import main
from nbdmirror.errors import NbdmirrorError

from .fake_node import FakeNode, Json, serving

CONFIG = """
group = "db"
node = "alpha"
state_dir = "state"
[nbd]
listen = ["unix:db.nbd"]
[admin]
socket = "db.sock"
[[volume]]
name = "data"
size = "1MiB"
facets = ["data.img"]
[[remote]]
name = "beta"
address = "tcp:192.0.2.2:10810"
[replication]
insecure = true
"""

Output = pytest.CaptureFixture[str]


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def path(tmp_path: Path, node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The socket of a node that is served; the only one in the runtime directory."""
    monkeypatch.setenv("NBDMIRROR_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(online, "WAIT_STEP_SECONDS", 0.02)
    with serving(node, tmp_path / "db.sock"):
        yield str(tmp_path / "db.sock")


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "db.toml").write_text(CONFIG)
    return str(tmp_path / "db.toml")


def resyncing(done: int, total: int) -> Json:
    return {
        "kind": "dcm",
        "done_bytes": done,
        "total_bytes": total,
        "sent_bytes": done,
        "skipped_bytes": 0,
        "rate": 1048576,
        "eta_s": 3,
    }


# Which daemon.


def test_the_only_socket_is_found_also_in_a_subdirectory(
    tmp_path: Path, node: FakeNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDMIRROR_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "group").mkdir()
    (tmp_path / "file.sock").touch()
    with serving(node, tmp_path / "group" / "db.sock"):
        assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == node.state


@pytest.mark.parametrize("where", ["before", "behind"])
def test_socket_and_config_say_which(
    path: str, config: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDMIRROR_RUNTIME_DIR", "/nonexistent")
    for option in (["-s", path], ["-c", config]):
        words = [*option, "status"] if where == "before" else ["status", *option]
        assert main(words) == 0


def test_both_is_a_usage_error(path: str, config: str, capsys: Output) -> None:
    assert main(["-s", path, "status", "-c", config]) == 2
    assert (
        capsys.readouterr().err
        == "nbdmirror: -c and -s both say which daemon\n  give one of them\n"
    )


def test_no_daemon_is_exit_5(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDMIRROR_RUNTIME_DIR", str(tmp_path))
    assert main(["status"]) == 5
    assert f"there is no socket under {tmp_path}" in capsys.readouterr().err
    assert main(["-s", str(tmp_path / "none.sock"), "status"]) == 5
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "dead.sock"))
    dead.close()
    assert main(["status"]) == 5
    assert "Connection refused\n  start it with: nbdmirror serve" in capsys.readouterr().err


def test_several_daemons_are_a_usage_error(path: str, node: FakeNode, capsys: Output) -> None:
    second = Path(path).parent / "second.sock"
    with serving(FakeNode(), second):
        assert main(["status"]) == 2
    error = capsys.readouterr().err
    assert path in error and str(second) in error and "-s or -c" in error


def test_a_daemon_that_goes_away_is_exit_5(tmp_path: Path, capsys: Output) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "a.sock"))
    listener.listen()

    def hang_up() -> None:
        connection, _ = listener.accept()
        connection.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    assert main(["-s", str(tmp_path / "a.sock"), "status"]) == 5
    thread.join()
    listener.close()
    assert "closed the connection" in capsys.readouterr().err


def test_a_daemon_that_talks_nonsense_is_exit_1(tmp_path: Path, capsys: Output) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "a.sock"))
    listener.listen()

    def answer() -> None:
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(b"hello\n")
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    assert main(["-s", str(tmp_path / "a.sock"), "status"]) == 1
    thread.join()
    listener.close()
    assert "not a reply" in capsys.readouterr().err


# Usage.


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "a command is needed"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["wait"], "--until"),
        (["wait", "--until", "soon"], "invalid choice: 'soon'"),
        (["wait", "--until", "in-sync", "--timeout", "x"], "not a duration"),
        (["remote"], "ACTION"),
        (["resync"], "R"),
        (["status", "--nothing"], "--nothing"),
        (["create", "x.toml", "--role", "both"], "invalid choice: 'both'"),
        (["-s", "x", "check", "x.toml"], "check does not talk to a daemon"),
        (["attach", "/dev/nbd0", "/dev/nbd1"], "both devices"),
    ],
)
def test_wrong_usage_is_exit_2_with_a_message(
    words: list[str], problem: str, capsys: Output
) -> None:
    if "attach" in words:
        pytest.importorskip("nbdmirror.edge.attach")
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("nbdmirror: ")
    assert problem in output.err


def test_version_and_help(capsys: Output) -> None:
    for words in (["--version"], ["--help"], ["remote", "add", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"nbdmirror {__version__}\n")


# check.


def test_check_prints_what_would_be_served(config: str, tmp_path: Path, capsys: Output) -> None:
    assert main(["check", config]) == 0
    assert capsys.readouterr().out == (
        f"{config}: good\n"
        f"group db, node alpha, state in {tmp_path}/state\n"
        f"admin socket {tmp_path}/db.sock\n"
        "log 1 GiB, mode disk, on_full dcm\n"
        "volume data: 1 MiB, regions of 64 KiB\n"
        f"  uri nbd+unix:///data?socket={tmp_path}/db.nbd\n"
        f"  facet {tmp_path}/data.img: will be made\n"
        "remote beta: tcp:192.0.2.2:10810, async, compression off\n"
    )


def test_check_json(config: str, tmp_path: Path, capsys: Output) -> None:
    assert main(["check", config, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["volumes"][0]["uris"] == [f"nbd+unix:///data?socket={tmp_path}/db.nbd"]
    assert data["remotes"][0]["compression"] == "off"
    assert data["limits"]["connections_max"] == 100


def test_check_refuses_with_exit_2(config: str, capsys: Output) -> None:
    Path(config).write_text(CONFIG.replace('"1MiB"', '"1MB"'))
    assert main(["check", config]) == 2
    assert f"nbdmirror: {config}: volume[data].size: " in capsys.readouterr().err


# status.

STATUS_TEXT = """\
db on alpha: primary, up 12 s, generation 9f3c0123 epoch 4, version 0.1.0

volume   data: 100 GiB, regions of 64 KiB, 1 client
  uri    nbd+unix:///data?socket=/run/nbdmirror/db.nbd
  facet  /srv/db/data.img: synchronised

log      [----------] 4 KiB of 1 GiB used, mode disk
  seq    first 10, next 12, durable 11

remote   beta: tcp:192.0.2.2:10810, async
  link   connected
  state  synchronised
  lag    0 records, 0 B, 0.0 s
  next   nothing to do
"""


def test_status_text(path: str, capsys: Output) -> None:
    assert main(["status"]) == 0
    assert capsys.readouterr().out == STATUS_TEXT


def test_status_text_of_a_resync_says_why_and_what_next(
    path: str, node: FakeNode, capsys: Output
) -> None:
    node.state["volumes"][0]["facets"][0] |= {"state": "not-synchronised", "errors": 2}
    node.state["remotes"][0] |= {
        "state": "resyncing",
        "lag": {"records": 1, "bytes": 5120, "seconds": 205.2},
        "dirty": {"regions": 32, "bytes": 2097152},
        "resync": resyncing(1 << 20, 3 << 20),
        "why": "the log overflowed",
        "next_action": "wait",
    }
    assert main(["status"]) == 0
    text = capsys.readouterr().out
    assert "  facet  /srv/db/data.img: not-synchronised, 2 errors\n" in text
    assert text.endswith(
        "  state  resyncing\n"
        "  lag    1 record, 5 KiB, 3 m 25 s\n"
        "  dirty  32 regions, 2 MiB\n"
        "  resync dcm [########----------------]  33.3 %  1 MiB of 3 MiB, 1 MiB/s, 3.0 s left"
        ", 1 MiB sent, 0 B saved\n"
        "  why    the log overflowed\n"
        "  next   wait\n"
    )


def test_status_text_of_a_secondary(path: str, node: FakeNode, capsys: Output) -> None:
    node.state |= {
        "role": "secondary",
        "remotes": [],
        "upstream": {
            "name": "alpha",
            "link": "connected",
            "received_seq": 9,
            "durable_seq": 8,
            "applied_seq": 7,
        },
    }
    assert main(["status"]) == 0
    assert capsys.readouterr().out.endswith(
        "upstream alpha\n"
        "  link   connected\n"
        "  seq    received 9, durable 8, applied 7\n"
        "  next   nothing to do\n"
    )


def test_status_tolerates_what_is_not_there(path: str, node: FakeNode, capsys: Output) -> None:
    node.state = {"schema": 1, "group": "db", "node": "a", "volumes": [{}], "remotes": [{}]}
    assert main(["status"]) == 0
    assert capsys.readouterr().out.startswith("db on a: unknown\n")


def test_watch_prints_a_line_each_time_until_an_error(
    path: str, node: FakeNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "WATCH_SECONDS", 0.0)
    rounds = iter(range(3))
    status = node.status

    def three_times() -> Json:
        if next(rounds, None) is None:
            raise NbdmirrorError("enough")
        return status()

    monkeypatch.setattr(node, "status", three_times)
    assert main(["status", "--watch"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines
        == ["db on alpha: primary; beta: synchronised, link connected, lag 0 records, 0 B, 0.0 s"]
        * 3
    )


# wait and resync.


def test_wait_done(path: str, node: FakeNode, capsys: Output) -> None:
    node.in_sync.set()
    assert main(["wait", "--until", "in-sync", "--remote", "beta"]) == 0
    assert capsys.readouterr().out == "beta: in-sync\n"
    assert main(["wait", "--until", "connected", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"until": "connected", "remotes": ["beta"]}


def test_wait_timed_out_is_exit_3_and_says_where_it_stands(
    path: str, node: FakeNode, capsys: Output
) -> None:
    node.state["remotes"][0] |= {
        "state": "tracking",
        "link": "lost",
        "why": "connection refused",
        "next_action": "start the node beta",
    }
    assert main(["wait", "--until", "in-sync", "--timeout", "0.1"]) == 3
    output = capsys.readouterr()
    assert output.out == (
        "beta: tracking, link lost, connection refused, lag 0 records, 0 B, 0.0 s\n"
    )
    assert output.err == (
        "nbdmirror: not in-sync after 0.1 s: beta: tracking, link lost, connection refused, "
        "lag 0 records, 0 B, 0.0 s\n  start the node beta\n"
    )


def test_wait_timeout_0_asks_once(path: str, node: FakeNode) -> None:
    assert main(["wait", "--until", "in-sync", "--timeout", "0"]) == 3
    assert node.calls == [("wait", "in-sync", None, 0.0)]


def test_resync_starts(path: str, node: FakeNode, capsys: Output) -> None:
    assert main(["resync", "beta", "--full"]) == 0
    assert node.calls[0] == ("resync", "beta", True)
    assert capsys.readouterr().out == "beta: resync started\n"
    assert main(["resync", "beta", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"remote": "beta", "kind": "dcm"}


def in_steps(node: FakeNode, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The node's resync moves on with each status but the first, which tells the client what to
    wait for, and is done after ``steps`` of them."""
    taken = iter([None, *range(steps)])
    status = node.status

    def next_status() -> Json:
        step = next(taken, None)
        node.state["remotes"][0] |= {"state": "resyncing", "resync": resyncing(step or 0, steps)}
        if step == steps - 1:
            node.in_sync.set()
        return status()

    monkeypatch.setattr(node, "status", next_status)


def test_resync_wait_prints_plain_lines(
    path: str, node: FakeNode, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_steps(node, monkeypatch, 4)
    assert main(["resync", "beta", "--wait"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "dcm [######------------------]  25.0 %  1 B of 4 B, 1 MiB/s, 3.0 s left" in lines[1]
    assert lines[-1] == "beta: in-sync"
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_resync_wait_draws_a_bar_on_a_terminal(
    path: str, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_steps(node, monkeypatch, 3)
    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "nbdmirror", "-s", path, "resync", "beta", "--wait"]
    environment = {**os.environ, "COLUMNS": "200"}
    subprocess.run(words, stdout=follower, check=True, timeout=30, env=environment)
    os.close(follower)
    shown = b""
    try:
        while data := os.read(leader, 65536):
            shown += data
    except OSError:
        pass
    finally:
        os.close(leader)
    assert b"\r\x1b[Kbeta: resyncing" in shown
    assert b"33.3 %" in shown
    assert shown.endswith(b"\r\x1b[Kbeta: in-sync\r\n")


def test_resync_wait_stops_when_it_cannot_go_on(path: str, node: FakeNode, capsys: Output) -> None:
    node.state["remotes"][0] |= {
        "state": "refused",
        "why": "volume data has 1 GiB there, 2 GiB here",
        "next_action": "give both the same size",
    }
    assert main(["resync", "beta", "--wait"]) == 1
    error = capsys.readouterr().err
    assert "the resync does not go on: beta: refused" in error
    assert error.endswith("  give both the same size\n")


# pause, resume, remote, events.


def test_changes(path: str, node: FakeNode, capsys: Output) -> None:
    assert main(["pause", "beta"]) == 0
    assert main(["resume", "beta", "--json"]) == 0
    assert main(["remote", "add", "gamma", "tcp:c:1"]) == 0
    assert node.calls == [
        ("pause", "beta"),
        ("resume", "beta"),
        ("remote_add", "gamma", "tcp:c:1", "async"),
    ]
    assert capsys.readouterr().out == 'beta: paused\n{\n  "state": "behind"\n}\ngamma: added\n'


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["pause", "x"], 1, "nbdmirror: there is no remote x\n  remotes: beta\n"),
        (["remote", "remove", "beta"], 4, "nbdmirror: beta is not in sync\n  use --force\n"),
        (["remote", "add", "gamma", "c:1"], 2, "nbdmirror: remote.add: address 'c:1' is not"),
        (["remote", "add", "g", "tcp:c:1", "--mode", "x"], 2, "nbdmirror: remote.add: mode"),
        (["remote", "remove", "bug"], 1, "nbdmirror: internal error: ZeroDivisionError"),
    ],
)
def test_refusals_keep_message_hint_and_exit_code(
    path: str, words: list[str], code: int, message: str, capsys: Output
) -> None:
    assert main(words) == code
    assert capsys.readouterr().err.startswith(message)


def test_remote_list(path: str, node: FakeNode, capsys: Output) -> None:
    assert main(["remote", "list"]) == 0
    assert capsys.readouterr().out == (
        "beta: synchronised, link connected, lag 0 records, 0 B, 0.0 s\n"
    )
    assert main(["remote", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == node.state["remotes"]
    node.state["remotes"] = []
    assert main(["remote", "list"]) == 0
    assert capsys.readouterr().out == "no remotes\n"


def test_events_are_one_json_object_a_line(path: str, node: FakeNode, capsys: Output) -> None:
    first = node.events.emit("one")
    node.events.emit("two", remote="beta")
    assert main(["events", "--no-follow"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["one", "two"]
    assert main(["events", "--no-follow", "--since", str(first["cursor"])]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["remote"] == "beta"


def test_events_follow_until_the_reader_has_enough(path: str, node: FakeNode) -> None:
    node.events.emit("one")
    words = [sys.executable, "-m", "nbdmirror", "-s", path, "events"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["kind"] == "one"
        process.stdout.close()
        # The next event meets a closed pipe: a quiet end, not a traceback.
        main(["-s", path, "pause", "beta"])
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("command", "call", "shows"),
    [
        (["create", "data", "--protect"], ("snapshot create", "data", True), "record 41"),
        (["diff", "3", "--volume", "data"], ("snapshot diff", "3", None, "data"), "65536  131072"),
        (["delete", "3", "--everywhere"], ("snapshot delete", "3", True), "3: deleted"),
        (["refresh", "3"], ("snapshot refresh", "3"), "changed since 128 KiB"),
        (["export", "3", "--writable"], ("snapshot export", "3", True), "data@3"),
    ],
)
def test_snapshot_commands_reach_the_daemon(
    path: str,
    node: FakeNode,
    capsys: Output,
    command: list[str],
    call: tuple[object, ...],
    shows: str,
) -> None:
    """V9: what each command asks for, and that people are shown the answer."""
    assert main(["-s", path, "snapshot", *command]) == 0
    assert node.calls[-1] == call
    assert shows in capsys.readouterr().out


def test_snapshot_list_shows_number_uuid_record_and_both_counts(path: str, capsys: Output) -> None:
    """V9."""
    assert main(["-s", path, "snapshot", "list"]) == 0
    line = capsys.readouterr().out
    assert all(word in line for word in ("3", "01234567", "record 41", "128 KiB", "100 GiB"))
    assert main(["-s", path, "snapshot", "list", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["changed"] == {"regions": 2, "bytes": 131072}
    assert found["own"] == {"regions": 0, "bytes": 0}


def test_restore_and_changed_reach_the_daemon(path: str, node: FakeNode, capsys: Output) -> None:
    """V12, V13: the defaults keep the state before, and refuse what would surprise."""
    assert main(["-s", path, "restore", "3"]) == 0
    assert "the state before is snapshot 01234567" in capsys.readouterr().out
    options = ["--volume", "data", "--while-attached", "--no-keep", "--force"]
    assert main(["-s", path, "restore", "3", *options]) == 0
    assert main(["-s", path, "changed", "data", "0+512", "65536+4096", "--facet", "/f/1"]) == 0
    assert node.calls == [
        ("restore", "3", None, False, True, False),
        ("restore", "3", "data", True, False, True),
        ("changed", "data", [(0, 512), (65536, 4096)], "/f/1", False),
    ]
    assert main(["-s", path, "changed", "data", "0-512"]) == 2
