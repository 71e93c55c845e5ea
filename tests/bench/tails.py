"""How long a request takes beside what else a node does: ``python -m tests.bench.tails``.

A client writes 4 KiB at random, at a rate far below what the node takes, so that a late reply is
somebody's doing. In turn, beside each of: nothing; ``status`` asked for all the time; snapshots
taken and deleted; the whole volume resynchronised; verified; a remote that is away, so that every
write is marked in its map; a log so small that it is let go of all the time. The bar: p99.9 grows
by no more than what the disk itself takes for a sync (issue F), which is measured beside the load.
The table goes to standard output, the samples to ``tests/bench/results``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

from tests.bench import report
from tests.integration.cluster import MIB, Cluster, Node, Volume
from tests.integration.tools import Fio

SIZE = 256 * MIB
RATE = 2000
"""Writes a second."""
LOG, SMALL_LOG = 256 * MIB, 16 * MIB
LOOK_SECONDS = 0.05
"""Between two looks at whether the activity has ended: a look costs the processor too."""
SNAPSHOT_SECONDS = 0.3
"""A snapshot is there for so long: first writes to regions are the load it makes."""
FIGURES = ("p50_us", "p99_us", "p999_us", "max_us")


def _nothing(node: Node, directory: Path) -> None:
    time.sleep(LOOK_SECONDS)


def _status(node: Node, directory: Path) -> None:
    node.rpc("status")


def _snapshot(node: Node, directory: Path) -> None:
    entry = node.rpc("snapshot.create")
    time.sleep(SNAPSHOT_SECONDS)
    node.rpc("snapshot.delete", snapshot=entry["uuid"])


def _resync(node: Node, directory: Path) -> None:
    if node.rpc("status")["remotes"][0]["resync"] is None:
        node.rpc("resync", remote="beta", full=True)
    time.sleep(LOOK_SECONDS)


def _verify(node: Node, directory: Path) -> None:
    if node.rpc("status")["remotes"][0]["resync"] is None:
        node.rpc("verify", remote="beta")
    time.sleep(LOOK_SECONDS)


def _sync(node: Node, directory: Path) -> None:
    """Not the node's doing: what the disk takes for a block, for everybody."""
    with (directory / "sync").open("wb") as file:
        for _ in range(20):
            os.pwrite(file.fileno(), os.urandom(4096), 0)
            os.fdatasync(file.fileno())


ACTIVITIES: dict[str, Callable[[Node, Path], None]] = {
    "nothing": _nothing,
    "somebody else's syncs": _sync,
    "status": _status,
    "snapshots": _snapshot,
    "resync": _resync,
    "verify": _verify,
    "a map": _nothing,
    "a small log": _nothing,
}
"""What is done again and again while the client writes."""


class Bench:
    """One group for each size of log."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clusters = {
            size: Cluster(
                directory / f"log{size}",
                volumes=[Volume(size=SIZE)],
                log_size=size,
                proxied=False,
                tuning={},
            )
            for size in (LOG, SMALL_LOG)
        }
        for cluster in self.clusters.values():
            cluster.start()

    def close(self) -> None:
        """Ends the groups."""
        for cluster in self.clusters.values():
            cluster.close()

    def measure(self, name: str, seconds: float) -> dict[str, float]:
        """One run beside an activity."""
        cluster = self.clusters[SMALL_LOG if name == "a small log" else LOG]
        node, act = cluster.primary, ACTIVITIES[name]
        if name == "a map":
            cluster.secondary.stop()
            node.rpc("resync", remote="beta", full=True)  # from now on it is left out of the log
        load: dict[str, object] = {
            "rw": "randwrite",
            "bs": 4096,
            "iodepth": 1,
            "rate_iops": RATE,
            "time_based": True,
            "runtime": seconds,
            "norandommap": True,
        }
        with Fio(node.uri(), self.directory, **load) as client:
            while client.running:
                act(node, self.directory)
            spread = client.result()["write"]["clat_ns"]
        if name == "a map":
            cluster.secondary.start()
        cluster.wait_in_sync(300)
        part = spread["percentile"]
        return {
            "p50_us": part["50.000000"] / 1000,
            "p99_us": part["99.000000"] / 1000,
            "p999_us": part["99.900000"] / 1000,
            "max_us": spread["max"] / 1000,
        }

    def sync_us(self) -> dict[str, float]:
        """The disk's own time for a sync of one block, alone."""
        times = []
        with (self.directory / "sync").open("wb") as file:
            for _ in range(500):
                os.pwrite(file.fileno(), os.urandom(4096), 0)
                began = time.perf_counter()
                os.fdatasync(file.fileno())
                times.append((time.perf_counter() - began) * 1e6)
        parts = quantiles(times, n=1000)
        return dict(zip(FIGURES, (median(times), parts[989], parts[998], max(times)), strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, stores the samples."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tails", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run")
    options = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ACTIVITIES}
    bench = Bench(directory)
    try:
        syncs = bench.sync_us()
        for turn in range(options.rounds):
            for name, found in samples.items():
                found.append(bench.measure(name, options.seconds))
                print(f"round {turn + 1} {name}: {found[-1]}", file=sys.stderr, flush=True)
    finally:
        bench.close()
        shutil.rmtree(directory, ignore_errors=True)
    lines = [f"| beside | {' | '.join(FIGURES)} |", "|---|" + "---:|" * len(FIGURES)]
    for name, found in [*samples.items(), ("a sync of the disk alone", [syncs])]:
        values = [f"{median(one[figure] for one in found):,.0f}" for figure in FIGURES]
        lines.append(f"| {name} | {' | '.join(values)} |")
    print("\n".join(lines))
    report.keep("tails", {"sync": syncs, "samples": samples})
    return 0


if __name__ == "__main__":
    sys.exit(main())
