"""The simulated network: what it may do to a node, and that it does it.

A simulator whose peers always say goodbye would pass every check of the product.
"""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from nbdmirror.config import KIB, MIB
from tests.contract.network_contract import Peer
from tests.contract.simulated import Hosts, scene
from tests.sim.transport import Link


class TestNetFaults:
    def test_a_cut_is_silence_and_loses_nothing(self) -> None:
        """Fault 18."""

        async def test(hosts: Hosts) -> None:
            hosts.net.cut("alpha", "beta")
            hosts.write(b"one")
            hosts.write(b"two")
            await asyncio.sleep(1000)
            assert hosts.server.received == b"" and not hosts.client.lost.is_set()
            hosts.net.heal("alpha", "beta")
            await hosts.server.until(lambda: hosts.server.received == b"onetwo")

        assert scene(test).net.fired["held"] >= 1

    def test_what_a_cut_held_comes_before_what_was_still_on_its_way(self) -> None:
        """On a slow link some is in flight when a cut ends: no stream reorders within itself."""

        async def test(hosts: Hosts) -> None:
            hosts.net.link("alpha", "beta").bandwidth = 10.0
            hosts.net.cut("alpha", "beta")
            for part in (b"one.......", b"two.......", b"three....."):
                hosts.write(part)
            await asyncio.sleep(1.5)
            hosts.net.heal("alpha", "beta")
            await hosts.server.until(lambda: len(hosts.server.received) == 30)
            assert hosts.server.received == b"one.......two.......three....."

        assert scene(test).net.fired["held"] == 1

    def test_a_cut_of_the_way_back_holds_the_acknowledgements(self) -> None:
        """Fault 22: one way; the data arrives and the window fills."""

        async def test(hosts: Hosts) -> None:
            hosts.net.cut("beta", "alpha", both=False)
            hosts.write(b"x" * MIB)
            await asyncio.sleep(10)
            assert len(hosts.server.received) == 256 * KIB
            hosts.net.heal("beta", "alpha")
            await hosts.server.until(lambda: len(hosts.server.received) == MIB)
            assert hosts.client.paused == [True, False]

        scene(test)

    def test_a_reset_reaches_both_ends(self) -> None:
        async def test(hosts: Hosts) -> None:
            hosts.net.reset("beta", "alpha")
            for peer in (hosts.client, hosts.server):
                await peer.lost.wait()
                assert isinstance(peer.error, ConnectionResetError)

        scene(test)

    def test_a_killed_process_says_goodbye(self) -> None:
        async def test(hosts: Hosts) -> None:
            hosts.kill("beta", power=False)
            await hosts.client.lost.wait()
            assert not hosts.server.lost.is_set(), "nothing runs there any more"
            with pytest.raises(ConnectionRefusedError):
                await hosts.net.host("alpha").connect("tcp:beta:1", Peer)

        scene(test)

    def test_a_power_cut_leaves_the_peer_half_open(self) -> None:
        """Fault 22: silence for as long as the host is down, a reset once it is up and asked."""

        async def test(hosts: Hosts) -> None:
            hosts.kill("beta", power=True)
            hosts.write(b"lost")
            await asyncio.sleep(1000)
            assert not hosts.client.lost.is_set()
            hosts.net.boot("beta")
            await asyncio.sleep(1000)
            assert not hosts.client.lost.is_set(), "who asks nothing learns nothing"
            hosts.write(b"hello?")
            await hosts.client.lost.wait()
            assert isinstance(hosts.client.error, ConnectionResetError)

        assert scene(test).net.fired["half-open"] == 1

    @pytest.mark.parametrize("seed", range(5))
    def test_a_suspended_process_reads_what_came_when_it_wakes(self, seed: int) -> None:
        """Faults 24, 25: its kernel takes what the window allows, and whoever connects; and keeps
        the order, whatever becomes of that of callbacks."""

        async def test(hosts: Hosts) -> None:
            hosts.loop.suspend(hosts.lives["beta"])
            for part in (b"one ", b"two ", b"three"):
                hosts.write(part)
                await asyncio.sleep(1)
            await hosts.net.host("alpha").connect("tcp:beta:1", Peer)
            assert not hosts.server.received
            hosts.net.reset("alpha", "beta")
            await hosts.client.lost.wait()
            hosts.loop.wake(hosts.lives["beta"])
            await hosts.server.lost.wait()
            assert hosts.server.received == b"one two three"

        scene(test, Hosts(shuffle=random.Random(seed)))

    def test_connects_hang_are_refused_and_time_out(self) -> None:
        async def test(hosts: Hosts) -> None:
            alpha = hosts.net.host("alpha")
            hosts.net.stall("alpha", "beta", 30)
            start = hosts.loop.time()
            await alpha.connect("tcp:beta:1", Peer)
            assert hosts.loop.time() - start >= 30
            hosts.net.cut("alpha", "beta", both=False)
            with pytest.raises(TimeoutError) as caught:
                await alpha.connect("tcp:beta:1", Peer)
            assert caught.value.errno == errno.ETIMEDOUT
            hosts.net.heal_all()
            hosts.net.link("alpha", "beta").refuse = 1.0
            with pytest.raises(ConnectionRefusedError):
                await alpha.connect("tcp:beta:1", Peer)
            with pytest.raises(OSError):
                await alpha.connect("tcp:gamma:1", Peer)

        scene(test)

    def test_bandwidth(self) -> None:
        async def test(hosts: Hosts) -> None:
            start = hosts.loop.time()
            hosts.write(bytes(MIB))
            await asyncio.sleep(0.9)
            assert len(hosts.server.received) < MIB
            await asyncio.sleep(0.3)
            assert len(hosts.server.received) == MIB, hosts.loop.time() - start

        scene(test, Hosts(link=Link(bandwidth=MIB)))

    def test_an_error_in_a_protocol_ends_its_connection(self) -> None:
        class Broken(Peer):
            def get_buffer(self, sizehint: int) -> bytearray:
                return bytearray(1 // 0)

        hosts = Hosts()
        hosts.server = Broken()

        async def main() -> None:
            await hosts.start()
            hosts.write(b"x")
            await hosts.server.lost.wait()
            await hosts.client.lost.wait()

        hosts.loop.run_until_complete(main())
        hosts.loop.close()
        assert [type(error["exception"]) for error in hosts.loop.errors] == [ZeroDivisionError]
