"""Transactions a second that a database commits on a filesystem on each server.

``python -m tests.bench.commits``: SQLite (``tests.faults.bank``, a journal and two syncs for each
commit) on ext4 on ``/dev/nbd0`` in a guest, one kernel client, the servers on the host in turn, as
in ``tests.bench``. The guest is emulated, so it takes much of each transaction's time itself: the
ratios say what somebody in front of the database would notice.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from urllib.parse import parse_qs, urlsplit

from tests.bench import report, subjects
from tests.bench.__main__ import source
from tests.bench.subjects import Subject
from tests.guest import guest
from tests.guest.kernel import TREE
from tests.integration.proxy import Proxy

SIZE_MIB = 64
START_S = 120.0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.commits", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (8)")
    parser.add_argument(
        "--subjects",
        type=lambda text: text.split(","),
        default=["nbdmirror", "nbdkit", "nbd-server", "qemu-wb"],
    )
    parser.add_argument("--directory", type=Path, help="where the files go (a temporary one)")
    return parser.parse_args()


class Host:
    """Starts and ends the servers as the guest asks for them."""

    def __init__(self, rivals: list[Subject], rounds: int, seconds: float) -> None:
        self.rates: dict[str, list[float]] = {rival.name: [] for rival in rivals}
        self._seconds = seconds
        self._turns: Iterator[Subject] = iter(rivals * rounds)
        self._now: tuple[Subject, Proxy] | None = None

    def answer(self, words: list[str]) -> str | None:
        """One request of the job."""
        if words[0] == "next":
            return self._start()
        self._end(int(words[1]) / self._seconds)
        return None

    def _start(self) -> str | None:
        subject = next(self._turns, None)
        if subject is None:
            return None
        (path,) = parse_qs(urlsplit(subject.start()).query)["socket"]
        self._now = subject, Proxy(f"unix:{path}")
        return str(self._now[1].port)

    def _end(self, rate: float) -> None:
        assert self._now is not None
        subject, proxy = self._now
        self._now = None
        subject.drain()
        subject.stop()
        proxy.close()
        self.rates[subject.name].append(rate)
        print(f"{subject.name}: {rate:.1f}/s", file=sys.stderr, flush=True)


def main() -> int:
    """Measures, keeps and prints."""
    options = _options()
    kinds = {kind.name: kind for kind in subjects.ALL}
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=options.directory))
    rivals: list[Subject] = []
    try:
        content = source(directory, SIZE_MIB)
        for name in options.subjects:
            rivals.append(kinds[name](directory))
            rivals[-1].prepare(content)
        host = Host(rivals, options.rounds, options.seconds)
        variables = {"TREE": str(TREE), "SECONDS_EACH": f"{options.seconds:g}"}
        limit = START_S + len(rivals) * options.rounds * (options.seconds + START_S)
        guest.run("commits", limit, environment=variables, answer=host.answer).check()
        for rival in rivals:
            rival.check_copies()
    finally:
        for rival in rivals:
            rival.close()
        shutil.rmtree(directory, ignore_errors=True)
    first = options.subjects[0]
    print("| | commits/s | nbdmirror's part of it |\n|---|---:|---:|")
    for name, rates in host.rates.items():
        pairs = zip(host.rates[first], rates, strict=True)
        ratio = median(ours / theirs for ours, theirs in pairs)
        print(f"| {name} | {median(rates):.1f} | {ratio:.2f} |")
    report.keep("commits", {"seconds": options.seconds, "samples": host.rates})
    return 0


if __name__ == "__main__":
    sys.exit(main())
