"""Rates and ETAs (X3, X4): honest when fast, when slow, and when stalled."""

from __future__ import annotations

import pytest

from nbdmirror.core.meter import Meter


def test_nothing_yet() -> None:
    meter = Meter()
    assert meter.rate(1.0) == 0.0
    assert meter.eta(1.0, 100) is None


@pytest.mark.parametrize("step", [0.01, 0.5, 2.0, 10.0])
def test_steady_progress(step: float) -> None:
    """Also where a window of data takes longer than the window of time (a slow link)."""
    meter = Meter(5.0)
    now = 100.0
    for _ in range(round(60 / step)):
        now += step
        meter.add(now, round(1000 * step))
    assert meter.rate(now) == pytest.approx(1000, rel=0.15)
    assert meter.eta(now, 10_000) == pytest.approx(10, rel=0.15)


def test_a_stall_shows() -> None:
    meter = Meter(5.0)
    for now in range(20):
        meter.add(float(now), 1000)
    assert meter.rate(22.0) < 1000
    assert meter.rate(40.0) == 0.0
    assert meter.eta(40.0, 1) is None


def test_memory_is_bounded() -> None:
    """I6: a million samples within a window are not kept one by one."""
    meter = Meter(5.0)
    for number in range(100_000):
        meter.add(number / 10_000, 1)
    assert len(meter._samples) <= 60
