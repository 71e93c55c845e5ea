"""The rounds: every load against every subject in turn, again and again, and the report.

Interleaved (A B C A B C), each run with fresh processes, so that a drift of the machine meets all
subjects alike. The table goes to standard output, the samples to ``tests/bench/results``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.bench import loads, report, subjects
from tests.bench.loads import Load, Sample
from tests.bench.subjects import Subject
from tests.integration.process import ProcessError

MIB = 1 << 20


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [kind.name for kind in subjects.ALL]
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="pairs of each load (5)")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="of each run (4)")
    parser.add_argument(
        "--size", type=int, default=1024, metavar="MIB", help="of the volume (1024)"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="loads whose name contains it",
    )
    parser.add_argument(
        "--subjects",
        default=",".join(subjects.DEFAULT),
        help=f"the first is compared with the others; of {', '.join(names)}",
    )
    parser.add_argument("--all", action="store_true", help="more depths, mixes and connections")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 s on 256 MiB")
    parser.add_argument("--directory", type=Path, help="where the files go (a temporary one)")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.seconds, options.size = 2, 1.0, 256
    options.subjects = options.subjects.split(",")
    for name in options.subjects:
        if name not in names:
            parser.error(f"no subject {name!r}; there are {', '.join(names)}")
    return options


def _chosen(options: argparse.Namespace) -> list[Load]:
    return [
        load
        for load in loads.ALL
        if (load.basic or options.all or options.only)
        and (not options.only or any(text in load.name for text in options.only))
    ]


def source(directory: Path, size: int) -> Path:
    """A file of random bytes, ``size`` MiB: nothing in it compresses, no block is a hole."""
    path = directory / "source"
    with path.open("wb") as file:
        for _ in range(size):
            file.write(os.urandom(MIB))
    return path


def _measure(
    chosen: Sequence[Load],
    rivals: Sequence[Subject],
    rounds: int,
    seconds: float,
    failed: dict[str, str],
) -> dict[Load, dict[str, list[Sample]]]:
    """A subject that a load is too much for has no figure there, and ``failed`` says so."""
    results: dict[Load, dict[str, list[Sample]]] = {}
    for number, load in enumerate(chosen):
        samples = results[load] = {rival.name: [] for rival in rivals}
        for turn in range(rounds):
            for rival in [one for one in rivals if one.name in samples]:
                try:
                    sample = loads.measure(rival, load, seconds)
                except ProcessError as error:
                    failed[rival.name] = str(error).partition("\n")[0]
                    print(error, file=sys.stderr, flush=True)
                    del samples[rival.name]
                    continue
                samples[rival.name].append(sample)
                print(
                    f"[{number + 1}/{len(chosen)}] {load.name}: round {turn + 1}/{rounds} "
                    f"{rival.name} {sample.iops:,.0f}/s",
                    file=sys.stderr,
                    flush=True,
                )
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, stores the samples."""
    options = _options(argv)
    chosen = _chosen(options)
    kinds = {kind.name: kind for kind in subjects.ALL}
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=options.directory))
    rivals: list[Subject] = []
    failed: dict[str, str] = {}
    try:
        content = source(directory, options.size)
        for name in options.subjects:
            rivals.append(kinds[name](directory))
            rivals[-1].prepare(content)
        content.unlink()
        results = _measure(chosen, rivals, options.rounds, options.seconds, failed)
        for rival in rivals:
            if rival.name not in failed:  # else it was killed, perhaps behind
                rival.check_copies()
    finally:
        for rival in rivals:
            rival.close()
        shutil.rmtree(directory, ignore_errors=True)
    machine = report.machine()
    conditions = (
        f"{options.rounds} rounds, {options.seconds:g} s each, fresh processes, {options.size} MiB "
        "volumes of random bytes with every block allocated, one filesystem, warm page cache "
        "(but for what is called cold), clients over unix sockets; our remote over TCP, the peer's "
        "target over a unix socket. "
        f"{machine['cores']} cores {machine['processor']}, {machine['kernel']}, "
        f"Python {machine['python']}, {machine['nbdkit']}, {machine['fio']}."
    )
    print(report.markdown(results, options.subjects, conditions))
    stored = {
        "conditions": conditions,
        "subjects": {rival.name: rival.what for rival in rivals},
        "failed": list(failed.values()),
        "loads": [
            {
                "load": load.name,
                "samples": {name: [one.as_dict() for one in some] for name, some in by.items()},
            }
            for load, by in results.items()
        ],
    }
    print("\nsamples:", report.keep("", stored), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
