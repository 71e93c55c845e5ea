"""A campaign: ``python -m tests.fuzz [TARGET...] --seconds N``, coverage-guided by atheris.

Each target runs in a process of its own, with its corpus under ``build/fuzz/TARGET`` (it grows
there and is kept; the tests have the seeds only). A find is written beside it and ends the target
with exit code 1; ``--reproduce FILE`` runs it again, alone.
"""

from __future__ import annotations

import argparse
import importlib
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

RUNS = re.compile(r"number_of_executed_units: +([0-9]+)")
EDGES = re.compile(r"cov: ([0-9]+)")
BUILD = Path(__file__).parents[2] / "build" / "fuzz"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="all, if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--reproduce", type=Path, metavar="FILE", help="one input of one target")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _fuzz(name: str, seconds: int) -> None:
    """Within the child: instruments, and hands over to libFuzzer, which ends the process."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["nbdmirror"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = BUILD / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    arguments = [f"-max_total_time={seconds}", f"-max_len={target.length_max}", "-timeout=20"]
    arguments += [f"-artifact_prefix={BUILD}/{name}-", "-rss_limit_mb=1024", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], target.run)
    atheris.Fuzz()


def _processor_seconds() -> float:
    """What all children that have ended took: on a busy machine the time alone says little."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _last(pattern: re.Pattern[str], text: str) -> str:
    """What libFuzzer said last; it says nothing if it never got so far."""
    found = pattern.findall(text)
    return found[-1] if found else "?"


def main() -> int:
    """Runs the campaign; 1 if anything was found."""
    options = _options()
    if options.child:
        _fuzz(options.targets[0], options.seconds)
        return 0
    from tests.fuzz.targets import TARGETS

    names = options.targets or list(TARGETS)
    for name in names:
        if name not in TARGETS:
            print(f"no target {name}; there are {', '.join(TARGETS)}", file=sys.stderr)
            return 2
    if options.reproduce:
        TARGETS[names[0]].run(options.reproduce.read_bytes())
        return 0
    failed = []
    for name in names:
        began, before = time.monotonic(), _processor_seconds()
        argv = [sys.executable, "-m", "tests.fuzz", name, "--child"]
        done = subprocess.run(
            [*argv, f"--seconds={options.seconds}"], capture_output=True, text=True, check=False
        )
        word = "ok" if done.returncode == 0 else "FOUND"
        print(
            f"{name}: {word}, {_last(RUNS, done.stderr)} runs in {time.monotonic() - began:.0f} s "
            f"({_processor_seconds() - before:.0f} s of processor), "
            f"{_last(EDGES, done.stderr)} edges covered",
            flush=True,
        )
        if done.returncode:
            failed.append(name)
            print(done.stderr[-3000:], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
