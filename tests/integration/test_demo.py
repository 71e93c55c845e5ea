"""``nbdmirror demo``: the tour of the main job, as anybody would take it (A6; I2)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from nbdmirror.cli.demo import _free_port
from tests.integration.cluster import MIB, nbdmirror
from tests.integration.process import wait_until


def test_the_tour_ends_well_and_tells_each_step() -> None:
    """It writes, loses the second node, overflows the log, heals, and both facets are the same."""
    result = nbdmirror("demo", "--json", timeout=170)
    assert result.code == 0, result
    assert result.err == ""
    told = result.lines
    assert [one["step"] for one in told] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [one["equal"] for one in told if "equal" in one] == [True, True]
    assert [one["state"] for one in told if "state" in one] == ["tracking"]
    (dirty,) = [one["dirty_regions"] for one in told if "dirty_regions" in one]
    assert 128 * MIB <= dirty * (64 << 10) <= 256 * MIB


def test_a_second_interrupt_leaves_no_daemon(tmp_path: Path) -> None:
    """``make run`` (A6): whoever presses Ctrl-C twice has both nodes stopped all the same."""
    ports = ["--nbd-port", str(_free_port()), "--replication-port", str(_free_port())]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "nbdmirror.cli.demo", "--state", str(tmp_path), *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What runs the tests may ignore it, as all that a shell has in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        _interrupt_twice(process)
    finally:
        process.kill()
        process.communicate()
    for node in ("alpha", "beta"):
        gone = lambda path=tmp_path / f"{node}.sock": not os.path.lexists(path)  # noqa: E731
        wait_until(f"{node} has ended", gone)


def _interrupt_twice(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    while "Ctrl-C" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    while "stopping both nodes" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors
