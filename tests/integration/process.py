"""Child processes that tests start, watch and hurt, and waiting for what they do.

Owns: one process with its output in a file; readiness by ``sd_notify`` or by a socket that
accepts; stopping, killing, freezing. Knows nothing of nbdmirror. Used by ``cluster``, by the
tests and by ``tests.bench``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

DEADLINE_S = 30.0
POLL_S = 0.02
LOWEST_PORT = 10_000
T = TypeVar("T")


class ProcessError(AssertionError):
    """A process did not do what the test needs; the message carries the end of its output."""


def wait_until(what: str, probe: Callable[[], T | None], seconds: float = DEADLINE_S) -> T:
    """Calls ``probe`` until it gives something true; AssertionError naming ``what`` at the end.

    The pause between two calls only spares the processor: nothing depends on its length.
    """
    end = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what} (last: {value!r})")
        time.sleep(POLL_S)


def _ports() -> Iterator[int]:
    """Ports below those that the kernel gives to outgoing connections, so that nothing but a test
    takes one while its daemon is down. Each process of a test run (pytest-xdist's workers: gw0,
    gw1, ...) has ports of its own, and begins where other runs hardly are."""
    first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = range(LOWEST_PORT + worker, max(first, LOWEST_PORT + 1000), workers)
    at = random.randrange(len(mine))
    return itertools.cycle([*mine[at:], *mine[:at]])


_next_port = _ports()


def free_port() -> int:
    """A TCP port on loopback that nobody listens at now, and that no test was given lately."""
    for port in _next_port:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the ports go round")


def accepts(address: str) -> bool:
    """Whether ``unix:PATH`` or ``tcp:HOST:PORT`` takes a connection."""
    kind, _, rest = address.partition(":")
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    host, _, port = rest.rpartition(":")
    with socket.socket(family) as probe:
        try:
            probe.connect(rest if kind == "unix" else (host, int(port)))
        except OSError:
            return False
        return True


class NotifySocket:
    """The receiving end of ``sd_notify``: a datagram socket that a service sends its state to."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="notify-")
        self.path = os.path.join(self.directory, "s")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)

    def wait_ready(self, process: Process, seconds: float) -> None:
        """Returns on READY=1; ProcessError at once if the process ends first."""
        end = time.monotonic() + seconds
        death = os.pidfd_open(process.pid)
        try:
            while (left := end - time.monotonic()) > 0:
                ready, _, _ = select.select([self.socket.fileno(), death], [], [], left)
                if self.socket.fileno() in ready:
                    if b"READY=1" in self.socket.recv(4096).split(b"\n"):
                        return
                elif death in ready:
                    raise process.failure("ended before it was ready")
            raise process.failure(f"not ready within {seconds:g} s")
        finally:
            os.close(death)

    def close(self) -> None:
        """Removes the socket."""
        self.socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        os.rmdir(self.directory)


class Process:
    """One child process. Its standard output and error go to ``log``, appended."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        notify: float | None = None,
        listens: str | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Starts ``argv``; returns when it is ready.

        ``notify``: wait so many seconds for READY=1. ``listens``: wait for this address to accept.
        With neither it returns at once. ``pass_fds``: descriptors that it inherits.
        """
        self.name = name
        self.log = log
        environment = {**os.environ, **(env or {})}
        # Kept until the process ends, as a service manager does.
        self._notifier = NotifySocket() if notify is not None else None
        try:
            if self._notifier is not None:
                environment["NOTIFY_SOCKET"] = self._notifier.path
            with log.open("ab") as output:
                self.popen = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    pass_fds=pass_fds,
                )
            if self._notifier is not None and notify is not None:
                self._notifier.wait_ready(self, notify)
            if listens is not None:
                self.wait_listening(listens)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The process id; valid until the process was waited for."""
        popen: subprocess.Popen[bytes] = self.popen
        return popen.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs (or is frozen)."""
        return self.popen.poll() is None

    def output(self, lines: int = 40) -> str:
        """The end of what it printed."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def failure(self, what: str) -> ProcessError:
        """The error that says what is wrong with this process."""
        return ProcessError(f"{self.name} {what}; exit {self.popen.poll()}\n{self.output()}")

    def wait_listening(self, address: str, seconds: float = DEADLINE_S) -> None:
        """Returns when the address accepts; ProcessError if the process ends first."""

        def probe() -> bool:
            if not self.alive:
                raise self.failure(f"ended before it listened at {address}")
            return accepts(address)

        wait_until(f"{self.name} listens at {address}", probe, seconds)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal if it still runs."""
        if self.alive:
            self.popen.send_signal(number)

    def stop(self, seconds: float = DEADLINE_S) -> int:
        """SIGTERM, and the exit code. One that does not end is killed and is an error."""
        self.thaw()
        self.signal(signal.SIGTERM)
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not stop within {seconds:g} s of SIGTERM") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        if hasattr(self, "popen"):
            self.signal(signal.SIGKILL)
            self.popen.wait()
        if self._notifier is not None:
            self._notifier.close()
            self._notifier = None

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing moves; returns when it has taken effect."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)


def children(pid: int) -> list[int]:
    """Those of a process, now."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
