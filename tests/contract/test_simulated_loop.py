"""The simulated event loop: what it may do to a node, and that it does it.

A simulator that runs a dead node on, or hides an error, would pass every check of the product.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.contract.simulated import Hosts, run, scene
from tests.sim.disk import SimDisk
from tests.sim.loop import INCARNATION, Deadlock, Incarnation, Livelock, SimLoop


class TestLoop:
    def test_time_jumps_and_order_is_kept(self) -> None:
        seen: list[tuple[float, int]] = []
        loop = SimLoop()

        async def sleeper(number: int, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((loop.time(), number))

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                for number, seconds in enumerate((3600.0, 0.5, 0.5, 0.0)):
                    group.create_task(sleeper(number, seconds))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(10):
                    await asyncio.Event().wait()

        run(main(), loop)
        assert seen == [(0.0, 3), (0.5, 1), (0.5, 2), (3600.0, 0)]
        assert loop.now_ns == 3610 * 10**9

    def test_a_lost_wake_up_is_a_deadlock(self) -> None:
        with pytest.raises(Deadlock) as caught:
            run(asyncio.Event().wait())
        assert "world-1" in caught.value.__notes__[0]

    def test_spinning_is_a_livelock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def spin() -> None:
            while True:
                await asyncio.sleep(0)

        monkeypatch.setattr("tests.sim.loop.STEPS_PER_INSTANT_MAX", 1000)
        with pytest.raises(Livelock):
            run(spin())

    def test_threads_are_refused(self) -> None:
        async def main() -> None:
            with pytest.raises(RuntimeError):
                await asyncio.to_thread(int)

        run(main())

    def test_errors_that_nobody_sees_are_kept(self) -> None:
        loop = SimLoop()

        async def fail() -> None:
            raise ValueError("unseen")

        async def main() -> None:
            loop.create_task(fail())
            loop.call_soon(lambda: 1 // 0)
            await asyncio.sleep(1)

        loop.run_until_complete(main())
        loop.close()
        kinds = [type(error["exception"]) for error in loop.errors]
        assert kinds == [ZeroDivisionError, ValueError]

    def test_a_killed_node_runs_nothing_any_more(self) -> None:
        loop = SimLoop()
        life = Incarnation("alpha")
        seen: list[str] = []

        async def child() -> None:
            try:
                await asyncio.sleep(2)
            finally:
                seen.append("child's finally")

        async def node() -> None:
            assert INCARNATION.get() is life
            task = asyncio.create_task(child())
            loop.call_later(3, seen.append, "timer")
            try:
                await task
            finally:
                seen.append("node's finally")

        async def main() -> None:
            loop.spawn(life, node())
            await asyncio.sleep(1)
            life.kill()
            await asyncio.sleep(10)
            assert seen == []

        loop.run_until_complete(main())
        assert loop.pending_names() == ["alpha-2", "alpha-3"]
        loop.close()
        assert loop.errors == []

    def test_a_suspended_node_goes_on_where_it_was(self) -> None:
        """Faults 24, 25: what became due meanwhile is done in its order; or never, if killed."""
        loop = SimLoop()
        lives = [Incarnation(name) for name in ("alpha", "beta")]
        seen: list[tuple[str, float]] = []

        async def node(name: str) -> None:
            loop.call_later(3, lambda: seen.append((f"{name}: later", loop.time())))
            for turn in range(2):
                await asyncio.sleep(2)
                seen.append((f"{name}: {turn}", loop.time()))

        async def main() -> None:
            for life in lives:
                loop.spawn(life, node(life.node))
            await asyncio.sleep(1)
            for life in lives:
                loop.suspend(life)
            await asyncio.sleep(9)
            assert seen == []
            lives[1].kill()
            for life in lives:
                loop.wake(life)
            await asyncio.sleep(10)

        loop.run_until_complete(main())
        loop.close()
        assert seen == [("alpha: later", 10), ("alpha: 0", 10), ("alpha: 1", 12)]
        assert loop.errors == []

    @pytest.mark.parametrize("cut", [True, False])
    def test_a_failure_that_a_kill_kept_from_being_seen_is_none(self, cut: bool) -> None:
        """A gather looks when its last task has ended; of a node that stopped it is an error."""
        loop = SimLoop()
        life = Incarnation("alpha")

        async def fail() -> None:
            raise OSError("the disk")

        async def node() -> None:
            await asyncio.gather(fail(), asyncio.sleep(1000), return_exceptions=True)

        async def main() -> None:
            loop.spawn(life, node())
            await asyncio.sleep(1)
            if cut:
                loop.cut(life)
            else:
                life.kill()

        loop.run_until_complete(main())
        loop.close()
        assert len(loop.errors) == (0 if cut else 1)

    def test_a_kill_stops_what_is_ready_to_run(self) -> None:
        loop = SimLoop()
        life = Incarnation("alpha")
        seen: list[str] = []

        async def node() -> None:
            seen.append("ran")

        async def main() -> None:
            loop.spawn(life, node())
            life.kill()
            await asyncio.sleep(1)

        run(main(), loop)
        assert seen == []

    def test_timers_of_the_dead_do_not_move_time(self) -> None:
        loop = SimLoop()
        life = Incarnation("alpha")

        async def main() -> None:
            loop.spawn(life, asyncio.sleep(1000))
            await asyncio.sleep(1)
            life.kill()
            await asyncio.Event().wait()

        with pytest.raises(Deadlock):
            run(main(), loop)
        assert loop.now_ns == 10**9

    def test_shuffle_changes_the_order_and_nothing_else(self) -> None:
        def order(shuffle: random.Random | None) -> list[int]:
            seen: list[int] = []

            async def main() -> None:
                for number in range(20):
                    asyncio.get_running_loop().call_soon(seen.append, number)
                await asyncio.sleep(1)

            run(main(), SimLoop(shuffle=shuffle))
            return seen

        assert order(None) == list(range(20))
        assert order(random.Random(1)) == order(random.Random(1)) != list(range(20))


def test_the_same_seed_is_the_same_run() -> None:
    def trace(seed: int) -> tuple[int, int, bytes, int, list[tuple[str, int]]]:
        hosts = Hosts(seed)
        disk = SimDisk("beta", seed)

        async def test(hosts: Hosts) -> None:
            rng = random.Random(seed)
            file = disk.open("/file", create=True)
            for _ in range(50):
                hosts.write(rng.randbytes(rng.randrange(1, 20_000)))
                file.pwrite(rng.randrange(9000), rng.randbytes(5000))
                await asyncio.sleep(rng.random() / 1000)
                if rng.random() < 0.3:
                    await file.sync()
            await disk.sync_directory("/")
            disk.power_cut()

        scene(test, hosts)
        fired = sorted((hosts.net.fired + disk.fired).items())
        loop = hosts.loop
        return loop.now_ns, loop.steps, disk.content("/file"), hosts.server.reads, fired

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)
