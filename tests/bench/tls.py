"""What TLS costs: 256 KiB requests over loopback TCP, in plain text and encrypted, in turn.

``python -m tests.bench.tls``: nbdcopy (libnbd, GnuTLS) reads a volume to nowhere and writes it
from a file, one connection, ``--rounds`` of each against a daemon without and one with TLS; enough
of it that the client's start does not count. The bar: at least half of the plain rate. Prints JSON
with bytes per second.
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

from tests.bench import report
from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.pki import Authority, tls_line
from tests.integration.tools import run

BAR = 0.5
BLOCK = 256 << 10


class Side:
    """One daemon, and how a client gets to it."""

    def __init__(self, directory: Path, size: int, authority: Authority | None) -> None:
        # No remote: it is the connection that is measured, and two cores are few.
        self.cluster = Cluster(directory, volumes=[Volume(size=size)], remotes=(), tcp=True)
        primary = self.cluster.primary
        scheme, query = "nbd", ""
        if authority is not None:
            primary.keys["nbd"] = [tls_line(authority.directory / "alpha")]
            scheme, query = "nbds", f"?tls-certificates={authority.directory}/laptop"
        primary.keys.setdefault("nbd", [])
        primary.write_config()
        self.uri = f"{scheme}://127.0.0.1:{primary.nbd_port}/data{query}"

    def start(self) -> None:
        """Makes the node and starts it."""
        self.cluster.create()
        self.cluster.primary.start()

    def copy(self, source: str, target: str, size: int) -> float:
        """Bytes per second of one nbdcopy."""
        began = time.perf_counter()
        argv = ["nbdcopy", "--connections=1", f"--request-size={BLOCK}", "--allocated"]
        run(*argv, source, target)
        return size / (time.perf_counter() - began)


def measure(directory: Path, size: int, rounds: int) -> dict[str, Any]:
    """All rounds; the nodes live below ``directory``."""
    authority = Authority(directory / "ca")
    authority.node("alpha")
    authority.client("laptop")
    source = directory / "source"
    source.write_bytes(os.urandom(size))
    sides = {
        "plain": Side(directory / "plain", size, None),
        "tls": Side(directory / "tls", size, authority),
    }
    rates: dict[str, dict[str, list[float]]] = {"write": {}, "read": {}}
    try:
        for side in sides.values():
            side.start()
        for _ in range(rounds):
            for name, side in sides.items():
                rate = side.copy(str(source), side.uri, size)
                rates["write"].setdefault(name, []).append(rate)
        for _ in range(rounds):
            for name, side in sides.items():
                rate = side.copy(side.uri, "null:", size)
                rates["read"].setdefault(name, []).append(rate)
    finally:
        for side in sides.values():
            side.cluster.close()
    medians = {
        way: {name: round(statistics.median(some)) for name, some in by.items()}
        for way, by in rates.items()
    }
    ratios = {way: round(by["tls"] / by["plain"], 2) for way, by in medians.items()}
    return {
        "block_bytes": BLOCK,
        "bytes_s": medians,
        "tls_to_plain": ratios,
        "samples": rates,
        "passed": all(ratio >= BAR for ratio in ratios.values()),
    }


def main() -> int:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tls", description=__doc__)
    parser.add_argument("--size", type=int, default=2048, metavar="MIB", help="of a copy (2048)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where the files go (a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nbdm-bench-", dir=options.directory) as directory:
        result = measure(Path(directory), options.size * MIB, options.rounds)
    report.keep("tls", result)
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
