"""When a resync goes on in order, how it yields, how fast it may be, what it says (X3, X4)."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque

from nbdmirror.core import convergence
from nbdmirror.core.bucket import Bucket
from nbdmirror.core.convergence import Pass
from nbdmirror.core.payoff import PAUSE_MAX, Payoff
from nbdmirror.core.progress import Progress
from nbdmirror.engine import governor
from nbdmirror.engine.governor import Governor
from tests.unit.world import run

MIB = 1 << 20


def seen(*, began: int, left: int, seconds: float, waited: float, written: int, sent: int) -> Pass:
    return Pass(began * MIB, left * MIB, seconds, waited, written * MIB, sent * MIB)


def test_an_idle_client_needs_no_log() -> None:
    idle = seen(began=1000, left=0, seconds=100, waited=99, written=0, sent=1000)
    assert convergence.may_order(idle, 1, 0, 0)
    assert convergence.stuck(idle, 1) is None


def test_a_client_slower_than_half_the_link_needs_little() -> None:
    one = seen(began=100, left=20, seconds=10, waited=10, written=40, sent=100)
    assert convergence.needed(one) < 1 * MIB
    assert convergence.may_order(one, 2 * MIB, 0, 0)


def test_a_client_faster_than_the_link_needs_a_log_that_holds_it() -> None:
    """Rewrites 64 MiB at 8 MiB/s, the link takes 4: copying takes 32 s, then the backlog."""
    fast = seen(began=64, left=64, seconds=16, waited=16, written=128, sent=64)
    need = convergence.needed(fast)
    backlog = 8 * 32 * 3 * MIB
    assert backlog * convergence.MARGIN <= need <= backlog * convergence.MARGIN + MIB
    assert convergence.may_order(fast, int(need) + 1, 0, 0)
    assert not convergence.may_order(fast, int(need) - 1, 0, 4)
    why = convergence.stuck(fast, 64 * MIB)
    assert why is not None and "8.0 MiB/s" in why and "4.0 MiB/s" in why and "64 MiB" in why


def test_what_was_foretold_may_be_wrong_so_it_is_tried_now_and_then() -> None:
    """Hysteresis: each overflow doubles the pause, and no pause is for ever (peers 12)."""
    fast = seen(began=64, left=64, seconds=16, waited=16, written=128, sent=64)
    fits = seen(began=64, left=1, seconds=16, waited=16, written=1, sent=64)
    pauses = []
    for failures in range(12):
        for one, pause in ((fits, 0.0), (fast, 0.0)):
            while not convergence.may_order(one, 64 * MIB, failures, pause):
                pause += 0.5
            pauses.append(pause)
    kept, doubtful = pauses[::2], pauses[1::2]
    assert kept[0] == 0 and kept == sorted(kept) and kept[1] >= 2
    assert doubtful[0] == 5 and doubtful == sorted(doubtful)
    assert kept[-1] <= 60 and doubtful[-1] <= 300


def test_a_shrinking_pass_is_not_stuck() -> None:
    shrinking = seen(began=64, left=32, seconds=16, waited=16, written=128, sent=64)
    assert convergence.stuck(shrinking, 1) is None


def test_little_that_is_marked_needs_no_pass() -> None:
    assert convergence.begin_ordered(1 * MIB, 16 * MIB, 0)
    assert not convergence.begin_ordered(2 * MIB, 16 * MIB, 0)
    assert not convergence.begin_ordered(1, 16 * MIB, 1), "not after an overflow"


def test_payoff_leaves_out_what_does_not_pay_and_tries_again() -> None:
    payoff = Payoff()
    tries = []
    for turn in range(400):
        if payoff.worth():
            tries.append(turn)
            payoff.result(False)
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert gaps[:4] == [2, 3, 5, 9] and max(gaps) == PAUSE_MAX + 1
    while not payoff.worth():
        pass
    payoff.result(True)
    assert payoff.worth() and payoff.worth()


def test_failures_under_way_at_once_count_once() -> None:
    """X1: windows that were compared together and all differ do not have the same copied after."""
    payoff = Payoff()
    for _ in range(10):
        payoff.result(False)
    assert [payoff.worth(), payoff.worth()] == [False, True]


def test_what_has_failed_counts_as_failed_while_its_answer_is_on_its_way() -> None:
    """X1: where nothing is the same, few comparisons are under way, however late answers come."""
    payoff, under_way, tries = Payoff(), deque[int](), 0
    for turn in range(1000):
        while under_way and under_way[0] + 10 <= turn:
            under_way.popleft()
            payoff.result(False)
        if payoff.worth():
            under_way.append(turn)
            tries += turn >= 100
    assert tries <= 2 * 900 / PAUSE_MAX


def test_a_bucket_keeps_the_mean_rate() -> None:
    rng = random.Random(1)
    bucket, now, total = Bucket(1000.0), 0.0, 0
    while now < 60:
        amount = rng.randrange(1, 300)
        total += amount
        now += bucket.take(now, amount) + (rng.random() if rng.random() < 0.1 else 0)
    assert total <= 1000 * now + 300 + 100
    assert Bucket(None).take(0.0, 1 << 40) == 0.0
    steady = Bucket(1000.0)
    assert sum(steady.take(0.0, 100) for _ in range(1)) <= 0.1


def test_progress_is_monotone_within_a_pass_and_never_above_the_whole() -> None:
    """peers 25: above 100 %, and an ETA made up."""
    progress = Progress("dcm", 1000, phase="passes")
    done = 0
    for step in range(30):
        progress.moved(float(step), 100, max(0, 1000 - 50 * step))
        status = progress.status(float(step))
        assert done <= status["done_bytes"] <= status["total_bytes"] == 1000
        done = status["done_bytes"]
    progress.next_pass("ordered", 300)
    status = progress.status(30.0)
    assert (status["pass"], status["phase"], status["done_bytes"]) == (2, "ordered", 0)


def test_no_end_is_promised_while_clients_mark_as_fast_as_the_link_copies() -> None:
    progress = Progress("dcm", 1000, phase="passes")
    for step in range(20):
        progress.moved(float(step), 100, 1000)
    assert progress.status(20.0)["rate"] > 0
    assert progress.status(20.0)["eta_s"] is None
    for step in range(20, 30):
        progress.moved(float(step), 100, 1000 - 50 * (step - 19))
    eta = progress.status(30.0)["eta_s"]
    assert eta is not None and 8 <= eta <= 20, "500 left at 50 a second"


class Counted:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.ns = 0

    def time_ns(self) -> int:
        return self.ns

    def monotonic_ns(self) -> int:
        return self.ns

    def boot_id(self) -> str:
        return "boot"


def test_without_clients_nothing_rests() -> None:
    async def main() -> None:
        yielding = Governor(Counted(), lambda: 7)
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        for _ in range(1000):
            await yielding.rest(1_000_000)
        assert asyncio.get_running_loop().time() == began

    run(main())


def test_with_clients_the_loop_is_theirs_for_most_of_the_time() -> None:
    async def main() -> None:
        requests = iter(range(10_000))
        yielding = Governor(Counted(), lambda: next(requests))
        began = asyncio.get_running_loop().time()
        for _ in range(1000):
            await yielding.rest(300_000)
        worked = 0.3
        rested = asyncio.get_running_loop().time() - began
        share = worked / (worked + rested)
        assert share <= governor.SHARE_MAX + 0.01

    run(main())


def test_several_resyncs_share_what_one_may_take() -> None:
    """However many there are, clients have the rest; and none of them starves another."""

    async def main() -> None:
        clock, requests = Counted(), iter(range(1_000_000))
        yielding = Governor(clock, lambda: next(requests))
        loop = asyncio.get_running_loop()
        worked = [0.0] * 4

        async def work(one: int, seconds: float) -> None:
            while True:
                await asyncio.sleep(seconds)
                worked[one] += seconds
                await yielding.rest(round(seconds * 1e9))

        tasks = [asyncio.ensure_future(work(one, 0.001 * (1 + one))) for one in range(4)]
        began = loop.time()
        await asyncio.sleep(20)
        for task in tasks:
            task.cancel()
        assert sum(worked) / (loop.time() - began) <= governor.SHARE_MAX + 0.01
        assert min(worked) * 8 >= sum(worked) / 4, worked

    run(main())


def test_a_slow_disk_cuts_the_share_and_never_to_nothing() -> None:
    """Yields to the latency of requests that wait; a resync does not starve (peers 21, 22)."""

    async def main() -> None:
        requests = iter(range(1_000_000))
        yielding = Governor(Counted(), lambda: next(requests))
        for _ in range(100):
            yielding.observe(1_000_000)
        for _ in range(200):
            await yielding.rest(100_000)
            yielding.observe(10_000_000)
            await asyncio.sleep(0.02)
        assert yielding.share == governor.SHARE_MIN
        for _ in range(2000):
            await yielding.rest(100_000)
            yielding.observe(1_000_000)
            await asyncio.sleep(0.02)
        assert yielding.share == governor.SHARE_MAX

    run(main())
