"""What people are shown of a node: once, again and again, or until something is reached (X4)."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from nbdmirror.cli import online
from nbdmirror.cli.main import main
from nbdmirror.errors import NbdmirrorError
from tests.unit.cli import Output
from tests.unit.fake_node import FakeNode, Json


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
