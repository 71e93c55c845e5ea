"""The network between simulated hosts: who can be reached, and what goes wrong on the way.

Nothing fails by itself except what a ``Link`` draws; cuts, resets and stalls are the world's to
order. All of it is counted in ``SimNet.fired``. Every connection draws from random streams of its
own, so that one more connection does not shift the others.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, replace

from tests.sim.loop import INCARNATION, Incarnation, SimLoop
from tests.sim.transport import Link, Mark, Pipe, SimTransport

ProtocolFactory = Callable[[], asyncio.BufferedProtocol]

FIRST_PORT = 40_000
LOCAL = ("127.0.0.1", "localhost", "[::1]")
ANY = ("0.0.0.0", "[::]")
SYN_RETRIES_S = (1, 2, 4, 8, 16, 32, 64)  # as TCP: gives up after about two minutes


class SimNet:
    """All hosts and all connections. Make it outside of any node's life."""

    def __init__(self, loop: SimLoop, seed: object, *, link: Link | None = None) -> None:
        self.loop = loop
        self.context = copy_context()
        assert self.context.get(INCARNATION) is None, "made by a node"
        self.fired: Counter[str] = Counter()
        self.hosts: dict[str, SimNetwork] = {}
        self.listeners: dict[tuple[str, str], SimListener] = {}
        self._seed = seed
        self._default = link or Link()
        self._links: dict[tuple[str, str], Link] = {}
        self._cut: dict[tuple[str, str], None] = {}
        self._down: dict[str, None] = {}
        self._pairs: list[tuple[SimTransport, SimTransport]] = []
        self._counts: Counter[str] = Counter()
        self._pairs_max = 64

    # What the world does to it.

    def host(self, name: str) -> SimNetwork:
        """The ``ports.Network`` of a host; its name is its address in ``tcp:NAME:PORT``."""
        if name not in self.hosts:
            self.hosts[name] = SimNetwork(self, name)
        return self.hosts[name]

    def link(self, source: str, target: str) -> Link:
        """The properties of one direction; change them as you like."""
        if (source, target) not in self._links:
            link = replace(self._default)
            if source == target:  # within a host nothing is refused, lost or slow
                link = replace(link, bandwidth=None, refuse=0.0, hang=0.0)
            self._links[source, target] = link
        return self._links[source, target]

    def cut(self, source: str, target: str, *, both: bool = True) -> None:
        """Silence: bytes are held, acknowledgements too, new connections hang."""
        assert source != target, "a host always reaches itself"
        self._cut[source, target] = None
        if both:
            self._cut[target, source] = None
        self.fired["cut" if both else "cut one way"] += 1

    def heal(self, source: str, target: str) -> None:
        """Both directions carry again; what was held arrives."""
        ways = [way for way in ((source, target), (target, source)) if way in self._cut]
        self.fired["heal"] += bool(ways)
        for way in ways:
            del self._cut[way]
        for way in ways:
            for pipe in self._pipes():
                if (pipe.source, pipe.target) == way:
                    pipe.healed()
                elif (pipe.target, pipe.source) == way:
                    pipe.healed_back()

    def heal_all(self) -> None:
        for source, target in list(self._cut):
            self.heal(source, target)

    def stall(self, source: str, target: str, seconds: float) -> None:
        """A cut of both directions that heals by itself."""
        self.cut(source, target)
        self.fired["stall"] += 1
        self.loop.call_later(seconds, self.heal, source, target, context=self.context)

    def reset(self, one: str, other: str) -> None:
        """Resets every connection between two hosts, at both ends."""
        for pipe in self._pipes():
            if {pipe.source, pipe.target} == {one, other}:
                self.fired["reset"] += 1
                pipe.mark(Mark.RESET)

    def kill(self, life: Incarnation, *, power: bool) -> None:
        """A life ends. Killed: the kernel ends its connections. Power cut: silence, until the
        host is up again and knows nothing of them."""
        self.listeners = {k: one for k, one in self.listeners.items() if one.life is not life}
        for pair in self._pairs:
            for end in pair:
                if end.life is life and not end.lost:
                    self.fired["half-open" if power else "killed with connections"] += 1
                    end.vanish(silent=power)
        if power:
            self._down[life.node] = None

    def boot(self, host: str) -> None:
        """A host that lost power answers again."""
        self._down.pop(host, None)

    # For connections.

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cut

    def is_up(self, host: str) -> bool:
        return host not in self._down

    def number(self, name: str) -> int:
        """Counts from 1 per name."""
        self._counts[name] += 1
        return self._counts[name]

    def join(
        self, source: _Side, target: _Side, address: str, stream: str
    ) -> tuple[SimTransport, SimTransport]:
        """Makes the two ends of a connection."""
        there = Pipe(self, source.host, target.host, f"{stream}:there")
        back = Pipe(self, target.host, source.host, f"{stream}:back")
        mine, other = (source.host, FIRST_PORT + self.number(source.host)), address
        near = SimTransport(
            self, source.life, source.context, back, there, {"peername": other, "sockname": mine}
        )
        far = SimTransport(
            self, target.life, target.context, there, back, {"peername": mine, "sockname": other}
        )
        if len(self._pairs) >= self._pairs_max:
            self._pairs = [pair for pair in self._pairs if not (pair[0].lost and pair[1].lost)]
            self._pairs_max = max(64, 2 * len(self._pairs))
        self._pairs.append((near, far))
        return near, far

    def stream(self, source: str, target: str) -> str:
        """The name of a new connection's random streams."""
        return f"{self._seed}:net:{source}>{target}:{self.number(f'{source}>{target}')}"

    def _pipes(self) -> list[Pipe]:
        return [end.out for pair in self._pairs for end in pair]


@dataclass(frozen=True, slots=True)
class _Side:
    host: str
    life: Incarnation
    context: Context


class SimNetwork:
    """``ports.Network`` of one host."""

    def __init__(self, net: SimNet, host: str) -> None:
        self.name = host
        self._net = net

    async def connect(self, address: str, protocol: ProtocolFactory) -> SimTransport:
        INCARNATION.get().check()
        net = self._net
        target, key = self._resolve(address)
        stream = net.stream(self.name, target)
        rng = random.Random(stream)
        link = net.link(self.name, target)
        latency = rng.uniform(*link.latency)
        await asyncio.sleep(latency)
        await self._reach(target, address, hang=rng.random() < link.hang)
        listener = net.listeners.get((target, key))
        refused = rng.random() < link.refuse
        if listener is None or not listener.life.alive or refused:
            net.fired["refused"] += 1
            await asyncio.sleep(latency)
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"cannot connect to {address}")
        here = _Side(self.name, INCARNATION.get(), copy_context())
        there = _Side(target, listener.life, listener.context.copy())
        near, far = net.join(here, there, address, stream)
        net.loop.call_soon(far.made, listener.protocol, context=far.context)
        try:
            await asyncio.sleep(latency)
        except asyncio.CancelledError:
            near.abort()
            raise
        near.made(protocol)
        return near

    async def listen(self, address: str, protocol: ProtocolFactory) -> SimListener:
        INCARNATION.get().check()
        kind, _, rest = address.partition(":")
        if kind == "tcp":
            host, _, port = rest.rpartition(":")
            if host not in (*LOCAL, *ANY, self.name):
                raise OSError(errno.EADDRNOTAVAIL, f"cannot listen at {address}: not this host")
            if port == "0":
                port = str(FIRST_PORT + self._net.number(f"{self.name} ports"))
            address = f"tcp:{host}:{port}"
            key = f"tcp:{port}"
        else:
            key = address
        if (self.name, key) in self._net.listeners:
            raise OSError(errno.EADDRINUSE, f"cannot listen at {address}: somebody is there")
        listener = SimListener(self._net, (self.name, key), address, protocol)
        self._net.listeners[self.name, key] = listener
        return listener

    def watch(
        self, transport: asyncio.BaseTransport, gone: Callable[[], object]
    ) -> Callable[[], None]:
        assert isinstance(transport, SimTransport)
        transport.gone = gone

        def end() -> None:
            transport.gone = None

        return end

    def _resolve(self, address: str) -> tuple[str, str]:
        kind, _, rest = address.partition(":")
        if kind == "unix":
            return self.name, address
        host, _, port = rest.rpartition(":")
        if host in LOCAL:
            host = self.name
        if host not in self._net.hosts:
            raise OSError(errno.EHOSTUNREACH, f"cannot connect to {address}: no such host")
        return host, f"tcp:{port}"

    async def _reach(self, target: str, address: str, *, hang: bool) -> None:
        """Until the other host has heard and answered; it may take minutes, as in TCP."""
        net = self._net
        for seconds in SYN_RETRIES_S:
            silent = net.is_cut(self.name, target) or net.is_cut(target, self.name)
            if net.is_up(target) and not silent and not hang:
                return
            net.fired["connect hangs"] += 1
            await asyncio.sleep(seconds)
        raise TimeoutError(errno.ETIMEDOUT, f"cannot connect to {address}: no answer")


class SimListener:
    """``ports.Listener``; ends with the life that opened it."""

    def __init__(
        self, net: SimNet, key: tuple[str, str], address: str, protocol: ProtocolFactory
    ) -> None:
        self.address = address
        self.protocol = protocol
        self.life = INCARNATION.get()
        self.context = copy_context()
        self._net = net
        self._key = key

    def close(self) -> None:
        if self._net.listeners.get(self._key) is self:
            del self._net.listeners[self._key]
