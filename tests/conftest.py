"""How the tests are shared out between processes (``-n 2 --dist loadscope`` of pytest-xdist).

Owns the groups: the tests of one group run in one process, one after the other. Assigned here and
nowhere else. A test without a group goes to whichever process is free.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest

SCARCE = ("tests/guest", "tests/faults/test_network.py")
"""Never two at once: a QEMU guest takes gigabytes, network namespaces and their addresses are
the host's."""
WITH_DAEMONS = ("tests/faults", "tests/integration")
"""The fixtures of a module start daemons, so its tests stay together."""


def group(nodeid: str) -> str:
    """The group of a test; its own id for one that shares nothing with others."""
    name = nodeid.partition("::")[0]
    if _under(name, SCARCE) is not None:
        return "scarce"
    return nodeid if _under(name, WITH_DAEMONS) is None else name


def _under(name: str, tops: tuple[str, ...]) -> int | None:
    path = PurePosixPath(name)
    return next((n for n, top in enumerate(tops) if path.is_relative_to(top)), None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out whole groups; in place of pytest-xdist's own ways, whichever ``--dist`` names."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = group
    return scheduler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long groups begin first and single tests come last: so the processes end together."""

    def rank(item: pytest.Item) -> int:
        name = group(item.nodeid)
        place = _under(name, WITH_DAEMONS)
        return -1 if name == "scarce" else len(WITH_DAEMONS) if place is None else place

    items.sort(key=rank)
