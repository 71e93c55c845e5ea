"""One machine: disks that outlive it, a guest while it has power, an agent in the guest.

Knows nothing of replication: that is ``pair``'s. The host asks, the agent answers; in between the
agent reports what its load was promised.
"""

from __future__ import annotations

import json
import random
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.guest.cuts.disk import KEEP_NONE, CutDisk, Fate
from tests.guest.guest import HERE, Disk, Guest, GuestError, tail
from tests.guest.kernel import TREE

# Only for what hangs: a guest without KVM, on a machine that is busy, is up after minutes.
BOOT_S = 600.0
ANSWER_S = 900.0
POWER_OFF_S = 30.0
STARTS_MAX = 3
SERIAL_LINES = 60
Json = dict[str, Any]


class Machine:
    """``settings`` go to the agent; ``disks`` are vda and those from vdc on, ``scratch`` is vdb:
    a plain file for copies that the host reads. ``report`` gets what the load reports."""

    def __init__(
        self,
        name: str,
        state: Path,
        settings: Json,
        disks: list[CutDisk],
        scratch: Path,
        forwards: dict[int, int],
        report: Callable[[Json], None],
        *,
        eager: str = "",
    ) -> None:
        self.name = name
        self.scratch = scratch
        self.created = False
        self.boots = 0
        self.serial = ""
        """What the guest printed in its last life, if that is over."""
        self._state = state
        self._settings = settings
        self._disks = disks
        self._forwards = forwards
        self._report = report
        self._eager = eager
        self._guest: Guest | None = None
        self._listener: socket.socket | None = None
        self._agent: socket.socket | None = None
        self._received = b""

    # -- power -----------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Switches on; ``connect`` waits until it is up."""
        assert self._guest is None
        self.boots += 1
        self._received = b""
        # A listener for each life: what a former one had asked for is not answered any more.
        self._listener = socket.create_server(("127.0.0.1", 0))
        settings = {
            **self._settings,
            "created": self.created,
            "port": self._listener.getsockname()[1],
        }
        first, *others = (disk.switch_on() for disk in self._disks)
        self._guest = Guest(
            HERE / "jobs" / "node.sh",
            disks=[first, Disk(self.scratch), *others],
            environment={
                "TREE": str(TREE),
                "STATE": str(self._state),
                "SETTINGS": json.dumps(settings),
                "EAGER": self._eager,
            },
            forwards=self._forwards,
        )

    def connect(self) -> None:
        """Returns when the agent is there, and the daemon, if there is one, serves."""
        end = time.monotonic() + BOOT_S
        starts = 1
        while (agent := self._accept(0.5)) is None:
            if self._is_stillborn() and starts < STARTS_MAX:
                self.close()
                self.power_on()
                starts += 1
            self._check_alive()
            if time.monotonic() > end:
                raise self._failure(f"is not up after {BOOT_S:g} s")
        self._agent = agent
        if self.created:
            self.ask("ready")

    def _accept(self, seconds: float) -> socket.socket | None:
        assert self._listener is not None
        ready, _, _ = select.select([self._listener], [], [], seconds)
        return self._listener.accept()[0] if ready else None

    def cut(self, fate: Fate, rng: random.Random) -> int:
        """The power goes. Returns how many writes no flush had covered, as far as that matters.

        Unless all of them are kept, nothing that the machine sends from now on may reach anybody:
        whoever is behind the network has cut that before."""
        guest = self._guest
        assert guest is not None
        unflushed = 0
        if fate is Fate.KEPT:
            guest.power_cut()
            self._take_last_words()
        else:
            self._take_last_words()
            clocks = [disk.clock() for disk in self._disks]
            guest.halt()
            guest.power_cut()
            guest.wait(POWER_OFF_S)
            for disk, clock in zip(self._disks, clocks, strict=True):
                seed = KEEP_NONE if fate is Fate.LOST else rng.randrange(KEEP_NONE + 1, 1 << 30)
                unflushed += disk.cut(clock, seed)
        self.close()
        return unflushed

    def _take_last_words(self) -> None:
        """What has arrived counts; what comes later does not."""
        if self._agent is not None:
            self._pump(0, dying=True)

    def lie(self) -> None:
        """See ``CutDisk.lies_from``; until the next cut."""
        for disk in self._disks:
            disk.lies_from = disk.clock()

    def close(self) -> None:
        """Switches off, whatever the state."""
        for sock in (self._agent, self._listener):
            if sock is not None:
                sock.close()
        self._agent = self._listener = None
        if self._guest is not None:
            self.serial = self._guest.serial
            self._guest.close()
            self._guest = None

    # -- the agent -------------------------------------------------------------------------------

    def ask(self, what: str, *, answer_s: float = ANSWER_S, **arguments: object) -> Any:
        """Has the agent do something; GuestError if it cannot, with what the guest printed."""
        assert self._agent is not None, f"{self.name} is not up"
        self._agent.sendall(json.dumps({"do": what, **arguments}).encode() + b"\n")
        answers: list[Json] = []
        end = time.monotonic() + answer_s
        while not answers:
            if time.monotonic() > end:
                raise self._failure(f"does not answer {what} within {answer_s:g} s")
            answers = self._pump(0.5)
        if "error" in answers[0]:
            raise self._failure(f"cannot {what}: {answers[0]['error']}")
        return answers[0]["done"]

    def pass_time(self, seconds: float) -> None:
        """Takes reports for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            stray = self._pump(min(left, 0.5))
            assert not stray, stray

    def _pump(self, seconds: float, *, dying: bool = False) -> list[Json]:
        """Takes what arrives within the time; returns answers, hands on reports."""
        assert self._agent is not None
        try:
            while select.select([self._agent], [], [], seconds)[0]:
                data = self._agent.recv(1 << 16)
                if not data:
                    raise ConnectionResetError
                self._received += data
                seconds = 0
        except OSError:
            if not dying:
                raise self._failure("hung up") from None
        *lines, self._received = self._received.split(b"\n")
        answers = []
        for message in map(json.loads, lines):
            if message.keys() & {"done", "error"}:
                answers.append(message)
            elif "failure" in message:
                raise self._failure(message["failure"])
            elif "hello" not in message:
                self._report(message)
        return answers

    def _is_stillborn(self) -> bool:
        """QEMU has ended before the guest's kernel came to print anything: an emulation that resets
        itself in its first second, which happens once in very many starts on a busy host."""
        assert self._guest is not None
        return not self._guest.alive and not self._guest.serial

    def _check_alive(self) -> None:
        assert self._guest is not None
        if not self._guest.alive:
            raise self._failure("went off by itself")

    def _failure(self, what: str) -> GuestError:
        guest = self._guest
        serial = tail(guest.serial if guest else self.serial, SERIAL_LINES)
        return GuestError(f"{self.name} {what}\n{guest.complaints() if guest else ''}\n{serial}")
