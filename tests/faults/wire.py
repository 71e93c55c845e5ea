"""A wire between two network namespaces: pulled out, cut one way, slowed down, without a reset.

Owns: the namespaces, the veth pair, routes, the queueing discipline; and a group whose nodes live
at its two ends. Touches nothing of the machine's own network. Used by ``test_network``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any, Self

import pytest

from tests.faults.inject import start_under
from tests.integration.cluster import FAST, Cluster, Node

_numbers = itertools.count()
NAMESPACES = Path("/run/netns")
NAME = re.compile(r"nbdm([0-9]+)-[0-9]+-[ud]")
"""Of a test run's process, so that what one left that was killed is known for it."""


def run(*argv: str) -> None:
    """Runs a command that must succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"


def _delete(name: str) -> None:
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def remove_stale() -> None:
    """Removes the namespaces of test runs that were killed before they could."""
    for path in NAMESPACES.glob("nbdm*"):
        found = NAME.fullmatch(path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _delete(path.name)


class Wire:
    """Two ends, ``up`` (of the primary) and ``down`` (of the secondary); a context manager."""

    def __init__(self) -> None:
        name = f"nbdm{os.getpid()}-{next(_numbers)}"
        self.ends = {"up": f"{name}-u", "down": f"{name}-d"}
        self.addresses = {"up": "10.231.77.1", "down": "10.231.77.2"}

    def __enter__(self) -> Self:
        remove_stale()
        try:
            for end in self.ends.values():
                run("ip", "netns", "add", end)
            up, down = self.ends.values()
            run(
                "ip",
                "-n",
                up,
                "link",
                "add",
                "w",
                "type",
                "veth",
                "peer",
                "name",
                "w",
                "netns",
                down,
            )
            for end in self.ends:
                self.ip(end, "address", "add", f"{self.addresses[end]}/30", "dev", "w")
                self.ip(end, "link", "set", "lo", "up")
                self.ip(end, "link", "set", "w", "up")
        except AssertionError as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {error}")
        return self

    def __exit__(self, *_exc: object) -> None:
        for end in self.ends.values():
            _delete(end)

    def ip(self, end: str, *argv: str) -> None:
        """Runs ``ip`` at one end."""
        run("ip", "-n", self.ends[end], *argv)

    def pull(self) -> None:
        """The cable is out at the secondary's end."""
        self.ip("down", "link", "set", "w", "down")

    def plug(self) -> None:
        """The cable is in again."""
        self.ip("down", "link", "set", "w", "up")

    def swallow(self, end: str) -> None:
        """What this end sends disappears."""
        other = "down" if end == "up" else "up"
        self.ip(end, "route", "add", "blackhole", f"{self.addresses[other]}/32")

    def deliver(self, end: str) -> None:
        """What this end sends arrives again."""
        other = "down" if end == "up" else "up"
        self.ip(end, "route", "delete", "blackhole", f"{self.addresses[other]}/32")

    def slow(self, rate: str) -> None:
        """What the primary sends passes at this rate, with a queue of 200 ms."""
        shape = ["tbf", "rate", rate, "burst", "32kb", "latency", "200ms"]
        run("tc", "-n", self.ends["up"], "qdisc", "replace", "dev", "w", "root", *shape)

    def fast(self) -> None:
        """Without a limit."""
        run("tc", "-n", self.ends["up"], "qdisc", "delete", "dev", "w", "root")


class WiredCluster(Cluster):
    """A group whose primary and secondary are at the two ends of a wire."""

    def __init__(self, directory: Path, wire: Wire, **options: Any) -> None:
        self.wire = wire
        tuning = {**FAST, "insecure": True}  # an address that is not loopback
        super().__init__(directory, proxied=False, tuning=tuning, **options)
        text = self.secondary.config.read_text()
        here = f"tcp:127.0.0.1:{self.secondary.replication_port}"
        self.secondary.config.write_text(text.replace(here, self.remote_address(self.secondary)))

    def remote_address(self, node: Node) -> str:
        return f"tcp:{self.wire.addresses['down']}:{node.replication_port}"

    def start(self, *, synced: bool = True, created: bool = False) -> Cluster:
        if not created:
            self.create()
        for node in self.nodes:
            end = "up" if node is self.primary else "down"
            assert start_under(node, ["ip", "netns", "exec", self.wire.ends[end]])
        if synced:
            self.wait_in_sync()
        return self

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self.wire.plug()
        super().close()
