"""A campaign of power cuts: ``python -m tests.guest.cuts --cuts 30 --side primary``.

Prints each seed, what it draws and what was checked; the same ``--seed`` draws the same again, the
machines' timing aside. Exit 1 at the first thing that is wrong: images, traces and what the guests
printed are then left where the last lines say.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.guest.cuts.campaign import CUTS_PER_PAIR, SIDES, Campaign


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.guest.cuts", description=__doc__)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--side", choices=[*SIDES, "any"], default="any")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--lying-disk", action="store_true", help="must find something wrong")
    arguments = parser.parse_args()
    sides = list(SIDES) if arguments.side == "any" else [arguments.side]
    began = time.monotonic()
    seen: Counter[str] = Counter()
    for done in range(0, arguments.cuts, CUTS_PER_PAIR):
        count = min(CUTS_PER_PAIR, arguments.cuts - done)
        seed = arguments.seed + done // CUTS_PER_PAIR
        directory = Path(tempfile.mkdtemp(prefix="cuts-"))
        campaign = Campaign(directory / "pair", seed, tell, lying=arguments.lying_disk)
        try:
            campaign.run(campaign.plans([sides[n % len(sides)] for n in range(count)]))
        except AssertionError as error:
            for machine in campaign.pair.machines:
                (directory / f"{machine.name}.serial").write_text(machine.serial)
            tell(f"WRONG, seed {seed}: {error}\nwhat is left: {directory}")
            return 1
        seen += campaign.pair.seen
        shutil.rmtree(directory)
    for what, times in sorted(seen.items()):
        tell(f"{times:6} {what}")
    tell(f"{arguments.cuts} cuts, nothing wrong, {time.monotonic() - began:.0f} s")
    return 0


def tell(text: str) -> None:
    """A line at once, with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
