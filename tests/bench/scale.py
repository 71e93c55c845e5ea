"""What many volumes, many groups, a vast volume and a long log cost: ``tests.bench.scale``.

Pairs of nodes on this host with small, empty volumes: one volume, ``--volumes`` of them in one
group, ``--groups`` groups of one volume each, all running at once, one volume with logs of
``--logs`` GiB on the primary, and one of ``--vast`` TiB, with all that it needs on the tmpfs of
``--memory``, for few filesystems hold such a file. Told are the seconds from the primary's start
until it answers, until all is in sync the first time, and both once more after a restart, with
everything in place; what ``status`` takes; 4 KiB random writes a second over 16 connections at
depth 16 into the first GiB, with the remote connected; and the resident memory of a primary and of
a secondary after them. The table goes to standard output, the samples to ``tests/bench/results``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import report
from tests.integration.cluster import MIB, Cluster, Node, Volume
from tests.integration.tools import fio

SIZE = 64 * MIB
LOG = 64 * MIB
SYNC_S = 300.0
STATUS_CALLS = 9
CONNECTIONS = 16
WRITE_S = 3


def resident(node: Node) -> float:
    """MiB of a daemon's memory."""
    status = Path(f"/proc/{node.daemon.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def _status_ms(node: Node) -> float:
    taken = []
    for _ in range(STATUS_CALLS):
        began = time.monotonic()
        node.rpc("status")
        taken.append((time.monotonic() - began) * 1000)
    return median(taken)


def _writes(node: Node, volume: Volume, directory: Path) -> float:
    """Thousands a second."""
    load: dict[str, Any] = {
        "rw": "randwrite",
        "bs": 4096,
        "iodepth": 16,
        "size": min(volume.size, 1 << 30),
        "numjobs": CONNECTIONS,
        "group_reporting": True,
        "time_based": True,
        "runtime": WRITE_S,
        "norandommap": True,
    }
    return float(fio(node.uri(volume.name), directory, **load)["write"]["iops"]) / 1000


def measure(
    directory: Path, *, groups: int = 1, volumes: int = 1, log: int = LOG, size: int = SIZE
) -> dict[str, float]:
    """Starts that many pairs; the figures are of the one started last, beside the others."""
    named = [Volume(f"v{number}", size=size) for number in range(volumes)]
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        for number in range(groups):
            cluster = stack.enter_context(
                Cluster(
                    directory / f"group{number}",
                    volumes=named,
                    log_size=log,
                    remote_log_size=LOG,
                    proxied=False,
                    tuning={},
                )
            )
            began = time.monotonic()
            cluster.create()
            figures["create_s"] = time.monotonic() - began
            cluster.secondary.start()
            began = time.monotonic()
            cluster.primary.start()
            figures["start_s"] = time.monotonic() - began
            cluster.wait_in_sync(SYNC_S)
            figures["first_sync_s"] = time.monotonic() - began
        cluster.secondary.restart()
        cluster.primary.stop()
        began = time.monotonic()
        cluster.primary.start()
        figures["restart_s"] = time.monotonic() - began
        cluster.wait_in_sync(SYNC_S)
        figures["in_sync_s"] = time.monotonic() - began
        figures["status_ms"] = _status_ms(cluster.primary)
        figures["writes_k_s"] = _writes(cluster.primary, named[0], directory)
        figures["primary_mib"] = resident(cluster.primary)
        figures["secondary_mib"] = resident(cluster.secondary)
    shutil.rmtree(directory)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, stores the samples."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__)
    parser.add_argument("--volumes", type=int, default=200)
    parser.add_argument("--groups", type=int, default=50)
    parser.add_argument("--logs", type=int, nargs="*", default=[1, 8], metavar="GIB")
    parser.add_argument("--vast", type=int, default=64, metavar="TIB")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=options.directory))
    cases: dict[str, dict[str, int]] = {
        "one volume": {},
        f"{options.volumes} volumes": {"volumes": options.volumes},
        f"{options.groups} groups": {"groups": options.groups},
    }
    for size in options.logs:
        cases[f"log of {size} GiB"] = {"log": size << 30}
    vast = f"volume of {options.vast} TiB"
    cases[vast] = {"size": options.vast << 40}
    memory = Path(tempfile.mkdtemp(prefix="bench-", dir=options.memory))
    samples: dict[str, dict[str, float]] = {}
    try:
        for name, case in cases.items():
            where = memory if name == vast else directory
            samples[name] = measure(where / "nodes", **case)
            print(f"{name}: {samples[name]}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)
    columns = list(next(iter(samples.values())))
    print(f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, figures in samples.items():
        print(f"| {name} | {' | '.join(f'{figures[c]:,.2f}' for c in columns)} |")
    report.keep("scale", {"samples": samples})
    return 0


if __name__ == "__main__":
    sys.exit(main())
