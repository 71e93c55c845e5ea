"""Waiting for a remote's answers (X3, X4)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from nbdmirror.core.remotestate import Stall
from nbdmirror.engine.answers import STALL_SECONDS, Answers
from tests.unit.world import run


def test_an_answer_that_comes_as_patience_ends_is_no_stall() -> None:
    """X4: a process that was suspended finds both at once, and nothing that it still waits for."""

    async def main() -> None:
        under_way = [7]
        remote = cast("Any", SimpleNamespace(name="beta", applied_seq=9))
        answers = Answers(remote, lambda: ("a window", max(under_way)))
        said: list[Stall | None] = []
        answers.stalled = said.append

        def answer() -> None:
            under_way.clear()
            answers.came()

        asyncio.get_running_loop().call_later(STALL_SECONDS, answer)
        await answers.wait(lambda: not under_way)
        assert said == []

    run(main())
