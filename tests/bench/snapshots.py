"""What snapshots and restores cost: ``python -m tests.bench.snapshots``; prints one JSON object.

- random 4 KiB writes with 0, 1 and 16 snapshots, after a warm-up that has copied every region once,
  interleaved; the bar: within 10 % of each other;
- the longest write while a snapshot is taken under load, against the longest without and against
  one sync of the disk;
- a restore: the time until the volume reads as the snapshot (the bar: 1 s), until it is copied, and
  the bytes that the remote is sent against those that had changed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.tools import Writer, connect, fio, pattern

ROUNDS = 5


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.snapshots", description=__doc__)
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="of the volume (256)")
    parser.add_argument("--changed", type=int, default=64, metavar="MIB", help="before the restore")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load (2)")
    parser.add_argument("--directory", type=Path, help="where the files go (a temporary one)")
    return parser.parse_args()


def _rate(cluster: Cluster, directory: Path, seconds: float) -> float:
    """4 KiB random writes a second at depth 16."""
    load: dict[str, Any] = {
        "rw": "randwrite",
        "bs": "4k",
        "iodepth": 16,
        "time_based": 1,
        "runtime": seconds,
    }
    result = fio(cluster.primary.uri(), directory, **load)
    return float(result["write"]["iops"])


def throughput(directory: Path, size: int, seconds: float) -> dict[str, Any]:
    """Write rates by number of snapshots; each group lives on, loads are interleaved."""
    rates: dict[int, list[float]] = {0: [], 1: [], 16: []}
    clusters = {}
    for count in rates:
        cluster = Cluster(directory / f"s{count}", volumes=[Volume(size=size)], log_size=256 * MIB)
        cluster.start()
        clusters[count] = cluster
        handle = connect(cluster.primary.uri())
        for at in range(0, size, MIB):
            handle.pwrite(pattern(MIB, at), at)
        for _ in range(count):
            cluster.primary.ok("snapshot", "create")
        for at in range(0, size, MIB):  # every region is copied once
            handle.pwrite(pattern(MIB, at + 1), at)
        handle.flush()
        handle.shutdown()
        cluster.wait_in_sync(300)  # the secondary has copied every region too
    try:
        for _ in range(ROUNDS):
            for count, cluster in clusters.items():
                rates[count].append(_rate(cluster, directory, seconds))
    finally:
        for cluster in clusters.values():
            cluster.close()
    medians = {count: statistics.median(found) for count, found in rates.items()}
    ratios = {count: round(median / medians[0], 3) for count, median in medians.items()}
    return {"writes_per_s": {k: round(v) for k, v in medians.items()}, "ratio_to_none": ratios}


def _sync_s(directory: Path) -> float:
    """The median of one sync of a freshly written 64 KiB."""
    times = []
    with (directory / "sync").open("wb") as file:
        for number in range(20):
            os.pwrite(file.fileno(), pattern(65536, number), number * 65536)
            began = time.monotonic()
            os.fdatasync(file.fileno())
            times.append(time.monotonic() - began)
    return statistics.median(times)


def taking_and_restoring(directory: Path, size: int, changed: int) -> dict[str, Any]:
    """The longest write while snapshots are taken; then a restore."""
    with Cluster(directory / "r", volumes=[Volume(size=size)], log_size=256 * MIB) as cluster:
        cluster.start()
        handle = connect(cluster.primary.uri())
        for at in range(0, size, MIB):
            handle.pwrite(pattern(MIB, at), at)
        handle.flush()
        cluster.wait_in_sync(120)
        with Writer(cluster.primary.uri()) as without:
            time.sleep(2.0)
        with Writer(cluster.primary.uri()) as during:
            for _ in range(5):
                cluster.primary.ok("snapshot", "create")
                time.sleep(0.4)
        cluster.primary.ok("snapshot", "create")
        for at in range(0, changed, MIB):
            handle.pwrite(pattern(MIB, at + 7), at)
        handle.flush()
        cluster.wait_in_sync(120)
        sent = cluster.primary.remote()["bytes_sent"]
        began = time.monotonic()
        cluster.primary.rpc("restore", snapshot="6", while_attached=True)
        first = bytes(handle.pread(4096, 0))
        usable = time.monotonic() - began
        while cluster.primary.status()["restore"] is not None:
            time.sleep(0.02)
        copied = time.monotonic() - began
        cluster.wait_in_sync(120)
        in_sync = time.monotonic() - began
        assert first != pattern(MIB, 7)[:4096], "the volume does not read as the snapshot"
        cluster.compare()
        return {
            "longest_write_s": {"without": without.slowest_s, "taking": during.slowest_s},
            "restore": {
                "changed_bytes": changed,
                "usable_s": round(usable, 3),
                "copied_s": round(copied, 3),
                "in_sync_s": round(in_sync, 3),
                "sent_bytes": cluster.primary.remote()["bytes_sent"] - sent,
            },
        }


def main() -> None:
    """Runs all of it."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        result = {
            "sync_s": round(_sync_s(directory), 6),
            **taking_and_restoring(directory, options.size * MIB, options.changed * MIB),
            **throughput(directory, options.size * MIB, options.seconds),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
