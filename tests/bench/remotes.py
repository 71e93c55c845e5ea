"""What a fast remote notices of a slow and a dead one: ``python -m tests.bench.remotes``.

A primary with one remote, and the same with two more: one behind a link of 1 MiB/s, one that was
killed (M7, V2). In turn, each with fresh processes: a client writes 4 KiB at random, at a fixed
rate, for long enough that the log overflows for the slow and the dead one. Told are the client's
latency and how far the fast remote lags, asked for all the time. The table goes to standard output,
the samples to ``tests/bench/results``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from tests.bench import report
from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.tools import Fio

SIZE = 256 * MIB
RATE = 3000
"""Writes a second: 12 MiB."""
SLOW = 1 * MIB
LOG = 32 * MIB


def measure(directory: Path, others: bool, seconds: float) -> dict[str, float]:
    """One run, with the slow and the dead remote or without."""
    remotes = ("beta", "gamma", "delta") if others else ("beta",)
    cluster = Cluster(
        directory / "nodes",
        volumes=[Volume(size=SIZE)],
        remotes=remotes,
        log_size=LOG,
        tuning={},
    )
    with cluster:
        cluster.start()
        if others:
            cluster.proxies["gamma"].shape(rate=SLOW)
            cluster.secondaries[2].kill()
        node = cluster.primary
        load: dict[str, object] = {
            "rw": "randwrite",
            "bs": 4096,
            "iodepth": 4,
            "size": SIZE,
            "time_based": True,
            "runtime": seconds,
            "norandommap": True,
            "rate_iops": RATE,
        }
        lags: list[float] = []
        apart = 0
        with Fio(node.uri(), directory, **load) as client:
            while client.running:
                fast = next(r for r in node.rpc("status")["remotes"] if r["name"] == "beta")
                lags.append(fast["lag"]["seconds"])
                apart += fast["state"] != "synchronised"
                time.sleep(0.01)  # between two looks: they cost the processor too
            job = client.result()
        overflows = {one["remote"] for one in node.events() if one["kind"] == "overflow"}
        spread = job["write"]["clat_ns"]["percentile"]
    shutil.rmtree(directory / "nodes")
    return {
        "writes_s": job["write"]["iops"],
        "p50_us": spread["50.000000"] / 1000,
        "p99_us": spread["99.000000"] / 1000,
        "lag_p50_ms": median(lags) * 1000,
        "lag_p99_ms": quantiles(lags, n=100)[98] * 1000,
        "lag_max_ms": max(lags) * 1000,
        "not_synchronised": apart,
        "overflowed": len(overflows),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, stores the samples."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.remotes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    samples: dict[str, list[dict[str, float]]] = {"alone": [], "three": []}
    try:
        for turn in range(options.rounds):
            for name, runs in samples.items():
                runs.append(measure(directory, name == "three", options.seconds))
                print(f"round {turn + 1} {name}: {runs[-1]}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print("| | the fast remote alone | with a slow and a dead one |\n|---|---:|---:|")
    for key in samples["alone"][0]:
        row = [f"{median(run[key] for run in runs):,.4g}" for runs in samples.values()]
        print(f"| {key} | {' | '.join(row)} |")
    report.keep("remotes", {"rate": RATE, "slow": SLOW, "samples": samples})
    return 0


if __name__ == "__main__":
    sys.exit(main())
