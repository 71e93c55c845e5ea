"""From samples to a table: medians of each subject, medians of the ratios of pairs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.loads import Load, Sample

RESULTS = Path(__file__).parent / "results"
Samples = Mapping[str, Sequence[Sample]]  # subject -> one sample a round, in order of rounds


def _first_line(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return "not installed"
    return (done.stdout or done.stderr).strip().partition("\n")[0] or "unknown"


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nbdkit": _first_line("nbdkit", "--version"),
        "qemu": _first_line("qemu-storage-daemon", "--version"),
        "fio": _first_line("fio", "--version"),
        "commit": _first_line("git", "rev-parse", "--short=12", "HEAD"),
    }


def keep(kind: str, content: Mapping[str, Any]) -> Path:
    """Writes a measurement to a file of its own among the results, with the machine; its path."""
    RESULTS.mkdir(exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S.json", time.gmtime())
    path = RESULTS / (f"{kind}-{name}" if kind else name)
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path


def _median(samples: Sequence[Sample], figure: str) -> float:
    return float(median(getattr(sample, figure) for sample in samples))


def ratio(samples: Samples, ours: str, theirs: str, figure: str = "iops") -> float | None:
    """The median over rounds of ours / theirs; None where one of them has no figure."""
    pairs = [
        getattr(a, figure) / getattr(b, figure)
        for a, b in zip(samples.get(ours, ()), samples.get(theirs, ()), strict=False)
        if getattr(b, figure)
    ]
    return median(pairs) if pairs else None


def _rate(load: Load, sample: Sequence[Sample], figure: str) -> str:
    value = _median(sample, figure)
    if load.block >= 64 << 10:
        return f"{value * load.block / (1 << 20):,.0f} MiB/s"
    return f"{value / 1000:,.1f} k/s"


def _rows(results: Mapping[Load, Samples], subjects: Sequence[str], figure: str) -> list[list[str]]:
    ours, *others = subjects
    rows = [["load", *subjects, *(f"{ours} / {other}" for other in others)]]
    for load, samples in results.items():
        if figure == "replicated" and not load.writes:
            continue
        row = [load.name]
        for subject in subjects:
            row.append(_rate(load, samples[subject], figure) if samples.get(subject) else "-")
        for other in others:
            value = ratio(samples, ours, other, figure)
            row.append("-" if value is None else f"{value:.2f}")
        rows.append(row)
    return rows


FIGURES = {
    "mean us": ("mean_us", "{:,.0f}", 1),
    "p99 us": ("p99_us", "{:,.0f}", 1),
    "p99.9 us": ("p999_us", "{:,.0f}", 1),
    "cpu s/GiB": ("cpu_s_per_gib", "{:.2f}", 1),
    "RSS MiB": ("rss_bytes", "{:,.0f}", 1 << 20),
    "drain s": ("drain_s", "{:.2f}", 1),
    "written/byte": ("written_per_byte", "{:.2f}", 1),
}


def _figures(results: Mapping[Load, Samples], subjects: Sequence[str]) -> list[list[str]]:
    rows = [["load", "subject", *FIGURES]]
    for load, samples in results.items():
        for subject in subjects:
            if not samples.get(subject):
                continue
            row = [load.name, subject]
            for name, form, unit in FIGURES.values():
                row.append(form.format(_median(samples[subject], name) / unit))
            rows.append(row)
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines)


def markdown(results: Mapping[Load, Samples], subjects: Sequence[str], conditions: str) -> str:
    """The whole report; the first subject is the one that the others are compared with."""
    return "\n\n".join(
        [
            conditions,
            "Rates: medians; ratios: medians of pairs of one round.",
            _table(_rows(results, subjects, "iops")),
            "Sustained: requests over the time of load and drain; the copy holds everything then.",
            _table(_rows(results, subjects, "replicated")),
            "Further figures (medians).",
            _table(_figures(results, subjects)),
        ]
    )
