"""Fixtures: those of the integration tests; daemons that a fault ended are buried with the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.inject import POINTS
from tests.integration import conftest as integration
from tests.integration.cluster import Cluster
from tests.integration.conftest import _bounded

__all__ = ["_bounded", "make_cluster"]

if POINTS:
    integration.TEST_S = 6 * 3600  # an exhaustive sweep is one test


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters (as ``Cluster``'s arguments say); they end with the test."""
    made: list[Cluster] = []

    def make(**options: Any) -> Cluster:
        made.append(Cluster(tmp_path / f"cluster{len(made)}", **options))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()
        cluster.kill()
