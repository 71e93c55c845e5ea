"""The main comparison as a picture: ``python -m tests.bench.picture RESULT``.

Bars for each load, as long as the rate is to that of ``nbdkit file`` without a mirror. Goes to
``comparison.svg`` beside the result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pygal
from pygal.style import CleanStyle

LIMIT = "nbdkit"
SHOWN = (
    "4k random write, depth 1",
    "4k random write, depth 16",
    "4k random write, depth 64",
    "4k write, flush after each",
    "4k random read, depth 16",
    "256k sequential write, depth 8",
    "256k sequential read, depth 8",
)
NAME = "comparison.svg"


def _shares(samples: Mapping[str, Sequence[Mapping[str, float]]], subject: str) -> float | None:
    """The median of a subject's rates, as a part of the limit's in the same round."""
    pairs = zip(samples.get(subject, ()), samples.get(LIMIT, ()), strict=False)
    shares = [ours["iops"] / limit["iops"] for ours, limit in pairs]
    return round(median(shares), 2) if shares else None


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a stored result; OSError if the file cannot be written."""
    by_load = {entry["load"]: entry["samples"] for entry in result["loads"]}
    loads = [name for name in SHOWN if name in by_load]
    chart = pygal.HorizontalBar(
        style=CleanStyle,
        js=(),
        width=900,
        height=130 + 75 * len(loads),
        title="Requests a second, as a part of what nbdkit file does without a mirror",
        legend_at_bottom=True,
        print_values=True,
        min_scale=4,
        x_title=f"{result['machine']['cores']} cores {result['machine']['processor']}",
    )
    chart.x_labels = loads[::-1]  # the first one on top
    for subject, what in result["subjects"].items():
        chart.add(what, [_shares(by_load[name], subject) for name in loads[::-1]])
    path.write_bytes(chart.render())


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the result that is named."""
    (name,) = sys.argv[1:] if argv is None else argv
    path = Path(name)
    draw(json.loads(path.read_text()), path.parent / NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
