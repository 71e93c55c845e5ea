"""What surrounds a node in its process (I6)."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from nbdmirror.edge import daemon


class _Session:
    """As one is left behind: in a cycle."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("kind", ["disconnected", "connected"])
def test_what_a_link_leaves_behind_is_collected(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I6: the collector is kept off the data path, and would come by hardly ever."""
    monkeypatch.setattr(daemon, "COLLECT_SECONDS", 0.0)

    async def play() -> None:
        gone = weakref.ref(_Session())
        daemon._collect({"kind": kind})
        for _ in range(2):
            await asyncio.sleep(0)
        assert (gone() is None) == (kind == "disconnected")

    gc.disable()
    try:
        asyncio.run(play())
    finally:
        gc.enable()
