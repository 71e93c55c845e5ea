"""What a secondary's end of a connection leaves behind (I6)."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbdmirror.codec import repl
from nbdmirror.codec.repl import Type
from nbdmirror.config import Limits, ReplicationConfig
from nbdmirror.engine.link import Link
from nbdmirror.engine.receiver import Receiver
from nbdmirror.engine.secondary import Secondary


async def _done(*_: object, **__: object) -> None:
    pass


def _secondary() -> Secondary:
    """Agrees to everything."""
    stub = SimpleNamespace(
        volumes=[],
        tuning=ReplicationConfig(),
        log=SimpleNamespace(next_seq=1, durable_seq=0, capacity=1 << 20),
        applier=SimpleNamespace(settings={"delay": 0.0, "frozen": False}),
        applied_seq=0,
        events=SimpleNamespace(emit=lambda *_, **__: None),
        refusal=lambda hello: None,
        welcome=lambda hello: {},
        leave=lambda receiver: None,
        enter=_done,
        commit=_done,
        adopt=_done,
    )
    return cast(Secondary, stub)


class _Transport(asyncio.Transport):
    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link: Link | None = link

    def write(self, data: object) -> None:
        pass

    def abort(self) -> None:
        if self._link is not None:
            asyncio.get_running_loop().call_soon(self._link.connection_lost, None)
            self._link = None


def _came(link: Link, frame: list[Any]) -> None:
    data = b"".join(frame)
    link.get_buffer(-1)[: len(data)] = data
    link.buffer_updated(len(data))


ENDS: dict[str, Callable[[Link], None]] = {
    "the peer is gone": lambda link: link.connection_lost(None),
    "replaced": lambda link: link.close(ConnectionResetError("replaced")),
    "a frame that cannot be": lambda link: _came(link, repl.encode(Type.WELCOME, 1, [])),
    "no frame at all": lambda link: _came(link, [bytes(64)]),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_connection_that_has_ended_is_gone_at_once(end: Callable[[Link], None]) -> None:
    """I6: the last frames of a connection hold slabs of megabytes, and the daemon collects what is
    in cycles hardly ever."""

    async def play() -> None:
        receiver = Receiver(_secondary(), Limits())
        link, gone = receiver.link, weakref.ref(receiver)
        link.connection_made(_Transport(link))
        task = asyncio.ensure_future(receiver.run())
        hello = {"node": "a"}
        for frame in (
            repl.encode_json(Type.HELLO, 1, hello),
            repl.encode_json(Type.START, 1, {"action": "continue", "seq": 1}),
            repl.encode(Type.RESYNC_END, 1, [repl.SEQ.pack(9)]),
        ):
            _came(link, cast(list[Any], frame))
            await asyncio.sleep(0.01)
        assert receiver._end_seq == 9
        end(link)
        await task
        await asyncio.sleep(0.01)
        heard = weakref.ref(link)
        del receiver, link, task
        assert (gone(), heard()) == (None, None)

    gc.disable()
    try:
        asyncio.run(play())
    finally:
        gc.enable()
