"""The primary's role: the group that clients write to, and its remotes.

Keeps one connection to each remote, tries again with backoff and jitter when it is lost, and
carries out what people ask of remotes. The data path is ``group``, a connection is ``session``.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from nbdmirror.codec.mark import Mark
from nbdmirror.config import Config
from nbdmirror.core.remotestate import Stall
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.export import ExportServer
from nbdmirror.engine.gate import SyncGate
from nbdmirror.engine.governor import Governor
from nbdmirror.engine.group import Group
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.leftout import deletion
from nbdmirror.engine.remote import NEW_FACTS, Remote
from nbdmirror.engine.session import Context, Session
from nbdmirror.engine.store import Store
from nbdmirror.engine.verify import request
from nbdmirror.errors import DiskFailed, FormatError, NbdmirrorError, PeerError, Refused, UsageError
from nbdmirror.ports import Env

REFUSED_PAUSE_SECONDS = 10.0
"""A handshake that was turned down is tried again so often: somebody may have mended it."""
FIRST_PAUSE_SECONDS = 0.1
SETTLED_SECONDS = 10.0
"""A session that lasted less does not shorten the next pause: no storm on a flapping link, nor of
resyncs that a full log ends at once."""


class Primary:
    """The remotes of a group and the tasks that serve them."""

    def __init__(
        self,
        env: Env,
        config: Config,
        group: Group,
        store: Store,
        events: EventLog,
        housekeeper: Housekeeper,
    ) -> None:
        self._env = env
        self._config = config
        self.group = group
        group.on_mark = self._marked
        self._store = store
        self._events = events
        self._housekeeper = housekeeper
        self.remotes: list[Remote] = []
        housekeeper.remotes = self.remotes
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended = False
        self.roster = asyncio.Lock()
        """Held while remotes come and go, and by who needs the same ones from its first to its last
        step (``engine.bypass``)."""
        self.moving = asyncio.Lock()
        """Held while all sessions are ended and begun anew, and while remotes come and go. Taken
        after ``roster``."""
        self._exports: ExportServer | None = None
        self.governor = Governor(env.clock, self._activity)
        self._context = Context(
            env,
            store,
            events,
            config.replication,
            config.group,
            config.node,
            self.governor,
            config.log.on_full,
            config.limits,
        )
        for name, facts in self._merged_facts().items():
            self._make(name, facts)

    @property
    def on_full(self) -> str:
        """The policy when the log is full (M7)."""
        return self._config.log.on_full

    def _marked(self, seq: int, mark: Mark) -> None:
        """A mark was logged: any remote may have to be told of it by the next START."""
        state, gone = self._context.store.state, deletion(mark)
        # Where a log was lost, an earlier epoch may have had the same numbers.
        entries = (e for e in state.get("snapshots", []) if e["uuid"] == gone)
        taken = max((e["seq"] or 0 for e in entries if e["epoch"] == state["epoch"]), default=0)
        for remote in self.remotes:
            remote.miss(seq, mark, taken)

    def serve_beside(self, exports: ExportServer) -> None:
        """What clients ask of the exports is what resyncs yield to."""
        self._exports = exports
        exports.governor = self.governor

    def _activity(self) -> int:
        """Grows with what clients ask for."""
        batches = self._exports.batches if self._exports is not None else 0
        return self.group.bytes_written + batches

    # -- making remotes ----------------------------------------------------------------------

    def _merged_facts(self) -> dict[str, dict[str, Any]]:
        """The remotes of the configuration and those added by command, with what is known. One that
        was removed by command is what commands made of it since, until the configuration names it
        at another address: then somebody has gone over that."""
        state = self._store.state
        known: dict[str, dict[str, Any]] = state["remotes"]
        there = {(remote.name, remote.address) for remote in self._config.remotes}
        removed = {n: a for n, a in state.get("removed", {}).items() if (n, a) in there}
        state["removed"] = removed
        wanted = {}
        for remote in self._config.remotes:
            if remote.name in removed:
                added = known.get(remote.name, {}).get("added")
                why = "it was removed" + (", and added by a command" if added else "")
                self._events.emit("remote-left-out", remote=remote.name, why=why)
                continue
            facts = {**NEW_FACTS, "defaults": {}, **known.get(remote.name, {})}
            facts.update(
                address=remote.address,
                mode=remote.mode,
                compression=remote.compression,
                apply_delay=remote.apply_delay,
                on_link_loss=remote.on_link_loss,
                max_rate=remote.max_rate,
                verify_interval=remote.verify_interval,
                verify_rate=remote.verify_rate,
                verify_repair=remote.verify_repair,
                added=False,
            )
            wanted[remote.name] = facts
        for name, facts in known.items():
            if facts.get("added") and name not in wanted:
                wanted[name] = facts
        self._store.state["remotes"] = wanted
        return wanted

    def _make(self, name: str, facts: dict[str, Any]) -> Remote:
        remote = Remote(
            name,
            facts,
            self.group,
            self._store,
            self._events,
            self._env.disk,
            self._config.state_dir,
        )
        remote.open()
        remote.on_moved = self._housekeeper.remote_moved
        if facts["mode"] == "sync":
            self._make_gate(remote)
        self.remotes.append(remote)
        return remote

    def _make_gate(self, remote: Remote) -> None:
        def changed(engaged: bool) -> None:
            if engaged:
                self._events.emit("in-step", remote=remote.name)
            else:
                self._events.emit("out-of-step", remote=remote.name)

        policy = remote.facts.get("on_link_loss", "continue")
        gate = SyncGate(remote.name, policy, self.group.log.bytes_between)
        gate.excuse(bool(remote.facts["paused"]))
        gate.on_change = changed
        remote.gate = gate
        self.group.gates.append(gate)

    def start(self) -> None:
        """Starts connecting."""
        for remote in self.remotes:
            self._begin(remote)

    def _begin(self, remote: Remote) -> None:
        if not self._ended:
            self._tasks[remote.name] = asyncio.ensure_future(self._serve(remote))

    async def stop(self, *, for_good: bool = False) -> None:
        """Ends the connections; ``for_good``: and none begins any more, whoever was about to."""
        self._ended = self._ended or for_good
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    def close(self) -> None:
        """Closes the maps."""
        for remote in self.remotes:
            remote.close()

    # -- connections -------------------------------------------------------------------------

    async def _serve(self, remote: Remote) -> None:
        """Keeps one session to the remote, for ever."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            while remote.facts["paused"] or remote.held:
                remote.kick.clear()
                await remote.kick.wait()
            remote.drop.clear()
            remote.kick.clear()
            began = asyncio.get_running_loop().time()
            remote.link = "connecting"
            try:
                await Session(remote, self._context).run(lambda: self._connected(remote))
                cause: BaseException = ConnectionResetError("ended to begin anew")
            except (NbdmirrorError, OSError, TimeoutError) as error:
                cause = error
                if isinstance(error, DiskFailed):  # of this node: the session promised something
                    self.group.fail(error)
            except Exception as error:
                # A defect costs this remote its session, not the others theirs; it is told.
                cause = error
                self._events.emit("defect", remote=remote.name, why=repr(error))
            was_connected = remote.link == "connected"
            self._disconnected(remote, cause)
            if was_connected and not remote.drop.is_set():
                await self._note_away(remote)
            if was_connected and asyncio.get_running_loop().time() - began > SETTLED_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await self._pause(remote, REFUSED_PAUSE_SECONDS if remote.refused else pause)
            pause = min(pause * 2, self._config.replication.reconnect_max_seconds)

    def _connected(self, remote: Remote) -> None:
        remote.link = "connected"
        remote.refused = remote.failed = remote.unheard = remote.stall = None
        self._events.emit("connected", remote=remote.name)
        remote.notify()

    def _disconnected(self, remote: Remote, cause: BaseException) -> None:
        was, remote.link = remote.link, "disconnected"
        hung_up = isinstance(cause, PeerError | ConnectionResetError) and not remote.drop.is_set()
        remote.unheard = str(cause) if hung_up and was != "connected" else None
        if remote.gate is not None:
            remote.gate.lost(renewing=remote.drop.is_set())
        if isinstance(cause, Refused):
            text = str(cause)
            remote.refused, remote.failed = (
                (None, text) if text.startswith("failed:") else (text, None)
            )
        else:
            if not remote.drop.is_set():  # else this attempt was ended here, and says nothing
                remote.refused = None
            if isinstance(cause, FormatError) and not isinstance(cause, PeerError):
                remote.stall = Stall(str(cause), "bring a local facet back: nbdmirror facet list")
        if was == "connected":
            self._events.emit("disconnected", remote=remote.name, why=str(cause))
        elif isinstance(cause, Refused):
            self._events.emit("refused", remote=remote.name, why=str(cause))
        remote.notify()

    async def _note_away(self, remote: Remote) -> None:
        """Durably, while a volume has no local facet: should power fail, who is there is the truth
        about it, not who may be gone for good (``engine.doubt``)."""
        remote.facts["away"] = True
        if not all(volume.in_service() for volume in self.group.volumes):
            with contextlib.suppress(DiskFailed):  # the node is told
                await self._store.save()

    async def _pause(self, remote: Remote, seconds: float) -> None:
        """Waits before the next attempt, with jitter; a command ends it early."""
        seconds *= 0.5 + self._env.random.random()
        try:
            async with asyncio.timeout(seconds):
                await remote.kick.wait()
        except TimeoutError:
            pass

    # -- commands ----------------------------------------------------------------------------

    def remote(self, name: str) -> Remote:
        """The remote of that name; UsageError lists the names if there is none."""
        for remote in self.remotes:
            if remote.name == name:
                return remote
        names = ", ".join(r.name for r in self.remotes) or "none"
        raise UsageError(f"there is no remote {name!r} (remotes: {names})")

    async def resync(self, name: str, full: bool) -> dict[str, Any]:
        """Begins a resync by a new handshake; of everything, compared by hash, if ``full``."""
        async with self.roster:  # else it may be gone, with its maps, by the time they are filled
            remote = self.remote(name)
            if remote.facts["paused"]:
                raise NbdmirrorError(
                    f"remote {name} is paused", hint=f"nbdmirror resume {name} goes on with it"
                )
            if full:
                self.check_needed(remote)
                remote.drop.set()  # before the log may be released that the session reads
                await remote.fill("asked for by a person")
            remote.kick.set()
            return remote.status(asyncio.get_running_loop().time(), self._env.clock.time_ns())

    def check_needed(self, remote: Remote) -> None:
        """Refused if it is what a volume without a local facet is read from (M11)."""
        rescue = self._housekeeper.rescue
        if rescue is not None and rescue.needed(remote):
            raise Refused(
                f"remote {remote.name} holds the only copy in use of a volume that may be trusted",
                hint="bring a local facet back first, see nbdmirror facet list; or resume another "
                "remote that holds it",
            )

    def check_leaning(self) -> None:
        """Refused if a volume without a local facet is read from any remote, or would be from one
        that is paused: then not all of them may be taken out of the log (M11)."""
        rescue = self._housekeeper.rescue
        if rescue is None:
            return
        for volume in rescue.leaning():
            if rescue.following(volume):
                raise Refused(
                    f"volume {volume.name} has no local facet, and is read from a remote",
                    hint="bring a local facet back first: see nbdmirror facet list",
                )

    async def verify(self, name: str, repair: bool) -> dict[str, Any]:
        """Begins a verify as soon as the remote is consistent, or has one that runs repair."""
        remote = self.remote(name)
        if remote.facts["paused"]:
            raise NbdmirrorError(
                f"remote {name} is paused", hint=f"nbdmirror resume {name} goes on with it"
            )
        if remote.facts.get("verify") is None:
            remote.facts["verify"] = request(repair, self._env.clock.time_ns())
        elif repair:
            remote.facts["verify"]["repair"] = True
        await self._store.save()
        remote.verify_wanted.set()
        return remote.status(asyncio.get_running_loop().time(), self._env.clock.time_ns())

    async def pause(self, name: str) -> None:
        """Ends the connection until ``resume``; changes stay in the log, past it in the DCM.
        Refused if a volume is read from it."""
        remote = self.remote(name)
        self.check_needed(remote)
        remote.facts["paused"] = True
        await self._store.save()
        remote.drop.set()
        if remote.gate is not None:
            remote.gate.excuse(True)
        self._events.emit("paused", remote=name)

    async def resume(self, name: str) -> None:
        """Connects again."""
        remote = self.remote(name)
        remote.facts["paused"] = False
        await self._store.save()
        if remote.gate is not None:
            remote.gate.excuse(False)
        remote.kick.set()
        self._events.emit("resumed", remote=name)

    async def add(self, name: str, address: str, mode: str, on_link_loss: str = "continue") -> None:
        """A new remote, while the volumes are in use (M17): first synchronisation follows."""
        self._store.check_room()
        if name == self._config.node or address == self._config.replication.listen:
            raise UsageError(f"{name} at {address} is this node itself")
        facts: dict[str, Any] = {
            **NEW_FACTS,
            "defaults": {},
            "address": address,
            "mode": mode,
            "on_link_loss": on_link_loss,
            "compression": "off",
            "added": True,
        }
        async with self.roster, self.moving:
            if any(remote.name == name for remote in self.remotes):
                raise UsageError(f"there is a remote {name!r} already")
            for other in self.remotes:
                if other.facts["address"] == address:
                    raise UsageError(f"{address} is the address of remote {other.name} already")
            remote = self._make(name, facts)
            self._store.state["remotes"][name] = facts
            await remote.sync_maps()
            await self._store.save()
            self._begin(remote)
        self._events.emit("remote-added", remote=name, address=address)

    async def remove(self, name: str) -> None:
        """Forgets a remote and its map (M17)."""
        async with self.roster, self.moving:
            remote = self.remote(name)
            self.check_needed(remote)
            task = self._tasks.pop(name)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            remote.gone = True
            await remote.overflow("it is removed")  # what is left of one that has begun
            try:
                self.check_needed(remote)  # a facet may have been lost meanwhile
            except Refused:
                remote.gone = False
                self._begin(remote)
                raise
            self._forget(remote)
            await self._store.save()
            remote.close(unlink=True)
        self._housekeeper.kick()
        self._events.emit("remote-removed", remote=name)

    def _forget(self, remote: Remote) -> None:
        self.remotes.remove(remote)
        if remote.gate is not None:
            self.group.gates.remove(remote.gate)
            remote.gate.excuse(True)
        if remote in self.group.trackers:
            self.group.trackers.remove(remote)
        del self._store.state["remotes"][remote.name]
        if not remote.facts.get("added"):
            # The configuration names it: a start must not bring it back, nor in the place of one
            # that is added under its name.
            self._store.state["removed"][remote.name] = remote.facts["address"]
        remote.notify()

    # -- status ------------------------------------------------------------------------------

    def status(self) -> list[dict[str, Any]]:
        """The ``remotes`` of the status."""
        now, wall = asyncio.get_running_loop().time(), self._env.clock.time_ns()
        return [remote.status(now, wall) for remote in self.remotes]
