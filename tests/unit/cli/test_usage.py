"""Which daemon a command is for, what is no command, and ``check``, which needs none (X4)."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdmirror import __version__
from nbdmirror.cli import client, waiting
from nbdmirror.cli.main import main
from tests.unit.cli import Output
from tests.unit.fake_node import FakeNode, serving

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


def test_a_directory_that_may_not_be_looked_into_is_exit_1(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime directory is closed to others: that is not "no daemon there"."""
    real = os.scandir

    def scandir(path: str) -> object:
        if path == "/closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setenv("NBDMIRROR_RUNTIME_DIR", "/closed")
    assert main(["status"]) == 1
    assert "you may not look into /closed\n  be root" in capsys.readouterr().err


def test_a_directory_that_is_closed_does_not_hide_the_daemon_beside_it(
    path: str, node: FakeNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Somebody else's directory lies in the same runtime directory."""
    real, theirs = os.scandir, tmp_path / "theirs"
    theirs.mkdir()

    def scandir(path: str) -> object:
        if path == str(theirs):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert main(["status"]) == 0


def test_several_daemons_are_a_usage_error(path: str, node: FakeNode, capsys: Output) -> None:
    second = Path(path).parent / "second.sock"
    with serving(FakeNode(), second):
        assert main(["status"]) == 2
    error = capsys.readouterr().err
    assert path in error and str(second) in error and "-s or -c" in error


def test_a_socket_that_a_dead_daemon_left_is_no_second_daemon(path: str, capsys: Output) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(Path(path).with_name("dead.sock")))
    assert main(["status"]) == 0, capsys.readouterr().err


def test_the_sockets_of_two_dead_daemons_are_no_daemon(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDMIRROR_RUNTIME_DIR", str(tmp_path))
    for name in ("a.sock", "b.sock"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / name))
    assert main(["status"]) == 5
    assert "no daemon at any of" in capsys.readouterr().err


def test_a_daemon_whose_queue_is_full_is_there(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is busy, or hangs: nobody is told to start another one."""
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.1)
    path = str(tmp_path / "a.sock")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        queued = 0
        while queued == 0:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            queued = waiting.connect_ex(path)
        assert main(["-s", path, "status"]) == 5
    error = capsys.readouterr().err
    assert "has taken no connection" in error and "start it" not in error


@pytest.mark.parametrize(
    ("words", "until"),
    [
        (["wait", "--until", "in-sync"], "in-sync"),
        (["resync", "beta", "--wait"], "in-sync"),
        (["verify", "beta", "--wait"], "verified"),
        (["facet", "online", "/disk", "--wait"], "synchronised"),
    ],
)
def test_a_wait_ends_in_time_though_the_daemon_hangs(
    words: list[str], until: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel takes the connection; a script that waits 5 s must not wait for half a minute."""
    monkeypatch.setattr(waiting, "GRACE_SECONDS", 0.01)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "a.sock"))
        listener.listen()
        assert main(["-s", str(tmp_path / "a.sock"), *words, "--timeout", "0.01s"]) == 3
    error = capsys.readouterr().err
    assert f"not {until} after" in error and "has not answered" in error


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
    file = Path(config)
    file.write_text(file.read_text().replace('"1MiB"', '"1MB"'))
    assert main(["check", config]) == 2
    assert f"nbdmirror: {config}: volume[data].size: " in capsys.readouterr().err
