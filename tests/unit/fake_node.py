"""A node that only remembers: the one stand-in behind the admin socket, for its tests.

It implements ``NodeApi``, the port between control and node; nothing of the socket is faked.
"""

from __future__ import annotations

import asyncio
import builtins
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbdmirror.config import Limits
from nbdmirror.engine.control import ControlServer
from nbdmirror.engine.events import EventLog
from nbdmirror.errors import NbdmirrorError, Refused, TimedOut

Json = dict[str, Any]


class FakePeople:
    """The port for what people do with snapshots."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self._calls = calls

    async def create(self, volume: str | None, protected: bool) -> Json:
        self._calls.append(("snapshot create", volume, protected))
        return SNAPSHOT

    def list(self) -> builtins.list[Json]:
        return [SNAPSHOT]

    def diff(self, spec: str, until: str | None, volume: str | None) -> Json:
        self._calls.append(("snapshot diff", spec, until, volume))
        return {
            "region_sizes": {"data": 65536},
            "ranges": [{"volume": "data", "offset": 65536, "length": 131072}],
            "bytes": 131072,
            "more": False,
        }

    async def delete(self, spec: str, everywhere: bool) -> Json:
        self._calls.append(("snapshot delete", spec, everywhere))
        return {"uuid": SNAPSHOT["uuid"], "number": 3}

    async def refresh(self, spec: str) -> Json:
        self._calls.append(("snapshot refresh", spec))
        return SNAPSHOT

    async def export(self, spec: str, writable: bool) -> Json:
        self._calls.append(("snapshot export", spec, writable))
        uris = ["nbd+unix:///data@3?socket=/run/nbdmirror/db.nbd"] if spec == "3" else []
        return {"writable": writable, "uris": uris}

    async def restore(
        self, spec: str, volume: str | None, while_attached: bool, keep: bool, force: bool
    ) -> Json:
        self._calls.append(("restore", spec, volume, while_attached, keep, force))
        return {"total_bytes": 131072, "undo": SNAPSHOT["uuid"]}

    async def changed(
        self,
        volume: str,
        ranges: builtins.list[tuple[int, int]],
        facet: str | None,
        force: bool,
    ) -> Json:
        self._calls.append(("changed", volume, ranges, facet, force))
        return {"facet": facet, "regions": 1, "bytes": 65536, "seq": 9}


SNAPSHOT: Json = {
    "number": 3,
    "uuid": "0123456789abcdef0123456789abcdef",
    "kind": "user",
    "state": "ok",
    "why": None,
    "seq": 41,
    "time_ns": 1_700_000_000_000_000_000,
    "volumes": ["data"],
    "size": 107374182400,
    "protected": False,
    "writable": False,
    "changed": {"regions": 2, "bytes": 131072},
    "own": {"regions": 0, "bytes": 0},
    "kept": {"regions": 2, "bytes": 131072},
    "clients": 0,
}


class StillClock:
    """A wall clock that stands still."""

    def time_ns(self) -> int:
        return 1_700_000_000_000_000_000

    def monotonic_ns(self) -> int:
        return 0

    def boot_id(self) -> str:
        return "boot"


def primary_status() -> Json:
    """The example of the interface."""
    return {
        "schema": 1,
        "group": "db",
        "node": "alpha",
        "role": "primary",
        "version": "0.1.0",
        "uptime_s": 12.3,
        "generation": "9f3c0123456789ab",
        "epoch": 4,
        "volumes": [
            {
                "name": "data",
                "size": 107374182400,
                "region_size": 65536,
                "clients": 1,
                "uris": ["nbd+unix:///data?socket=/run/nbdmirror/db.nbd"],
                "facets": [{"path": "/srv/db/data.img", "state": "synchronised", "errors": 0}],
            }
        ],
        "log": {
            "mode": "disk",
            "size": 1073741824,
            "used": 4096,
            "first_seq": 10,
            "next_seq": 12,
            "durable_seq": 11,
        },
        "remotes": [
            {
                "name": "beta",
                "address": "tcp:192.0.2.2:10810",
                "mode": "async",
                "link": "connected",
                "state": "synchronised",
                "received_seq": 11,
                "durable_seq": 11,
                "lag": {"records": 0, "bytes": 0, "seconds": 0.0},
                "dirty": {"regions": 0, "bytes": 0},
                "resync": None,
                "why": None,
                "next_action": None,
            }
        ],
        "snapshots": [],
        "limits": {"connections_max": 64},
    }


class FakeNode:
    """Answers at once; ``wait`` is true when ``in_sync`` is set."""

    def __init__(self, events_max: int = 100) -> None:
        self.events = EventLog(StillClock(), events_max)
        self.calls: list[tuple[Any, ...]] = []
        self.state = primary_status()
        self.in_sync = asyncio.Event()
        self.waiting = threading.Event()
        self.cancelled = threading.Event()
        self.resync_gate: asyncio.Event | None = None

    def status(self) -> Json:
        return self.state

    async def wait(
        self, until: str, remote: str | None, timeout: float | None, seq: int | None = None
    ) -> Json:
        self.calls.append(("wait", until, remote, timeout))
        self.waiting.set()
        try:
            async with asyncio.timeout(timeout):
                await self.in_sync.wait()
        except TimeoutError:
            raise TimedOut(f"not {until}") from None
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return {"until": until, "remotes": ["beta"]}

    async def resync(self, remote: str, full: bool) -> Json:
        self.calls.append(("resync", remote, full))
        if self.resync_gate is not None:
            await self.resync_gate.wait()
        self.calls.append(("resync done", remote, full))
        return {"remote": remote, "kind": "full" if full else "dcm"}

    async def verify(self, remote: str, repair: bool) -> Json:
        self.calls.append(("verify", remote, repair))
        return {"remote": remote}

    async def pause(self, remote: str) -> Json | None:
        if remote != "beta":
            raise NbdmirrorError(f"there is no remote {remote}", hint="remotes: beta")
        self.calls.append(("pause", remote))
        return None

    async def resume(self, remote: str) -> Json | None:
        self.calls.append(("resume", remote))
        return {"state": "behind"}

    @property
    def people(self) -> FakePeople:
        """What people do with snapshots: each call is noted."""
        return FakePeople(self.calls)

    def remote_list(self) -> list[Json]:
        remotes: list[Json] = self.state["remotes"]
        return remotes

    async def log_replace(self, path: str) -> Json:
        self.calls.append(("log_replace", path))
        return {"log": path}

    def facet_list(self) -> list[Json]:
        return [
            {"volume": volume["name"], **facet}
            for volume in self.state["volumes"]
            for facet in volume["facets"]
        ]

    async def facet(self, action: str, path: str, other: str | None = None) -> list[Json]:
        self.calls.append((f"facet_{action}", path, other))
        return self.facet_list()

    async def remote_add(
        self, name: str, address: str, mode: str, on_link_loss: str
    ) -> Json | None:
        self.calls.append(("remote_add", name, address, mode))
        return None

    async def apply(self, frozen: bool, now: bool = False) -> Json | None:
        self.calls.append(("apply", frozen, now) if now else ("apply", frozen))
        return None

    async def remote_remove(self, name: str) -> Json | None:
        if name == "bug":
            raise ZeroDivisionError("a defect")
        raise Refused(f"{name} is not in sync", hint="use --force")


ACCEPT_TURNS = 8
"""Of the loop, within which a connection that it has just accepted is the server's."""


@contextmanager
def serving(node: FakeNode, path: Path, limits: Limits | None = None) -> Iterator[Any]:
    """Serves a node at a unix socket from another thread; yields the loop."""
    started: list[Any] = []
    ready = threading.Event()

    async def serve() -> None:
        server = ControlServer(node, limits or Limits(), lambda transport: 1000)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)
        listener = await loop.create_unix_server(server.connection, str(path))
        started.extend((loop, stop))
        ready.set()
        await stop.wait()
        for _ in range(ACCEPT_TURNS):  # asyncio cannot give back what meets a closed listener
            await asyncio.sleep(0)
        listener.close()
        await server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    loop, stop = started
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()
