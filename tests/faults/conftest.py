"""Fixtures: those of the integration tests, and groups with a small volume under a stamped load."""

from __future__ import annotations

from tests.integration.conftest import _bounded, make_cluster

__all__ = ["_bounded", "make_cluster"]
