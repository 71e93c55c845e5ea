"""Secondaries that are held back in a run: frozen and thawed, delayed and not (V8)."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING

from nbdmirror.errors import NbdmirrorError
from tests.sim.oracle import Violation

if TYPE_CHECKING:
    from tests.sim.host import Host
    from tests.sim.world import World


class Held:
    """Holds back one secondary after the other, now more, now less."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(f"{world.seed}:held")
        self._asked: asyncio.Task[None] | None = None
        """The last that was asked for; one that is suspended may come to it when all is thawed."""

    async def run(self) -> None:
        """Until cancelled."""
        gap, rng = self._world.options.held, self._random
        while gap:
            await asyncio.sleep(gap * rng.expovariate(1.0))
            host, draw = rng.choice(self._world.remotes), rng.random()
            if draw < 0.6:
                hold = self._hold(host, frozen=draw < 0.3)
            else:
                hold = self._hold(host, delay=rng.choice([0.0, 0.01, 0.1, 1.0]))
            self._asked = self._world.spawn(hold)
            await asyncio.shield(self._asked)

    async def end(self) -> None:
        """All may be applied. Gone if one has failed just now, and will come back as it was."""
        from tests.sim.world import Gone

        if self._asked is not None:
            await asyncio.wait([self._asked])
        for host in self._world.remotes if self._world.options.held else []:
            await self._hold(host, frozen=False, delay=0.0)
            if host.node is None or host.node.secondary is None:
                raise Gone

    async def _hold(
        self, host: Host, *, frozen: bool | None = None, delay: float | None = None
    ) -> None:
        from tests.sim.world import Gone

        node = host.node
        if node is None or node.secondary is None:
            return
        applier = node.secondary.applier
        with contextlib.suppress(Gone, NbdmirrorError):
            await self._world.in_life(host, applier.change(frozen=frozen, delay=delay))
            self._world.fired["held back"] += applier.bounded
        if applier.bounded and applier.applied_seq > applier.settings["limit"]:
            raise Violation(f"{host.name} has applied more than its bound (V8)")
