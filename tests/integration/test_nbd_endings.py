"""Connections that end while requests are under way, and requests that others stand before (I6, I8,
X7): what is replied to is done, once, in its order; what is not, is sent again by the client."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.integration.cluster import MIB, Cluster, Volume
from tests.integration.process import wait_until
from tests.integration.rawnbd import DISC, FLUSH, FUA, OPT_STRUCTURED, READ, WRITE, RawClient
from tests.integration.tools import connect, pattern

KIB = 1024
MakeCluster = Callable[..., Cluster]
Attach = Callable[..., RawClient]
PLACE = 60 * MIB
QUIET_S = 1.0


def request(kind: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    """Without the data of a write."""
    return struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length)


def write(cookie: int, offset: int, data: bytes, flags: int = 0) -> bytes:
    return request(WRITE, cookie, offset, len(data), flags) + data


def reply(client: RawClient) -> tuple[int, int]:
    """(error, cookie) of a reply without data."""
    magic, error, cookie = struct.unpack(">IIQ", client.receive(16))
    assert magic == 0x67446698
    return error, cookie


@pytest.fixture
def attached() -> Iterator[Attach]:
    """Attaches clients; each is closed at the end at the latest."""
    with contextlib.ExitStack() as stack:

        def attach(cluster: Cluster, *, structured: bool = False) -> RawClient:
            client = stack.enter_context(RawClient(cluster.primary.nbd_socket))
            if structured:
                client.option(OPT_STRUCTURED)
                client.reply()
            client.go("data")
            return client

        yield attach


def answers(client: RawClient) -> tuple[int, int] | None:
    """The next reply, or none in a while."""
    ready, _, _ = select.select([client.socket], [], [], QUIET_S)
    return reply(client) if ready else None


def fill_log(client: RawClient, length: int) -> None:
    """Writes until one of such a length waits for room."""
    number = 0
    while number == 0 or answers(client) is not None:
        number += 1
        client.send(write(number, number % 100 * 256 * KIB, b"f" * length))


def send_waiting(cluster: Cluster, client: RawClient, data: bytes) -> None:
    """Sends a request, and returns when it waits by itself: it holds memory then."""

    def used() -> int:
        return int(cluster.primary.status()["connections"]["memory"]["used"])

    before = used()
    client.send(data)
    wait_until("it waits", lambda: used() > before or None)


def test_a_write_of_a_closed_connection_is_not_made_later(
    make_cluster: MakeCluster, attached: Attach
) -> None:
    """I3: its client has sent it again, had it confirmed, and written something else there. Want of
    room in the log, in one batch with a longer one, is but one way to wait."""
    cluster = make_cluster(on_full="block", log_size=16 * MIB).start()
    cluster.wait_in_sync()
    cluster.proxy.refuse()
    cluster.primary.until("is away", lambda one: one["link"] == "disconnected")
    first = attached(cluster)
    first.send(write(1, 50 * MIB, bytes(84 * KIB)))
    assert answers(first) == (0, 1)
    number = 2
    while True:
        first.send(write(number, number % 100 * 256 * KIB, b"f" * 100 * KIB))
        if answers(first) is None:
            break
        number += 1
    gone = attached(cluster)
    gone.send(write(1, 40 * MIB, b"g" * 100 * KIB) + write(2, PLACE, b"1" * 34 * KIB))
    assert answers(gone) is None
    gone.socket.close()
    first.socket.close()
    again = attached(cluster)
    for cookie, data in ((1, b"1"), (2, b"2")):
        again.send(write(cookie, PLACE, data * 34 * KIB))
        assert answers(again) == (0, cookie)
    again.send(request(FLUSH, 3, 0, 0))
    assert answers(again) == (0, 3)
    cluster.proxy.heal()
    cluster.wait_in_sync()
    assert connect(cluster.primary.uri()).pread(16, PLACE) == b"2" * 16
    cluster.check_in_sync()


def test_who_hangs_up_while_nothing_is_read_from_it_has_gone(
    make_cluster: MakeCluster, attached: Attach
) -> None:
    """I3, I6: too many of its writes wait, so that nobody would read that it is gone. None of them
    is made later, and its place is free."""
    cluster = make_cluster(on_full="block", log_size=16 * MIB)
    cluster.primary.keys["limits"] = ["requests_max = 4"]
    cluster.primary.write_config()
    cluster.start()
    cluster.proxy.refuse()
    cluster.primary.until("is away", lambda one: one["link"] == "disconnected")
    fill_log(attached(cluster), 100 * KIB)

    def clients() -> int:
        return int(cluster.primary.status()["connections"]["nbd"]["open"])

    gone = attached(cluster)
    gone.send(b"".join(write(n, PLACE, b"1" * 100 * KIB, FUA) for n in range(5)))
    assert answers(gone) is None and clients() == 2
    gone.socket.close()
    wait_until("it is seen to be gone", lambda: clients() == 1 or None, 5)
    again = attached(cluster)
    cluster.proxy.heal()
    again.send(write(1, PLACE, b"2" * 100 * KIB, FUA))
    assert reply(again) == (0, 1)
    cluster.wait_in_sync()
    assert connect(cluster.primary.uri()).pread(16, PLACE) == b"2" * 16
    cluster.check_in_sync()


@pytest.mark.parametrize("more", [False, True])
def test_who_is_not_read_from_is_not_ended_for_it(
    make_cluster: MakeCluster, attached: Attach, more: bool
) -> None:
    """I8: as many of its writes wait as may, one more is half received, and others want memory;
    with ``more``, a request that has to wait for its turn came along."""
    cluster = make_cluster(on_full="block", log_size=16 * MIB)
    limits = ["requests_max = 4", "memory_bytes_max = '128MiB'", "handshake_seconds = 1"]
    cluster.primary.keys["limits"] = limits
    cluster.primary.write_config()
    cluster.start()
    cluster.proxy.refuse()
    cluster.primary.until("is away", lambda one: one["link"] == "disconnected")
    fill_log(attached(cluster), 32 * KIB)
    patient, greedy = attached(cluster), attached(cluster)
    for number in range(2):
        greedy.send(write(number, 0, bytes(60 * MIB)))
    short = [write(number, 0, bytes(33 * KIB), FUA) for number in range(4)]
    if more:
        short[-1] += request(READ, 5, 0, 512)
    patient.send(b"".join(short[:-1]))
    assert answers(patient) is None
    sending = threading.Thread(target=patient.send, args=(short[-1] + write(4, 0, bytes(MIB)),))
    sending.start()
    assert answers(patient) is None
    greedy.send(request(WRITE, 2, 0, 60 * MIB))
    time.sleep(4)
    assert cluster.primary.status()["connections"]["memory"]["ended"] == 0
    cluster.proxy.heal()
    got = []
    for _ in range(5 + more):
        got.append(reply(patient)[1])
        if got[-1] == 5:
            patient.receive(512)
    sending.join()
    assert sorted(got) == list(range(5 + more))


def test_a_journal_that_nobody_reads_stops_no_volume(
    make_cluster: MakeCluster, attached: Attach
) -> None:
    """I8: the pipe is open, and full when the daemon starts."""
    cluster = make_cluster(remotes=())
    journal = cluster.primary.directory / "output"
    os.mkfifo(journal)
    pipe = os.open(journal, os.O_RDWR)
    try:
        os.write(pipe, bytes(fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)))
        cluster.start(synced=False)
        cluster.primary.reload()
        wait_until(
            "it was told", lambda: any(e["kind"] == "reloaded" for e in cluster.primary.events())
        )
        client = attached(cluster)
        client.send(write(1, 0, bytes(4096), FUA))
        assert answers(client) == (0, 1)
        cluster.primary.stop()
    finally:
        os.close(pipe)


def test_a_clean_stop_under_load_refuses_nothing(
    make_cluster: MakeCluster, attached: Attach
) -> None:
    """X7: the kernel's client makes an I/O error of any refusal, and sends again what is not
    answered."""
    cluster = make_cluster(remotes=()).start()
    errors: list[int] = []

    def load(number: int) -> None:
        sent = answered = 0
        client = attached(cluster)
        try:
            while True:
                while sent - answered < 16:
                    place = (number * 16 + sent % 16) * 64 * KIB
                    client.send(write(sent, place, bytes(4096), FUA if sent % 4 == 0 else 0))
                    sent += 1
                error, _ = reply(client)
                errors.append(error)
                answered += 1
        except (OSError, EOFError):
            pass

    clients = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for client in clients:
        client.start()
    wait_until("clients are busy", lambda: len(errors) > 1000 or None)
    cluster.primary.stop()
    for client in clients:
        client.join()
    assert errno.ESHUTDOWN not in errors and not any(errors)


@pytest.mark.parametrize(("more", "writes"), [(True, 1), (False, 1), (False, 8)])
def test_what_comes_before_a_disconnect_is_done(
    make_cluster: MakeCluster, attached: Attach, more: bool, writes: int
) -> None:
    """NBD_CMD_DISC: all outstanding requests are handled, those too that had to wait for others.
    A client may say that it sends no ``more``, as libnbd does, and still read; of eight ``writes``
    the last are unread by then, and so is the goodbye."""
    cluster = make_cluster(remotes=()).start()
    handle = connect(cluster.primary.uri())
    for number in range(64):
        handle.pwrite(pattern(MIB, number), number * MIB)
    client, reads, length = attached(cluster), 60, 100 * KIB
    places = [62 * MIB + number * MIB // 8 for number in range(writes)]
    data = b"".join(request(READ, number, number * MIB, MIB) for number in range(reads))
    data += b"".join(write(reads, place, b"W" * length, FUA) for place in places)

    def send() -> None:
        client.send(data + request(DISC, 0, 0, 0))
        if not more:
            client.socket.shutdown(socket.SHUT_WR)

    sending = threading.Thread(target=send)
    sending.start()
    time.sleep(QUIET_S)  # nothing tells when no more can be sent before it reads
    got = 0
    while piece := client.socket.recv(MIB):
        got += len(piece)
    sending.join()
    assert got == reads * (16 + MIB) + writes * 16
    assert all(handle.pread(length, place) == b"W" * length for place in places)


@pytest.mark.parametrize(("count", "more"), [(3, 0), (4, 0), (4, 3)])
def test_who_says_goodbye_and_hangs_up_has_its_requests_made(
    make_cluster: MakeCluster, attached: Attach, count: int, more: int
) -> None:
    """NBD_CMD_DISC, I6: though no reply can reach it. Where four writes wait nothing more is read,
    neither the goodbye nor what comes before it. Then its place and its memory are free."""
    cluster = make_cluster(on_full="block", log_size=16 * MIB)
    cluster.primary.keys["limits"] = ["requests_max = 4"]
    cluster.primary.write_config()
    cluster.start()
    cluster.proxy.refuse()
    cluster.primary.until("is away", lambda one: one["link"] == "disconnected")
    fill_log(attached(cluster), 32 * KIB)
    places = [PLACE + number * MIB // 4 for number in range(count + more)]
    gone = attached(cluster)
    for cookie, place in enumerate(places[:count]):
        send_waiting(cluster, gone, write(cookie, place, b"d" * 33 * KIB, FUA))
    rest = [write(count + n, place, b"d" * KIB) for n, place in enumerate(places[count:])]
    gone.send(b"".join(rest) + request(DISC, 99, 0, 0))
    gone.socket.close()
    time.sleep(QUIET_S)  # room comes behind its end; nothing tells when that is seen
    cluster.proxy.heal()
    cluster.wait_in_sync()

    def held() -> tuple[int, int]:
        connections = cluster.primary.status()["connections"]
        return connections["nbd"]["open"], connections["memory"]["used"]

    wait_until("nothing is kept of it", lambda: held() == (1, 0) or None)
    handle = connect(cluster.primary.uri())
    assert [handle.pread(1, place) for place in places] == [b"d"] * len(places)
    cluster.check_in_sync()


@pytest.mark.parametrize("length", [KIB, 33 * KIB])
def test_what_waits_behind_a_goodbye_is_not_made_later(
    make_cluster: MakeCluster, attached: Attach, length: int
) -> None:
    """I3: four requests are under way and a fifth waits for its turn when its client hangs up; the
    next client has a write to the same place confirmed. The log has room for the short one."""
    cluster = make_cluster(on_full="block", log_size=16 * MIB)
    cluster.primary.keys["limits"] = ["requests_max = 4"]
    cluster.primary.write_config()
    cluster.start()
    cluster.proxy.refuse()
    cluster.primary.until("is away", lambda one: one["link"] == "disconnected")
    fill_log(attached(cluster), 32 * KIB)
    gone, again = attached(cluster), attached(cluster)
    for cookie in range(4):
        place = PLACE + (cookie + 1) * MIB // 4
        send_waiting(cluster, gone, write(cookie, place, b"d" * 33 * KIB, FUA))
    gone.send(write(4, PLACE, b"1" * length, FUA) + request(DISC, 99, 0, 0))
    gone.socket.close()
    time.sleep(QUIET_S)  # nothing tells when its end is seen
    again.send(write(5, PLACE, b"2" * length, FUA))
    time.sleep(QUIET_S)  # nor when a write waits for others that are at work
    cluster.proxy.heal()
    assert reply(again) == (0, 5)
    cluster.wait_in_sync()
    assert connect(cluster.primary.uri()).pread(4, PLACE) == b"2222"
    cluster.check_in_sync()


def test_who_hangs_up_without_reading_its_replies_is_gone(
    make_cluster: MakeCluster, attached: Attach
) -> None:
    """I6: it asked for more than may be on the way to it, and for a write, and said goodbye."""
    cluster = make_cluster(remotes=()).start()
    handle = connect(cluster.primary.uri())
    for number in range(16):
        handle.pwrite(pattern(64 * KIB, number), number * 64 * KIB)
    gone = attached(cluster)
    reads = [request(READ, number, number % 16 * 64 * KIB, 64 * KIB) for number in range(4000)]
    gone.send(b"".join(reads) + write(4000, PLACE, b"W" * 4096) + request(DISC, 0, 0, 0))
    gone.socket.close()

    def held() -> tuple[int, int]:
        connections = cluster.primary.status()["connections"]
        return connections["nbd"]["open"], connections["memory"]["used"]

    wait_until("nothing is kept of it", lambda: held() == (1, 0) or None)
    assert handle.pread(4096, PLACE) == b"W" * 4096


def test_who_waits_for_memory_is_woken(make_cluster: MakeCluster, attached: Attach) -> None:
    """I6: others have all of it, and give it back little by little, while a request waits and a
    long one is half received."""
    cluster = make_cluster(remotes=(), volumes=[Volume(size=64 * MIB)])
    cluster.primary.keys["limits"] = ["memory_bytes_max = '128MiB'", "handshake_seconds = 30"]
    cluster.primary.write_config()
    cluster.start()
    handle = connect(cluster.primary.uri())
    for number in range(64):
        handle.pwrite(pattern(MIB, number), number * MIB)
    greedy = []
    for _ in range(20):
        client = attached(cluster, structured=True)
        client.send(b"".join(request(READ, n, n * MIB, MIB) for n in range(31)))
        greedy.append(client)

    def used() -> int:
        return int(cluster.primary.status()["connections"]["memory"]["used"])

    wait_until("memory is spent", lambda: used() >= 128 * MIB or None)
    waiting, length = attached(cluster), 300 * KIB
    reads = request(READ, 1, 0, 4096) + request(READ, 2, 0, 4096)
    waiting.send(reads + request(WRITE, 3, 0, length) + bytes(4000))
    greedy.pop().socket.close()
    wait_until("some is given back", lambda: used() >= 128 * MIB or None)
    for client in greedy:
        client.socket.close()
    wait_until("all is given back", lambda: used() < MIB or None)
    waiting.send(bytes(length - 4000))
    assert len(waiting.receive(2 * (16 + 4096) + 16)) == 2 * (16 + 4096) + 16
