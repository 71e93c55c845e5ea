"""A campaign: ``python -m tests.fuzz [TARGET...] --seconds N``, coverage-guided by atheris.

Each target runs in a process of its own, with its corpus under ``build/fuzz/TARGET`` (it grows
there and is kept; the tests have the seeds only). A find is written beside it and ends the target
with exit code 1; ``--reproduce FILE`` runs it again, alone.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

RUNS = re.compile(r"number_of_executed_units: +([0-9]+)")
EDGES = re.compile(r"cov: ([0-9]+)")
BUILD = Path(__file__).parents[2] / "build" / "fuzz"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="all, if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time (1)")
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


@dataclass(frozen=True)
class Campaign:
    """What became of one target; ``processor``: seconds of it, for on a busy machine the time alone
    says little."""

    name: str
    found: bool
    said: str
    seconds: float
    processor: float


def _campaign(seconds: int, name: str) -> Campaign:
    """Fuzzes one target in a process of its own."""
    began = time.monotonic()
    argv = [sys.executable, "-m", "tests.fuzz", name, "--child", f"--seconds={seconds}"]
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    took = time.monotonic() - began
    return Campaign(name, child.returncode != 0, text, took, usage.ru_utime + usage.ru_stime)


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
    failed = False
    with ThreadPoolExecutor(options.jobs) as pool:
        for one in pool.map(partial(_campaign, options.seconds), names):
            failed = failed or one.found
            print(
                f"{one.name}: {'FOUND' if one.found else 'ok'}, {_last(RUNS, one.said)} runs in "
                f"{one.seconds:.0f} s ({one.processor:.0f} s of processor), "
                f"{_last(EDGES, one.said)} edges covered",
                flush=True,
            )
            if one.found:
                print(one.said[-3000:], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
