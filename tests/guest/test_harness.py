"""The guest itself: it runs the host's programs, talks to the host, and loses its power."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest import guest
from tests.guest.guest import Disk, GuestError
from tests.guest.kernel import TREE

SECONDS = 180.0


def test_hello() -> None:
    """A job runs with the host's Python and the tree, and its answers come from the host."""
    environment = {"TREE": str(TREE)}
    outcome = guest.run(
        "hello", SECONDS, environment=environment, answer=lambda words: " ".join(words[1:])
    )
    outcome.check()
    assert "] hello" in outcome.serial


def test_failure_is_seen() -> None:
    """A job that fails fails the test, with what it printed."""
    with pytest.raises(GuestError, match="the job ended with 1"):
        guest.run("hello", SECONDS, answer=lambda words: "something else").check()


def test_power_cut(tmp_path: Path) -> None:
    """What was synced is on the disk after a power cut, what was not is gone (fault 4)."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    outcome = guest.run("power_cut", SECONDS, disks=[Disk(disk)])
    assert outcome.code is None
    data = disk.read_bytes()
    assert data[: 64 << 10] == b"s" * (64 << 10)
    assert data[64 << 10 :] == bytes(len(data) - (64 << 10))
