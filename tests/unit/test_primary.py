"""The connections of a primary (M2, M13)."""

from __future__ import annotations

import asyncio
import random

from nbdmirror.engine.create import create
from nbdmirror.engine.node import Node
from nbdmirror.ports import Env
from tests.fuzz.nodes import Doorkeeper, config_of
from tests.sim.clock import SimClock
from tests.unit.world import make_disk, run


def test_no_link_begins_in_a_node_that_stops() -> None:
    """M13: who goes on without the log ends the links and begins them anew, perhaps after a stop
    has ended them; a link that was only moved begins again."""

    async def main() -> None:
        disk, config = make_disk(), config_of("primary")
        clock = SimClock(asyncio.get_running_loop(), disk)  # type: ignore[arg-type]
        env = Env(disk, Doorkeeper(), clock, random.Random(0))
        await create(env, config, "primary")
        node = Node(env, config)
        await node.start()
        primary = node.primary
        assert primary is not None

        async def links(*, for_good: bool) -> set[asyncio.Task[None]]:
            before = asyncio.all_tasks()
            await primary.stop(for_good=for_good)
            primary.start()
            return asyncio.all_tasks() - before

        assert await links(for_good=False)
        assert not await links(for_good=True)
        await node.stop()

    run(main())
