"""Property tests of the gate: the same examples every time, and no verdict about speed."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "gate", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gate")
