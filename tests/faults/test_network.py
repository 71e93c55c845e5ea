"""Links that fail without a word, flap, crawl, stall and lie (faults 18-23; I2, I4, I8).

The client of the primary notices nothing; the loss is noticed within the configured time; after
it the stream goes on from the log, and both nodes end equal.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdmirror.codec import repl
from nbdmirror.codec.repl import Type
from tests.faults.inject import (
    check_equal,
    check_serves,
    needs_root,
    requires_programs,
    resyncs,
)
from tests.faults.journal import Background, Journal, Load
from tests.faults.wire import NAMESPACES, Wire, WiredCluster, run
from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.process import wait_until
from tests.integration.test_replication import STALL_S
from tests.integration.tools import Writer

MakeCluster = Callable[..., Cluster]
SIZE = 8 * MIB
NOTICED_S = 8.0
"""Within this a lost link must be known: three time-outs, for a loaded machine."""


@pytest.fixture
def wired(tmp_path: Path) -> Iterator[WiredCluster]:
    """A group over a wire."""
    with (
        Wire() as wire,
        WiredCluster(tmp_path / "group", wire, volumes=[Volume(size=SIZE)]) as cluster,
    ):
        cluster.start()
        yield cluster
    cluster.kill()


def connected(cluster: Cluster) -> bool:
    """Whether the link is up, as the primary knows it."""
    return bool(cluster.primary.remote()["link"] == "connected")


@needs_root
@requires_programs("ip")
def test_what_a_killed_run_left_is_removed() -> None:
    """Namespaces of a process that is gone, and no others."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = {pid: f"nbdm{pid}-0-u" for pid in (gone.pid, os.getppid())}
    for name in names.values():
        run("ip", "netns", "add", name)
    try:
        with Wire() as wire:
            there = {path.name for path in NAMESPACES.iterdir()}
            assert names[gone.pid] not in there
            assert {names[os.getppid()], *wire.ends.values()} <= there
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@needs_root
@requires_programs("ip")
@pytest.mark.parametrize("fault", ["pulled", "swallow up", "swallow down"])
def test_silent_link(wired: WiredCluster, fault: str) -> None:
    """Faults 18 and 22: the cable out, or one way cut by a route: no reset comes, heartbeats do
    not either; the session ends in time, and the next one goes on from the log."""
    journal, wire = Journal(SIZE), wired.wire
    with (
        Load(wired.primary.nbd_socket, journal, timeout=STALL_S) as load,
        Background(load, pause_s=0.01),
    ):
        if fault == "pulled":
            wire.pull()
        else:
            wire.swallow(fault.split()[1])
        wired.primary.until("lost its link", lambda one: one["link"] != "connected", s=NOTICED_S)
        assert wired.primary.remote()["lag"]["records"] > 0
        if fault == "pulled":
            wire.plug()
        else:
            wire.deliver(fault.split()[1])
        wired.primary.until("is back", lambda one: one["link"] == "connected")
    check_serves(wired, journal)
    check_equal(wired)
    assert len(resyncs(wired)) == 1, "only the first synchronisation was more than the log"


@needs_root
@requires_programs("ip")
def test_flapping_link(wired: WiredCluster) -> None:
    """Fault 19: up and down every half second: no storm of sessions, no gap, no resync."""
    journal, wire = Journal(SIZE), wired.wire
    flaps = 5
    with (
        Load(wired.primary.nbd_socket, journal, timeout=STALL_S) as load,
        Background(load, pause_s=0.01),
    ):
        for _ in range(flaps):
            wire.pull()
            time.sleep(0.5)  # the fault's own rhythm
            wire.plug()
            time.sleep(0.5)  # and again
    check_serves(wired, journal)
    check_equal(wired)
    shaken = [event for event in wired.primary.events() if event["kind"] == "handshake"]
    assert len(shaken) <= flaps + 1
    assert len(resyncs(wired)) == 1


@needs_root
@requires_programs("ip", "tc")
def test_slow_link(wired: WiredCluster) -> None:
    """Fault 20: 4 Mbit/s: the client's latency stays, the lag is shown, the link is not lost."""
    journal, wire = Journal(SIZE), wired.wire
    wire.slow("4mbit")
    with (
        Load(wired.primary.nbd_socket, journal, timeout=STALL_S) as load,
        Background(load, pause_s=0.01),
    ):
        entry = wired.primary.until("is behind", lambda one: one["lag"]["bytes"] > 2 * MIB)
        assert entry["link"] == "connected" and entry["lag"]["seconds"] > 0
        moved = entry["durable_seq"]
        wired.primary.until("moves", lambda one: one["durable_seq"] > moved)
    wire.fast()
    check_serves(wired, journal)
    check_equal(wired)
    assert len(resyncs(wired)) == 1


@needs_root
@requires_programs("ip", "tc")
def test_in_sync_over_a_link_slower_than_the_client(tmp_path: Path) -> None:
    """X3; peers 11, 12, 28: the whole volume is rewritten faster than a real link of 4 Mbit/s
    takes it, and the first synchronisation ends nevertheless, in the time that was foretold."""
    size, link, load = 2 * MIB, 5e5, 8e5
    with (
        Wire() as wire,
        WiredCluster(
            tmp_path / "group", wire, volumes=[Volume(size=size)], log_size=256 * MIB
        ) as cluster,
    ):
        cluster.create()
        with cluster.primary.facets("data")[0].open("r+b") as file:
            file.write(os.urandom(size))
        wire.slow("4mbit")
        cluster.start(synced=False, created=True)
        with Writer(cluster.primary.uri(), blocks=size // 4096, rate=load) as writer:
            began, before = time.monotonic(), writer.writes
            cluster.wait_in_sync(120)
            took = time.monotonic() - began
            written = (writer.writes - before) * 4096 / took
        kinds = [event["kind"] for event in cluster.primary.events()]
        assert kinds.count("overflow") == 0
        # A part of the link is headers: of records, frames, TCP and the wire.
        payload = 0.92 * link
        copying, part = size / payload, written / payload
        bound = copying * (1 + 2 * (1 + part) + 2 * part) + 15
        assert written > link, "or the link was not too slow"
        assert took < bound, f"in sync after {took:.1f} s, foretold were {bound:.1f}"
        assert writer.slowest_s < STALL_S
        print(
            f"in sync after {took:.1f} s, foretold {bound:.1f}; "
            f"written {written / MIB:.1f} MiB/s, link 4 Mbit/s"
        )
        wire.fast()
        check_equal(cluster)


def end_session_by_flip(cluster: Cluster, distance: int, direction: str) -> None:
    """A bit of the byte so far ahead flips; returns when that has ended the session."""
    wait_until("the link is up", lambda: connected(cluster))
    sessions = cluster.proxy.connections
    cluster.proxy.flip(distance, direction)
    wait_until("the session ended", lambda: cluster.proxy.connections > sessions)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_corrupted_bytes_under_load(make_cluster: MakeCluster, direction: str) -> None:
    """Fault 23: bits flip on the wire: each time the session ends, the next sends again what was
    damaged; not one wrong byte stays."""
    cluster = make_cluster(volumes=[Volume(size=SIZE)]).start()
    journal = Journal(SIZE)
    rng = random.Random(23)
    with (
        Load(cluster.primary.nbd_socket, journal, timeout=STALL_S) as load,
        Background(load, pause_s=0.005),
    ):
        for _ in range(4):
            distance = rng.randrange(200 if direction == "down" else 200_000)
            end_session_by_flip(cluster, distance, direction)
    check_serves(cluster, journal)
    check_equal(cluster)
    assert len(resyncs(cluster)) == 1


class Meddler:
    """Passes frames on whole, and does something to one that carries records."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bytes = b""
        self._kept: bytes | None = None
        self.done = False

    def __call__(self, data: bytes) -> bytes:
        self._bytes += data
        passed = b""
        while (frame := self._frame()) is not None:
            passed += frame if self.done or frame[4] != Type.RECORDS else self._meddle(frame)
        return passed

    def _frame(self) -> bytes | None:
        end = repl.HEADER_SIZE + int.from_bytes(self._bytes[8:12], "little")
        if len(self._bytes) < max(end, repl.HEADER_SIZE):
            return None
        frame, self._bytes = self._bytes[:end], self._bytes[end:]
        return frame

    def _meddle(self, frame: bytes) -> bytes:
        if self._what == "swapped" and self._kept is None:
            self._kept = frame
            return b""
        self.done = True
        return {"lost": b"", "doubled": 2 * frame, "swapped": frame + (self._kept or b"")}[
            self._what
        ]


@pytest.mark.parametrize("what", ["lost", "doubled", "swapped"])
def test_messages_lost_doubled_swapped(make_cluster: MakeCluster, what: str) -> None:
    """Fault 21, O8: TCP does not do that to its bytes, but somebody in between may, with whole
    messages whose sums are right: records that do not follow end the session, those that were
    there already are skipped; the next session sends what is missing, and nothing differs."""
    cluster = make_cluster(volumes=[Volume(size=SIZE)]).start()
    journal = Journal(SIZE)
    check_equal(cluster)
    with (
        Load(cluster.primary.nbd_socket, journal, timeout=STALL_S) as load,
        Background(load, pause_s=0.005),
    ):
        for _ in range(3):
            wait_until("the link is up", lambda: connected(cluster))
            sessions = cluster.proxy.connections
            meddler = Meddler(what)
            # From a boundary between two frames on: that of a new session.
            cluster.proxy.reset()
            cluster.proxy.meddle = meddler
            wait_until("it is done", lambda: meddler.done)  # noqa: B023
            if what != "doubled":
                wait_until("a new session", lambda: cluster.proxy.connections > sessions + 1)  # noqa: B023
            cluster.proxy.meddle = None
            cluster.proxy.reset()
    check_serves(cluster, journal)
    check_equal(cluster)
    assert len(resyncs(cluster)) == 1, "the log was enough"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_half_open_connection(make_cluster: MakeCluster, direction: str) -> None:
    """Fault 22: one way stalls, later the held bytes arrive after all: both sides have given the
    session up, and what comes late over it changes nothing."""
    cluster = make_cluster(volumes=[Volume(size=SIZE)]).start()
    journal = Journal(SIZE)
    with (
        Load(cluster.primary.nbd_socket, journal, timeout=STALL_S) as load,
        Background(load, pause_s=0.005),
    ):
        cluster.proxy.stall(direction)
        cluster.primary.until("lost its link", lambda one: one["link"] != "connected", s=NOTICED_S)
        cluster.proxy.heal()
        wait_until("the link is up", lambda: connected(cluster))
    check_serves(cluster, journal)
    check_equal(cluster)
    assert len(resyncs(cluster)) == 1
