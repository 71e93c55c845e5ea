"""What commands ask of a daemon, what it answers, and with which words it refuses (X4)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nbdmirror.cli.main import main
from tests.unit.cli import Output
from tests.unit.fake_node import FakeNode

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


def test_a_closed_output_is_no_failure(path: str, node: FakeNode) -> None:
    """What was done is done, with nobody to read it: ``nbdmirror pause beta >&-``."""
    words = f'exec "{sys.executable}" -m nbdmirror -s "{path}" pause beta >&-'
    done = subprocess.run(["/bin/sh", "-c", words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert node.calls == [("pause", "beta")]
    node.in_sync.set()
    words = words.replace("pause beta", "wait --until in-sync")
    done = subprocess.run(["/bin/sh", "-c", words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


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


# Snapshots.


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


def test_export_where_no_client_can_attach_is_exit_1(path: str, capsys: Output) -> None:
    """V9: a script would take an empty line for a URI; a list may be empty."""
    assert main(["-s", path, "snapshot", "export", "4"]) == 1
    out, error = capsys.readouterr()
    assert out == "" and "[nbd] listen" in error
    assert main(["-s", path, "snapshot", "export", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["uris"] == []


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
    assert main(["-s", path, "changed", "data", "²+4096"]) == 2  # a digit, and no number
