"""Group commit (O15): nobody is satisfied by a commit that began before they asked."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.engine.groupcommit import GroupCommit
from tests.unit.world import run


class Commits:
    """A commit that takes a second, and what stood written when each began."""

    def __init__(self) -> None:
        self.written = 0
        self.durable = 0
        self.began = 0
        self.running = 0
        self.errors: list[Exception] = []
        self.commit = GroupCommit(self._commit)

    async def _commit(self) -> None:
        self.began += 1
        self.running += 1
        assert self.running == 1, "one at a time"
        upto = self.written
        await asyncio.sleep(1)
        self.running -= 1
        if self.errors:
            raise self.errors.pop(0)
        self.durable = upto


def test_an_asker_during_a_commit_waits_for_the_next() -> None:
    async def main() -> None:
        c = Commits()
        c.written = 1
        first = asyncio.ensure_future(c.commit())
        await asyncio.sleep(0.5)
        c.written = 2
        await asyncio.gather(c.commit(), c.commit(), c.commit())
        assert first.done() and c.durable == 2
        assert c.began == 2, "those who came during the first share the second"

    run(main())


def test_askers_of_the_same_moment_share_one() -> None:
    async def main() -> None:
        c = Commits()
        await asyncio.gather(*(c.commit() for _ in range(50)))
        assert c.began == 1
        await c.commit()
        assert c.began == 2

    run(main())


def test_a_failure_goes_to_those_who_waited_for_it_and_to_no_other() -> None:
    async def main() -> None:
        c = Commits()
        c.errors = [ValueError("first")]
        first = asyncio.ensure_future(c.commit())
        await asyncio.sleep(0.5)
        c.written = 5
        await c.commit()
        with pytest.raises(ValueError, match="first"):
            await first
        assert c.durable == 5

    run(main())


def test_a_cancelled_asker_takes_nothing_from_the_others() -> None:
    async def main() -> None:
        c = Commits()
        c.written = 3
        leaving = asyncio.ensure_future(c.commit())
        staying = asyncio.ensure_future(c.commit())
        await asyncio.sleep(0.5)
        leaving.cancel()
        await staying
        assert c.durable == 3 and c.began == 1
        assert leaving.cancelled()

    run(main())


def test_a_failure_nobody_waits_for_any_more_is_quiet() -> None:
    async def main() -> None:
        c = Commits()
        c.errors = [ValueError("x")]
        asker = asyncio.ensure_future(c.commit())
        await asyncio.sleep(0.5)
        asker.cancel()
        await asyncio.sleep(2)
        await c.commit()

    run(main())
