"""Mutants of sessions: what ends them, and what is said of that (I8, X4)."""

from __future__ import annotations

import asyncio

from nbdmirror.codec.repl import Frame, Type
from nbdmirror.engine import group
from nbdmirror.engine.primary import Primary
from nbdmirror.engine.receiver import Receiver
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.resync import Resync
from nbdmirror.engine.session import Session
from nbdmirror.errors import FormatError, PeerError
from tests.sim.mutation import Assign, mutant
from tests.sim.plays.sessions import (
    GARBLED,
    LARGE_BATCH,
    OVERFLOWED_AS_IT_ENDS,
    PINGED,
    SMALL_LOG,
)


@mutant("I8 a batch is appended in one piece, however large", run=LARGE_BATCH)
def _(assign: Assign) -> None:
    assign(group, "APPEND_BYTES_MAX", 1 << 30)


@mutant("X4 signs of life are frames of the handshake", run=PINGED)
def _(assign: Assign) -> None:
    original = Session._on_frame

    def on_frame(self: Session, frame: Frame) -> None:
        if frame.type is Type.PING and not self._streaming:
            if self._inbox.qsize() > 4:
                raise PeerError("too many frames during the handshake")
            self._inbox.put_nowait(frame)
            return
        original(self, frame)

    assign(Session, "_on_frame", on_frame)


@mutant("X4 a garbled frame is taken for a rotten record", run=GARBLED)
def _(assign: Assign) -> None:
    original = Primary._disconnected

    def disconnected(self: Primary, remote: Remote, cause: BaseException) -> None:
        other = FormatError(str(cause)) if isinstance(cause, PeerError) else cause
        original(self, remote, other)

    def connected(self: Primary, remote: Remote) -> None:
        stall = remote.stall
        kept(self, remote)
        remote.stall = stall

    kept = Primary._connected
    assign(Primary, "_disconnected", disconnected)
    assign(Primary, "_connected", connected)


@mutant("X4 a record that does not fit ends the session without a word", run=SMALL_LOG)
def _(assign: Assign) -> None:
    original = Receiver._refuse

    def refuse(self: Receiver, rule: str, why: str) -> None:
        if "log.size" in why:
            raise PeerError(why)
        original(self, rule, why)

    assign(Receiver, "_refuse", refuse)


@mutant("O12 a resync ends though its session was told to", run=OVERFLOWED_AS_IT_ENDS)
def _(assign: Assign) -> None:
    original = Resync._finish

    async def finish(self: Resync) -> None:
        drop, self.remote.drop = self.remote.drop, asyncio.Event()
        try:
            await original(self)
        finally:
            self.remote.drop = drop

    assign(Resync, "_finish", finish)
