"""Who hangs up is noticed by itself, whatever becomes of the notice of another."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import uvloop

from nbdmirror.edge.hangups import Hangups


class Transport(asyncio.BaseTransport):
    """Of a socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_defect_at_one_end_hides_no_other(loop: Any) -> None:
    """I8: an end is told of once, so those that come at the same time must not be lost. What the
    first does may end the watch of another."""
    told: list[int] = []
    errors: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: errors.append(str(context["exception"]))
        )
        hangups = Hangups()
        pairs = [socket.socketpair() for _ in range(4)]
        ends: list[Callable[[], None]] = []

        def gone(number: int) -> None:
            told.append(number)
            if len(told) == 1:
                ends[3 - number]()
                raise AssertionError("nobody thought of this")

        for number, (_, ours) in enumerate(pairs):
            ends.append(hangups.watch(Transport(ours), partial(gone, number)))
        for theirs, _ in pairs:
            theirs.close()
        await asyncio.sleep(0.2)
        for end, (_, ours) in zip(ends, pairs, strict=True):
            end()
            ours.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
    assert sorted(told) == sorted({*range(4)} - {3 - told[0]})
    assert errors == ["nobody thought of this"]
