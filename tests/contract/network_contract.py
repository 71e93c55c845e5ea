"""What every ``ports.Network`` must do; run by ``test_network_contract``.

Against asyncio, uvloop and the simulated network: the engine's protocols meet all three.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, cast

import pytest

from nbdmirror.config import KIB, MIB
from nbdmirror.ports import Network

DEADLINE_S = 20.0


class NetworkWorld(Protocol):
    """One implementation: two hosts (or one twice) and the addresses a test may use."""

    near: Network
    far: Network
    addresses: tuple[str, ...]
    """Where ``far`` can listen: TCP with port 0 first, then unix."""
    overfull: int
    """Bytes: several times what is on its way between the two before the writer must buffer."""

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine to its end on the loop that belongs to the implementation."""


class Peer(asyncio.BufferedProtocol):
    """Keeps what it gets; ``buffer_bytes`` is how much it takes at once."""

    def __init__(self, buffer_bytes: int = 64 * KIB) -> None:
        self.received = bytearray()
        self.reads = 0
        self.made = asyncio.Event()
        self.lost = asyncio.Event()
        self.error: BaseException | None = None
        self.ended = False
        self.paused: list[bool] = []
        self.transport: asyncio.Transport
        self._buffer = bytearray(buffer_bytes)
        self._news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self.made.set()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        assert 0 < nbytes <= len(self._buffer)
        self.received += self._buffer[:nbytes]
        self.reads += 1
        self._news.set()

    def eof_received(self) -> None:
        assert not self.ended
        self.ended = True

    def pause_writing(self) -> None:
        self.paused.append(True)
        self._news.set()

    def resume_writing(self) -> None:
        self.paused.append(False)
        self._news.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        assert not self.lost.is_set(), "connection_lost comes once"
        self.error = exc
        self.lost.set()
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()


Test = Callable[["Pair"], Coroutine[Any, Any, None]]


class Pair:
    """A listener at ``address`` and one connection to it."""

    def __init__(self, world: NetworkWorld, address: str, buffer_bytes: int) -> None:
        self.world = world
        self.address = address
        self.accepted: list[Peer] = []
        self._buffer_bytes = buffer_bytes

    def accept(self) -> Peer:
        self.accepted.append(Peer(self._buffer_bytes))
        return self.accepted[-1]

    async def start(self) -> None:
        self.listener = await self.world.far.listen(self.address, self.accept)
        self.address = self.listener.address
        self.client = await self.connect()
        await self.until_accepted(1)
        self.server = self.accepted[0]

    async def until_accepted(self, count: int) -> None:
        """A connection can stand before the listener's side has taken it."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.accepted) < count:
                await asyncio.sleep(0.01)
            for peer in self.accepted:
                await peer.made.wait()

    async def connect(self) -> Peer:
        peer = Peer()
        async with asyncio.timeout(DEADLINE_S):
            transport = await self.world.near.connect(self.address, lambda: peer)
        assert peer.transport is transport, "connection_made comes before connect returns"
        return peer

    async def stop(self) -> None:
        self.listener.close()
        for peer in [self.client, *self.accepted]:
            if not peer.lost.is_set():  # asyncio of 3.11 cannot abort what has ended
                peer.transport.abort()
            async with asyncio.timeout(DEADLINE_S):
                await peer.lost.wait()


def connected(world: NetworkWorld, test: Test, *, buffer_bytes: int = 64 * KIB) -> None:
    """Runs a test once for every kind of address."""

    async def main(address: str) -> None:
        pair = Pair(world, address, buffer_bytes)
        await pair.start()
        await test(pair)
        await pair.stop()

    for address in world.addresses:
        world.run(main(address))


class NetworkContract:
    def test_bytes_arrive_in_order_in_any_chunks(self, world: NetworkWorld) -> None:
        content = random.Random(1).randbytes(min(300 * KIB, world.overfull))

        async def test(pair: Pair) -> None:
            rng = random.Random(2)
            sent = 0
            while sent < len(content):
                size = rng.randrange(1, 9000)
                pair.client.transport.write(memoryview(content)[sent : sent + size])
                sent += size
            await pair.server.until(lambda: len(pair.server.received) == len(content))
            assert pair.server.received == content
            assert pair.server.reads >= len(content) // 1000

        connected(world, test, buffer_bytes=1000)

    def test_both_directions_and_writelines(self, world: NetworkWorld) -> None:
        async def test(pair: Pair) -> None:
            pair.client.transport.writelines([b"he", bytearray(b"ll"), memoryview(b"o")])
            pair.server.transport.write(b"there")
            await pair.server.until(lambda: pair.server.received == b"hello")
            await pair.client.until(lambda: pair.client.received == b"there")

        connected(world, test)

    def test_a_slow_reader_pauses_the_writer(self, world: NetworkWorld) -> None:
        """I6: what a peer does not read piles up at the writer, who is told."""
        block = bytes(range(256)) * 256

        async def test(pair: Pair) -> None:
            client, server = pair.client, pair.server
            server.transport.pause_reading()
            assert not server.transport.is_reading()
            sent = 0
            while not client.paused:
                assert sent < 64 * MIB
                client.transport.write(block)
                sent += len(block)
                await asyncio.sleep(0)
            assert client.transport.get_write_buffer_size() > 0
            held = len(server.received)
            await asyncio.sleep(0.05)
            assert len(server.received) == held, "paused means paused"
            server.transport.resume_reading()
            await server.until(lambda: len(server.received) == sent)
            await client.until(lambda: len(client.paused) == 2)
            assert client.paused == [True, False]
            assert server.received == block * (sent // len(block))

        connected(world, test)

    def test_write_buffer_limits_can_be_set(self, world: NetworkWorld) -> None:
        async def test(pair: Pair) -> None:
            pair.server.transport.pause_reading()
            pair.client.transport.set_write_buffer_limits(high=16 * MIB, low=MIB)
            pair.client.transport.write(bytes(8 * MIB))
            assert pair.client.paused == []
            pair.client.transport.write(bytes(64 * MIB))
            assert pair.client.paused == [True]

        connected(world, test)

    def test_close_sends_what_is_buffered(self, world: NetworkWorld) -> None:
        content = random.Random(3).randbytes(world.overfull)

        async def test(pair: Pair) -> None:
            client, server = pair.client, pair.server
            server.transport.pause_reading()
            client.transport.write(content)
            assert client.transport.get_write_buffer_size() > 0
            client.transport.close()
            assert client.transport.is_closing()
            server.transport.resume_reading()
            await server.until(server.lost.is_set)
            assert server.received == content
            assert server.ended and server.error is None
            await client.until(client.lost.is_set)
            assert client.error is None

        connected(world, test)

    def test_abort_ends_at_once(self, world: NetworkWorld) -> None:
        content = random.Random(4).randbytes(32 * MIB)

        async def test(pair: Pair) -> None:
            client, server = pair.client, pair.server
            server.transport.pause_reading()
            client.transport.write(content)
            client.transport.abort()
            client.transport.abort()
            assert client.transport.is_closing()
            await client.until(client.lost.is_set)
            assert client.error is None
            server.transport.resume_reading()
            await server.until(server.lost.is_set)
            assert len(server.received) < len(content)
            assert content.startswith(server.received), "a prefix, then nothing"

        connected(world, test)

    def test_writes_to_a_peer_that_is_gone_end_the_connection(self, world: NetworkWorld) -> None:
        async def test(pair: Pair) -> None:
            client = pair.client
            client.transport.write(b"unread")
            await pair.server.until(lambda: pair.server.received == b"unread")
            pair.server.transport.abort()
            async with asyncio.timeout(DEADLINE_S):
                while not client.lost.is_set():
                    client.transport.write(b"x")
                    await asyncio.sleep(0.001)
            assert client.error is None or isinstance(client.error, ConnectionError)

        connected(world, test)

    def test_who_hangs_up_is_noticed_though_nothing_is_read(self, world: NetworkWorld) -> None:
        """Once, however much lies unread; and not after the watch has ended."""
        told: list[str] = []

        async def test(pair: Pair) -> None:
            told.clear()
            stays = await pair.connect()
            leaves = await pair.connect()
            resets = await pair.connect()
            await pair.until_accepted(4)
            ends = []
            for name, peer in zip("0123", pair.accepted, strict=True):
                ends.append(world.far.watch(peer.transport, partial(told.append, name)))
                peer.transport.pause_reading()
            ends[0]()
            for peer in (pair.client, stays, leaves):
                peer.transport.write(b"unread")
            await asyncio.sleep(0.2)
            assert told == []
            pair.client.transport.close()
            leaves.transport.close()
            async with asyncio.timeout(DEADLINE_S):
                while told != ["2"]:
                    await asyncio.sleep(0.01)
            assert not pair.accepted[2].lost.is_set()
            resets.transport.abort()
            async with asyncio.timeout(DEADLINE_S):
                while told != ["2", "3"] and not pair.accepted[3].lost.is_set():
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert "1" not in told and told.count("2") == 1
            for end in ends:
                end()
                end()

        connected(world, test)

    def test_a_listener_takes_many_and_closes_without_them(self, world: NetworkWorld) -> None:
        async def test(pair: Pair) -> None:
            others = [await pair.connect() for _ in range(5)]
            await pair.until_accepted(6)
            pair.listener.close()
            for number, peer in enumerate([pair.client, *others]):
                peer.transport.write(b"%d" % number)
            for peer in others:
                peer.transport.close()
                await peer.until(peer.lost.is_set)
            for peer in pair.accepted[1:]:
                await peer.until(peer.lost.is_set)
            assert sorted(bytes(peer.received) for peer in pair.accepted[1:]) == [
                b"%d" % number for number in range(1, 6)
            ]
            assert not pair.accepted[0].lost.is_set()
            with pytest.raises(OSError):
                await pair.connect()

        connected(world, test)

    def test_an_address_that_is_taken(self, world: NetworkWorld) -> None:
        async def test(pair: Pair) -> None:
            with pytest.raises(OSError) as caught:
                await world.far.listen(pair.address, Peer)
            assert caught.value.errno == errno.EADDRINUSE
            assert pair.address in str(caught.value)

        connected(world, test)

    def test_nobody_listens(self, world: NetworkWorld) -> None:
        async def main(address: str) -> None:
            listener = await world.far.listen(address, Peer)
            address = listener.address
            listener.close()
            with pytest.raises(OSError) as caught:
                await world.near.connect(address, Peer)
            assert address in str(caught.value)
            if address.startswith("tcp"):
                assert caught.value.errno == errno.ECONNREFUSED
            again = await world.far.listen(address, Peer)
            assert again.address == address
            again.close()

        for address in world.addresses:
            world.run(main(address))

    def test_port_0_is_replaced_by_a_real_one(self, world: NetworkWorld) -> None:
        async def main() -> None:
            one = await world.far.listen(world.addresses[0], Peer)
            two = await world.far.listen(world.addresses[0], Peer)
            ports = [int(listener.address.rpartition(":")[2]) for listener in (one, two)]
            assert ports[0] != ports[1] and min(ports) > 0
            one.close()
            two.close()

        world.run(main())
