"""The event history: cursors, bounds, gaps and followers (I6)."""

from __future__ import annotations

import asyncio

from nbdmirror.engine.events import EventLog


class SetClock:
    """A clock that stands where it is put; microseconds in, nanoseconds out."""

    def __init__(self, now_us: int) -> None:
        self.now_us = now_us

    def time_ns(self) -> int:
        return self.now_us * 1000

    def monotonic_ns(self) -> int:
        return 0

    def boot_id(self) -> str:
        return "boot"


def kinds(log: EventLog, cursor: int, events_max: int = 100) -> list[str]:
    return [event["kind"] for event in log.since(cursor, events_max).events]


def test_an_event_has_cursor_time_kind_and_fields() -> None:
    log = EventLog(SetClock(1_700_000_000_123_456), 10)
    event = log.emit("link", remote="beta", up=True)
    assert event["time"] == "2023-11-14T22:13:20.123Z"
    assert (event["kind"], event["remote"], event["up"]) == ("link", "beta", True)
    assert event["cursor"] == log.cursor > 1_700_000_000_123_456


def test_cursors_grow_though_the_clock_stands_or_goes_back() -> None:
    clock = SetClock(1000)
    log = EventLog(clock, 10)
    first = log.emit("a")["cursor"]
    second = log.emit("b")["cursor"]
    clock.now_us = 10
    third = log.emit("c")["cursor"]
    assert first < second < third


def test_since_gives_only_newer_events_in_order_by_pages() -> None:
    log = EventLog(SetClock(1), 10)
    cursors = [log.emit(kind)["cursor"] for kind in "abcde"]
    assert kinds(log, 0) == list("abcde")
    assert kinds(log, cursors[1]) == list("cde")
    page = log.since(cursors[0], 2)
    assert [event["kind"] for event in page.events] == list("bc")
    assert page.cursor == cursors[2]
    assert log.since(cursors[4]).events == ()
    assert log.since(cursors[4]).cursor == cursors[4]


def test_the_history_is_bounded_and_a_gap_is_told() -> None:
    log = EventLog(SetClock(1), 3)
    cursors = [log.emit(kind)["cursor"] for kind in "abcde"]
    assert kinds(log, 0) == list("cde")
    assert not log.since(0).gap
    assert log.since(cursors[0]).gap
    assert not log.since(cursors[1]).gap
    assert kinds(log, cursors[0]) == list("cde")


def test_a_cursor_of_an_earlier_run_still_orders() -> None:
    clock = SetClock(1000)
    old = EventLog(clock, 3).emit("a")["cursor"]
    clock.now_us = 5000
    log = EventLog(clock, 3)
    log.emit("b")
    assert kinds(log, old) == ["b"]
    assert log.since(old).gap


def test_a_cursor_of_the_future_gets_everything_and_a_gap() -> None:
    log = EventLog(SetClock(1000), 3)
    log.emit("a")
    page = log.since(1 << 50)
    assert page.gap
    assert [event["kind"] for event in page.events] == ["a"]


def test_listeners_hear_each_event_at_once() -> None:
    log = EventLog(SetClock(1), 3)
    heard: list[str] = []
    log.listen(lambda event: heard.append(event["kind"]))
    log.emit("a")
    log.emit("b")
    assert heard == ["a", "b"]


def test_followers_wake_and_a_cancelled_one_is_forgotten() -> None:
    async def run() -> None:
        log = EventLog(SetClock(1), 3)
        log.emit("a")
        assert [event["kind"] for event in (await log.follow(0)).events] == ["a"]
        first = asyncio.create_task(log.follow(log.cursor))
        second = asyncio.create_task(log.follow(log.cursor))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        log.emit("b")
        assert [event["kind"] for event in (await first).events] == ["b"]
        assert log._waiters == []

    asyncio.run(run())
