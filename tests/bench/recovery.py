"""Recovery after SIGKILL with a full log: how long it takes, and what is sent again.

``python -m tests.bench.recovery``: a primary with a 1 GiB log, its link cut after a third of the
filling, so that the first of it is on the secondary and the rest is pending; SIGKILL; the time
from the start to READY, and to in-sync; the bytes sent against those that were pending. The bar:
under 10 s, and no byte of what the secondary had (I4). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tests.bench import report
from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.tools import connect, pattern

BAR_S = 10.0
OVERHEAD = 1.02
"""Headers of records and frames, heartbeats, acknowledgements."""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.recovery", description=__doc__)
    parser.add_argument("--log", type=int, default=1024, metavar="MIB", help="of the log (1024)")
    parser.add_argument("--block", type=int, default=64, metavar="KIB", help="of a write (64)")
    parser.add_argument("--fill", type=float, default=0.85, help="of the log that is used (0.85)")
    parser.add_argument("--directory", type=Path, help="where the files go (a temporary one)")
    return parser.parse_args()


def _fill(cluster: Cluster, upto: float, block: int) -> None:
    """Writes until so much of the log is used."""
    handle = connect(cluster.primary.uri())
    data = [pattern(block, number) for number in range(64)]
    size = cluster.volume("data").size
    number = 0
    while True:
        for _ in range(16 * MIB // block):
            handle.pwrite(data[number % 64], number * 7919 * block % size)
            number += 1
        log = cluster.primary.status()["log"]
        if log["used"] >= upto * log["size"]:
            handle.flush()
            return


def measure(directory: Path, log_size: int, block: int, fill: float) -> dict[str, object]:
    """One run; the nodes live below ``directory``."""
    volumes = [Volume(size=2 * log_size)]
    with Cluster(directory / "group", volumes=volumes, log_size=log_size) as cluster:
        cluster.start()
        _fill(cluster, 0.3 * fill, block)
        cluster.wait_in_sync(300)
        cluster.proxy.refuse()
        _fill(cluster, fill, block)
        entry, log = cluster.primary.remote(), cluster.primary.status()["log"]
        cluster.primary.kill()
        before = cluster.proxy.sent_bytes
        began = time.monotonic()
        cluster.primary.start()
        ready = time.monotonic() - began
        started = cluster.primary.events()[0]
        cluster.proxy.heal()
        cluster.wait_in_sync(300)
        in_sync = time.monotonic() - began
        sent = cluster.proxy.sent_bytes - before
        cluster.compare()
        return {
            "log_bytes": log["size"],
            "used_bytes": log["used"],
            "redone_records": started["records"],
            "pending_bytes": entry["lag"]["bytes"],
            "sent_bytes": sent,
            "ready_s": round(ready, 2),
            "in_sync_s": round(in_sync, 2),
            "state_before": entry["state"],
            "passed": ready < BAR_S and sent <= entry["lag"]["bytes"] * OVERHEAD,
        }


def main() -> int:
    """Measures, keeps and prints."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="nbdm-bench-", dir=options.directory) as directory:
        path = Path(directory)
        result = measure(path, options.log * MIB, options.block * 1024, options.fill)
    report.keep("recovery", result)
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
