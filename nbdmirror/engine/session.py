"""The primary's end of one replication connection: handshake, records, acknowledgements.

A session begins with a handshake whose outcome ``core.identity`` decides, and then only streams:
records in order from the log, and beside them, if regions are marked, a resync. Whatever changes
the terms (an overflow, a command, a lost link) ends the session; the next handshake decides anew.

HELLO     {versions, group, uuid, node, generation, history, epoch, run, forks, volumes, session}
WELCOME   {version, node, initialised, uuid, generation, history, epoch, run, durable_seq,
          consistent, copies: see ``codec.repl``, altered, rejoined, damaged, patient}
REFUSE    {rule, why}
START     {action: "continue"|"reset", seq: first record to come, resync: bool, why, apply_delay,
          eager: clients wait for its acknowledgements, put_off, copies: the last number that it
          acknowledged, marks: see ``engine.leftout``}
READY     {}

While a resync goes over the map of a remote in DCM logging no records are sent. When it goes on in
order a second START, with action "reset", says where they begin; its READY says so durably.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdmirror.codec import fields, repl
from nbdmirror.codec.hashing import KEY_SIZE
from nbdmirror.codec.repl import Frame, Type
from nbdmirror.config import Limits, ReplicationConfig
from nbdmirror.core import convergence
from nbdmirror.core.identity import Action, Decision, Fork, Source, Target, decide
from nbdmirror.core.payoff import Payoff
from nbdmirror.engine.acquaintance import meet, said
from nbdmirror.engine.copier import pay
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.governor import Governor
from nbdmirror.engine.leftout import told
from nbdmirror.engine.link import Link
from nbdmirror.engine.log import Cursor
from nbdmirror.engine.peers import connect
from nbdmirror.engine.remote import Remote, volume_map
from nbdmirror.engine.remoteread import RemoteReads
from nbdmirror.engine.resync import LOG_SHARE, Resync, Terms
from nbdmirror.engine.store import Store
from nbdmirror.engine.verify import Verify, is_due
from nbdmirror.errors import FormatError, PeerError, Refused
from nbdmirror.ports import Buffer, Env

FRAME_BYTES = 1 << 20
"""Records are gathered to frames of about this size while the link is busy."""
FRAME_BYTES_MIN = 64 << 10
"""... and no smaller ones are asked for while regions are copied between them."""
LINGER_SECONDS = 0.005
"""An asynchronous remote's records wait so long for company: it spares the client's CPU."""

BACK_SECONDS = 1.0
"""Whether a comparison that was put off may begin is looked at so often."""
DUE_SECONDS = 30.0
"""Whether a verify is due is looked at so often."""


@dataclass(frozen=True, slots=True)
class Context:
    """What every session of a node shares."""

    env: Env
    store: Store
    events: EventLog
    tuning: ReplicationConfig
    group_name: str
    node_name: str
    governor: Governor
    on_full: str
    limits: Limits


class Session:
    """One connection to one remote, from HELLO to its end."""

    def __init__(self, remote: Remote, context: Context) -> None:
        self.remote = remote
        self.context = context
        self.link = Link(self._on_frame, context.limits)
        self.link.session = context.env.random.getrandbits(63) or 1
        self.link.hash_key = context.env.random.randbytes(KEY_SIZE)
        self._inbox: asyncio.Queue[Frame] = asyncio.Queue()
        self.resync: Resync | None = None
        self._reads = RemoteReads(self.link)
        self.verify: Verify | None = None
        self._streaming = False
        self._shipped_seq = 0
        self._compress = remote.facts.get("compression") == "lz4"
        self._packing_pays = Payoff()
        self._ordered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """The first record that is forwarded, once that is known."""
        self._ready = asyncio.Event()
        self._deletions: list[str] = []
        """Of snapshots, as the last START told of them."""
        self._rotten: FormatError | None = None
        """What a record that cannot be read back has ended the stream with."""

    async def run(self, connected: Callable[[], None]) -> None:
        """Runs until the link is lost or the session dropped; raises the cause.

        Refused says that the handshake was turned down, by us or by the remote."""
        remote, context = self.remote, self.context
        try:
            await connect(context.env, remote, self.link, context.tuning.timeout_seconds)
            async with asyncio.timeout(context.tuning.timeout_seconds):
                target = await self._greet()
                decision = self._decide(target)
                await self._start(decision)
            connected()
            try:
                await self._stream()
            except FormatError as error:
                if error is self._rotten:
                    await self._log_rotten(error)
                raise
        finally:
            self.link.close()
            remote.engaged = remote.starting = remote.put_off = False
            remote.notify()
            if remote.progress is not None:
                remote.progress = remote.stall = None
            for dcm in remote.dcms:
                dcm.map.abandon()

    # -- handshake ---------------------------------------------------------------------------

    async def _receive(self, wanted: Type) -> dict[str, Any]:
        get = asyncio.ensure_future(self._inbox.get())
        lost = asyncio.ensure_future(self.link.closed.wait())
        drop = asyncio.ensure_future(self.remote.drop.wait())
        try:
            await asyncio.wait([get, lost, drop], return_when=asyncio.FIRST_COMPLETED)
            if not get.done():
                raise self.link.cause or ConnectionResetError()
            frame = get.result()
        finally:
            get.cancel()
            lost.cancel()
            drop.cancel()
        if frame.type is Type.REFUSE:
            reason = frame.json()
            raise Refused(fields.brief(f"{reason.get('rule', '')}: {reason.get('why', 'refused')}"))
        if frame.type is not wanted:
            raise PeerError(f"{frame.type.name} came instead of {wanted.name}")
        return frame.json()

    async def _greet(self) -> Target:
        state = self.context.store.state
        self.link.send_json(
            Type.HELLO,
            {
                "versions": list(repl.PROTOCOL_VERSIONS),
                "group": self.context.group_name,
                "uuid": state["uuid"],
                "node": self.context.node_name,
                "remote": self.remote.name,
                "generation": state["generation"],
                "history": state["history"],
                "epoch": state["epoch"],
                "run": state["runs"][-1][1],
                "forks": state["forks"],
                "volumes": volume_map(self.remote.group.volumes),
            },
        )
        welcome = await self._receive(Type.WELCOME)
        low, high = repl.PROTOCOL_VERSIONS
        if not low <= fields.integer(welcome, "version") <= high:
            raise Refused(
                f"T1: {self.remote.name} answers in protocol version {welcome['version']}, "
                f"{self.context.node_name} speaks {low}..{high}"
            )
        node, target = fields.text(welcome, "node"), said(welcome)
        meet(state["remotes"], self.remote.name, node, holds=target.initialised)
        return target

    def _decide(self, target: Target) -> Decision:
        state, facts, log = self.context.store.state, self.remote.facts, self.remote.group.log
        source = Source(
            generation=state["generation"],
            history=tuple((g, s) for g, s in state["history"]),
            epoch=state["epoch"],
            runs=tuple((epoch, run) for epoch, run in state["runs"]),
            ends=tuple((epoch, end) for epoch, end in state["ends"]),
            forks=tuple(Fork(epoch, end) for epoch, end in state["forks"]),
            tail_seq=log.ring.tail_seq,
            next_seq=log.next_seq,
            base_seq=facts["base_seq"],
            tracking=self.remote.tracking,
            met_epoch=facts["met_epoch"],
            consistent=facts["consistent"],
            copies=facts.get("copies", 0),
            needed=self.remote.group.needed(self.remote),
        )
        decision = decide(source, target)
        cause: dict[str, Any] = {"rule": decision.rule, "why": decision.why}
        self.remote.put_off = decision.put_off
        facts["why"] = decision.why if decision.put_off else facts["why"]
        self.context.events.emit(
            "handshake", remote=self.remote.name, action=decision.action.value, **cause
        )
        if decision.action is Action.REFUSE:
            self.link.send_json(Type.REFUSE, cause)
            self.link.close(flush=True)
            raise Refused(f"{decision.rule}: {decision.why}")
        return decision

    async def _start(self, decision: Decision) -> None:
        """Agrees on the first record of the stream, and makes that durable on both sides before
        the first bit is cleared (O12)."""
        remote, log, facts = self.remote, self.remote.group.log, self.remote.facts
        if remote.held:
            raise ConnectionResetError("a volume is being changed beside the log")
        remote.engaged = True
        while remote.marked_seq is not None:  # an overflow is still marking
            await remote.changed.wait()
        if decision.action is Action.FULL:
            await remote.fill(decision.why)
        reset = decision.action is not Action.CONTINUE
        # Where the DCM has everything, the stream begins now: what was decided is older already.
        in_map = decision.action is Action.FULL or (reset and remote.tracking)
        seq = log.next_seq if in_map else decision.seq
        assert log.ring.tail_seq <= seq <= log.next_seq
        ordered = not (in_map and self._passes_first())
        behind_ns = remote.behind_ns
        self._begin_at(seq, keep=ordered, applied=reset)
        resync = remote.dirty_regions > 0
        if resync:
            facts["consistent"] = False
            if reset:
                facts["behind_ns"] = behind_ns
        await remote.sync_maps()
        remote.save_defaults()
        await self._send_start("reset" if reset else "continue", seq, resync, decision.why)
        await self._receive(Type.READY)
        self._told()
        facts.update(initialised=True, away=False, met_epoch=self.context.store.state["epoch"])
        if reset:
            facts["base_seq"] = seq - 1
        if ordered:
            await self._resume(seq)
        else:
            await self.context.store.save()

    def _passes_first(self) -> bool:
        """Whether the resync goes over the map before the log is kept for the remote."""
        remote, capacity = self.remote, self.remote.group.log.capacity
        if self.context.on_full == "block":
            return False
        if remote.gate is not None and remote.gate.policy != "continue":
            return False  # clients wait until the stream begins
        room = int(capacity * LOG_SHARE) - remote.group.log.ring.used
        return not convergence.begin_ordered(remote.dirty_bytes, room, remote.order_failures)

    def _begin_at(self, seq: int, *, keep: bool, applied: bool = True) -> None:
        """The stream begins at ``seq``. From this step on the log is kept for the remote, whatever
        it answers; without ``keep`` what follows is in its map. Not ``applied``: what the remote
        has in its log may not be in its facets yet; its first ACK says."""
        remote = self.remote
        remote.starting = keep
        remote.durable_seq = remote.received_seq = seq - 1
        remote.applied_seq = seq - 1 if applied else min(remote.applied_seq, seq - 1)
        self._shipped_seq = seq - 1

    async def _send_start(self, action: str, seq: int, resync: bool, why: str) -> None:
        """What the remote is told of snapshots is durable first: one whose end is not yet is there
        again after a crash, and nobody would tell the remote that it lacks it."""
        facts, left_out = self.remote.facts, self._left_out(action, seq)
        self.remote.snapshots_told()
        await self.context.store.save()
        self.link.send_json(
            Type.START,
            {
                "action": action,
                "seq": seq,
                "resync": resync or not facts["consistent"],
                "why": why,
                "put_off": self.remote.put_off,
                "copies": facts.get("copies", 0),
                "apply_delay": facts.get("apply_delay", 0.0),
                "eager": facts["mode"] == "sync",
                "marks": left_out,
            },
        )

    def _left_out(self, action: str, seq: int) -> list[dict[str, Any]]:
        state, facts = self.context.store.state, self.remote.facts
        forks = [one for one in state["forks"] if one[0] >= facts.get("met_epoch", 0)]
        if action == "continue":
            return told(state.get("snapshots", []), [], 0, forks)
        self._deletions = [uuid for uuid, _ in facts.get("missed", [])]
        return told(state.get("snapshots", []), self._deletions, seq, forks)

    def _told(self) -> None:
        """The remote has followed what the last START told it of deletions; the caller saves."""
        missed = self.remote.facts.get("missed", [])
        self.remote.facts["missed"] = [one for one in missed if one[0] not in self._deletions]

    async def _resume(self, seq: int) -> None:
        """The remote is READY for the log from ``seq`` on: it is out of DCM logging."""
        remote = self.remote
        if not remote.starting:
            raise ConnectionResetError("the log was full before the stream began")
        remote.resume_log()
        await self.context.store.save()
        if remote.drop.is_set():  # what was marked anew meanwhile the log is not kept for
            raise ConnectionResetError("ended to begin anew")
        remote.starting = False
        self._ordered.set_result(seq)

    async def _order(self) -> None:
        """From now on the log is kept for the remote, and forwarded; what is marked in its map by
        now is still to be copied. As durable on both sides as the first START."""
        seq = self.remote.group.log.next_seq
        self.remote.facts["behind_ns"] = self.remote.behind_ns
        self._begin_at(seq, keep=True)
        await self._send_start("reset", seq, True, "the resync goes on in order")
        await self._ready.wait()
        self._told()
        self.remote.facts["base_seq"] = seq - 1
        await self._resume(seq)

    # -- streaming ---------------------------------------------------------------------------

    async def _stream(self) -> None:
        tuning = self.context.tuning
        self._streaming = True
        while not self._inbox.empty():  # an ACK may come right behind READY
            self._on_frame(self._inbox.get_nowait())
        self.remote.reads = self._reads
        ends = [
            asyncio.ensure_future(self._ship()),
            asyncio.ensure_future(
                self.link.watch(tuning.heartbeat_seconds, tuning.timeout_seconds)
            ),
            asyncio.ensure_future(self.link.closed.wait()),
            asyncio.ensure_future(self.remote.drop.wait()),
        ]
        if not self.remote.facts["consistent"]:
            self.resync = Resync(self.remote, self.link, self._terms())
            ends.append(asyncio.ensure_future(self._resync(self.resync)))
        if self.remote.put_off:
            ends.append(asyncio.ensure_future(self._put_off()))
        ends.append(asyncio.ensure_future(self._verify()))
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if self.link.cause is not None:
                raise self.link.cause
        finally:
            self.remote.reads = None
            self._reads.close()
            if self.remote.gate is not None:
                self.remote.gate.lost(renewing=self.remote.drop.is_set())
            for task in ends:
                task.cancel()
            await asyncio.gather(*ends, return_exceptions=True)

    def _terms(self) -> Terms:
        context = self.context
        return Terms(
            store=context.store,
            events=context.events,
            tuning=context.tuning,
            governor=context.governor,
            compress=self._compress,
            waiting=context.on_full == "block",
            order=None if self._ordered.done() else self._order,
        )

    async def _resync(self, resync: Resync) -> None:
        await resync.run()
        if self.remote.gate is not None:
            self.remote.gate.completed()
        self.context.events.emit("synchronised", remote=self.remote.name)
        self.remote.verify_wanted.set()
        await self.link.closed.wait()

    async def _put_off(self) -> None:
        """Begins anew when there is something to compare the remote with: a facet is back."""
        while self.remote.group.needed(self.remote):
            await asyncio.sleep(BACK_SECONDS)
        self.remote.drop.set()

    async def _verify(self) -> None:
        """Verifies the remote when that is asked for or due, once it is consistent."""
        remote, context = self.remote, self.context
        while True:
            while not is_due(remote, context.env.clock.time_ns()):
                remote.verify_wanted.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DUE_SECONDS):
                        await remote.verify_wanted.wait()
            self.verify = Verify(
                remote,
                self.link,
                context.events,
                context.env.clock,
                context.governor,
                context.store.save,
            )
            await self.verify.run()

    async def _ship(self) -> None:
        """Sends the log from where the stream begins, as it grows."""
        log, link, remote = self.remote.group.log, self.link, self.remote
        linger = LINGER_SECONDS if remote.gate is None else 0.0
        cursor = Cursor(await asyncio.shield(self._ordered))
        if remote.gate is not None:
            remote.gate.opened(cursor.seq, bool(remote.facts["consistent"]))
        while True:
            while cursor.seq >= log.next_seq:
                log.appended.clear()
                await log.appended.wait()
            parts: list[Buffer] = []
            size, limit = 0, self._frame_bytes()
            while size < limit and cursor.seq < log.next_seq:
                try:
                    chunk = await log.read(cursor)
                except FormatError as error:
                    self._rotten = error
                    raise
                parts += chunk.parts
                size += chunk.size
            self._shipped_seq = cursor.seq - 1
            compress = self._compress and self._packing_pays.worth()
            sent = link.send(Type.RECORDS, parts, compress=compress)
            if compress:
                self._packing_pays.result(sent < size)
            remote.bytes_sent += sent
            await link.drain()
            await pay(remote.bucket, sent)
            if linger and size < limit:
                await asyncio.sleep(linger)

    def _frame_bytes(self) -> int:
        """While regions are copied between the records both take turns at the link, and each gets
        half of it, as ``core.convergence`` foretells, only with turns of the same size."""
        if self.remote.facts["consistent"] or self.resync is None:
            return FRAME_BYTES
        return max(FRAME_BYTES_MIN, self.resync.copier.window_size())

    async def _log_rotten(self, error: FormatError) -> None:
        """A pending record cannot be read back: the regions are copied from the facet instead. A
        volume that has no facet has it nowhere else: it stays in the log, and is tried again.

        Nothing of the session runs any more: a resync would clear what is filled here, and what is
        written behind its copy this stream does not bring."""
        self.context.events.emit("log-damaged", remote=self.remote.name, why=error.message)
        if all(volume.in_service() for volume in self.remote.group.volumes):
            await self.remote.fill(error.message)

    def _on_frame(self, frame: Frame) -> None:
        kind = frame.type
        if kind is Type.PING:  # also while what the handshake came to is saved
            return
        if not self._streaming:
            if self._inbox.qsize() > 4:
                raise PeerError("too many frames during the handshake")
            self._inbox.put_nowait(frame)
        elif kind is Type.ACK:
            received, durable, applied = frame.unpack(repl.ACK)
            if not applied <= durable <= received <= self._shipped_seq:
                raise PeerError(
                    f"the remote acknowledges {received}/{durable}/{applied}, sent was up to "
                    f"{self._shipped_seq}"
                )
            self.remote.acknowledge(received, durable, applied)
        elif kind in (Type.WANT, Type.COPIES, Type.DONE, Type.CONSISTENT):
            if self.resync is None:
                raise PeerError(f"{kind.name} outside a resync")
            self.resync.on_frame(frame)
        elif kind is Type.DATA:
            self._reads.on_frame(frame)
        elif kind is Type.VERIFIED:
            if self.verify is None:
                raise PeerError(f"{kind.name} outside a verify")
            self.verify.on_frame(frame)
        elif kind is Type.READY:
            self._ready.set()
        elif kind is Type.REFUSE:
            raise Refused(fields.brief(frame.json().get("why")))
        else:
            raise PeerError(f"unexpected {kind.name}")
