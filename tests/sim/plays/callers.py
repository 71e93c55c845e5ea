"""Plays of who knocks at a secondary's door while its primary is there, or about to be (T1, T6)."""

from __future__ import annotations

import asyncio
from typing import Any

from nbdmirror.codec.repl import Frame, Type
from nbdmirror.engine.link import Link
from tests.sim.directed import directed
from tests.sim.oracle import Violation
from tests.sim.plays.stage import follower, moment
from tests.sim.script import POLL_S, Script


async def _knock(s: Script, hello: dict[str, Any]) -> tuple[Link, Frame]:
    """Somebody calls the secondary from the primary's host, and says this: what is answered."""
    a = s.world.a
    answers: asyncio.Queue[Frame] = asyncio.Queue()
    link = Link(answers.put_nowait, a.config.limits)
    link.session = 1

    async def call() -> Frame:
        await s.world.env(a).network.connect("tcp:b:7000", lambda: link)
        link.send_json(Type.HELLO, hello)
        return await answers.get()

    return link, await s.world.in_life(a, call())


def _greeting(s: Script) -> dict[str, Any]:
    """What the primary said to the secondary, as it connected."""
    (b,) = s.world.remotes
    current = follower(b).current
    assert current is not None
    return dict(current.hello)


async def _second_run(s: Script) -> None:
    """A copy of the primary's state was started elsewhere, as often as the primary itself: its
    attempts do not end the link of that one, whose clients may wait for the remote."""
    lost = moment(s, s.world.a, "disconnected")
    link, answer = await _knock(s, {**_greeting(s), "run": "a copy"})
    await s.write(0, 0)
    await s.in_sync()
    if answer.type is not Type.REFUSE or answer.json()["rule"] != "T6" or lost.is_set():
        raise Violation(f"{answer.type.name} for a second run, the first is lost: {lost.is_set()}")
    link.close()


async def _wrong_name_first(s: Script) -> None:
    """The primary has the secondary under a second name too, and that is the first to knock when
    the link was down: before it is told that it is the wrong one, the right one is let in."""
    hello, (b,) = _greeting(s), s.world.remotes
    await s.pause(on=True)
    while follower(b).current is not None:
        await asyncio.sleep(POLL_S)
    wrong, answer = await _knock(s, {**hello, "remote": "delta"})
    assert answer.type is Type.WELCOME
    refused = moment(s, s.world.a, "refused")
    await s.pause(on=False)
    await s.write(0, 0)
    await s.in_sync()
    if refused.is_set():
        raise Violation("a second name that is in its handshake kept the right one out (T1)")
    wrong.close()


SECOND_RUN = directed(_second_run)
WRONG_NAME_FIRST = directed(_wrong_name_first)
