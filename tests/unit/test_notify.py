"""What the service manager is told, when it is slow to hear it (sd_notify)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror.edge import notify

OTHER = b"OTHER=1"


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The service manager's socket, whose queue others have filled."""
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    monkeypatch.setattr(notify, "RETRY_SECONDS", 0.0)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sock.bind(path)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:  # what one sender may have under way is bounded too
                other = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                other.connect(path)
                other.setblocking(False)
                other.send(OTHER)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        other.send(OTHER)
        yield sock


def test_what_has_no_room_is_told_later_and_in_order(manager: socket.socket) -> None:
    """A daemon that serves, and was not heard to say so, would be ended after a minute."""

    async def play() -> list[bytes]:
        for text in (notify.WATCHDOG, "READY=1", notify.WATCHDOG, "STOPPING=1"):
            notify.notify(text)
        loop, told = asyncio.get_running_loop(), [b""]
        while told[-1] != b"STOPPING=1":
            told.append(await asyncio.wait_for(loop.sock_recv(manager, 64), 10))
        return [text for text in told[1:] if text != OTHER]

    assert asyncio.run(play()) == [b"WATCHDOG=1", b"READY=1", b"STOPPING=1"]


def test_a_manager_that_is_gone_is_told_nothing(manager: socket.socket, tmp_path: Path) -> None:
    """And nothing is kept for the next."""

    async def play() -> None:
        notify.notify("READY=1")
        assert notify._unsent
        (tmp_path / "notify").unlink()
        notify.notify("STOPPING=1")
        assert not notify._unsent

    asyncio.run(play())


def test_who_has_no_loop_waits_for_room(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``attach``, which has no data path to keep waiting."""
    monkeypatch.setattr(notify, "WAIT_SECONDS", 60.0)
    told: list[bytes] = []

    def read() -> None:
        manager.settimeout(60)
        while not told or told[-1] == OTHER:
            told.append(manager.recv(64))

    reader = threading.Thread(target=read)
    reader.start()
    notify.notify("READY=1")
    reader.join()
    assert told[-1] == b"READY=1"


def test_what_had_no_room_without_a_loop_goes_first(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "WAIT_SECONDS", 0.0)
    notify.notify("READY=1")
    with contextlib.suppress(BlockingIOError):
        while manager.recv(64):
            pass

    async def play() -> None:
        notify.notify(notify.WATCHDOG)

    asyncio.run(play())
    assert manager.recv(64) == b"READY=1"
