"""Runs one job by hand, its output on the terminal: ``python -m tests.guest JOB.sh``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.guest.guest import Disk, Guest
from tests.guest.kernel import METAPACKAGES, TREE


def main() -> int:
    """The job's exit code; 1 after a power cut."""
    parser = argparse.ArgumentParser(prog="python -m tests.guest", description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("variables", nargs="*", metavar="VAR=VALUE")
    parser.add_argument("--disk", action="append", default=[], type=Path)
    parser.add_argument("--flavour", choices=sorted(METAPACKAGES))
    parser.add_argument("--seconds", type=float, default=300)
    arguments = parser.parse_args()
    variables = dict(text.split("=", 1) for text in arguments.variables)
    with Guest(
        arguments.job,
        disks=[Disk(path) for path in arguments.disk],
        environment={"TREE": str(TREE), **variables},
        answer=lambda words: " ".join(words[1:]),
        flavour=arguments.flavour,
        echo=True,
    ) as guest:
        outcome = guest.wait(arguments.seconds)
    print(f"exit {outcome.code} after {outcome.seconds:.1f} s")
    return 1 if outcome.code is None else outcome.code


if __name__ == "__main__":
    sys.exit(main())
