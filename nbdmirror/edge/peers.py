"""Connections between nodes, proved before the engine sees them: ``ports.Peers`` over TLS.

Two ways, as ``[replication]`` says. Certificates: TLS with both sides' certificates of one CA; a
node's has the URI ``nbdmirror://GROUP/NODE`` as a subject alternative name, so it is bound to its
group and its name and never to an address (F6), and its key may be pinned. A shared secret:
anonymous TLS, then ``codec.peerauth`` with that channel's binding. Either ends with the listening
node's yes or no, so that both sides know why.

Accepts by itself: a connection costs a socket and a small task until it has proved itself, for
``handshake_seconds`` at most, and the oldest stranger goes first.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

from nbdmirror.codec import peerauth
from nbdmirror.codec.admin import LineFramer
from nbdmirror.codec.peerauth import Connecting, Listening, Names
from nbdmirror.config import Config, Limits, ReplicationConfig
from nbdmirror.edge import tls
from nbdmirror.edge.net import LinuxNetwork
from nbdmirror.edge.secrets import read_secret
from nbdmirror.engine.admission import Gate, Guest, Room, counted_as
from nbdmirror.errors import FormatError, PeerError, Refused
from nbdmirror.ports import Listener

SCHEME = "nbdmirror"
_PAUSE_SECONDS = 0.1
_OTHER_KIND = "if it stays so, the peer may use another kind of proof, or none"
_SILENT = "the peer does not take our certificate or our words; its events say why"
_BUFFER_BYTES = 4096

Report = Callable[..., object]
Welcome = Callable[[socket.socket, Callable[[], None]], Coroutine[Any, Any, None]]


def node_uri(group: str, node: str) -> str:
    """How a certificate names a node."""
    return f"{SCHEME}://{group}/{node}"


@dataclass(frozen=True, slots=True)
class _Proofs:
    """What this node proves itself with, read from the files once."""

    connecting: ssl.SSLContext
    listening: ssl.SSLContext
    secret: bytes | None
    pins: tuple[str, ...]
    expires: float | None


def _load(config: ReplicationConfig) -> _Proofs:
    if config.tls is not None:
        make = tls.certificate_context
        contexts = make(config.tls, server=False), make(config.tls, server=True)
        return _Proofs(*contexts, None, config.tls.pins, tls.expiry(config.tls))
    assert config.secret_file is not None
    secret = read_secret(config.secret_file)
    contexts = tls.anonymous_context(server=False), tls.anonymous_context(server=True)
    return _Proofs(*contexts, secret, (), None)


class SecurePeers:
    """``ports.Peers`` of a node whose ``[replication]`` has ``tls`` or ``secret_file``."""

    def __init__(self, config: Config, network: LinuxNetwork) -> None:
        """ConfigError if a file cannot be used."""
        self.report: Report = lambda listener, address, why: None
        """Is told of everybody who was refused."""
        self.room = Room()
        """Strangers take their places from it."""
        self._group, self._node = config.group, config.node
        self._limits: Limits = config.limits
        self._network = network
        self._proofs = _load(config.replication)

    def prepare(self, config: ReplicationConfig) -> Callable[[], None]:
        """Reads the files again (ConfigError); the call of the result puts them to use."""
        proofs = _load(config)

        def apply() -> None:
            self._proofs = proofs

        return apply

    def expires_at(self) -> float | None:
        """See ``ports.Peers``."""
        return self._proofs.expires

    # -- connecting --------------------------------------------------------------------------

    async def connect(
        self, address: str, node: str, protocol: Callable[[], asyncio.BufferedProtocol]
    ) -> asyncio.Transport:
        """See ``ports.Peers``."""
        proofs = self._proofs
        door = _Door()
        try:
            async with asyncio.timeout(self._limits.handshake_seconds):
                transport = await self._network.connect(address, lambda: door, proofs.connecting)
                try:
                    await self._prove(proofs, node, door, transport)
                    return door.hand_over(protocol())
                except ConnectionError as error:  # it saw our proof, and went without a word
                    transport.abort()
                    raise PeerError(f"hung up: {_SILENT} ({error})") from error
                except BaseException:
                    transport.abort()
                    raise
        except PeerError as error:
            raise Refused(f"tls: {error.message}") from error
        except ssl.SSLError as error:
            raise Refused(f"tls: {tls.word(error)}") from error
        except ConnectionResetError as error:  # where nobody listens, it is another error
            raise PeerError(f"tls: hung up in the handshake: {_OTHER_KIND}") from error

    async def _prove(
        self, proofs: _Proofs, node: str, door: _Door, transport: asyncio.Transport
    ) -> None:
        if proofs.secret is None:
            identity = tls.Identity(transport)
            if node_uri(self._group, node) not in identity.uris:
                shown = ", ".join((*identity.uris, *identity.names))[:200] or "nobody"
                raise PeerError(f"wrong name: the certificate there is for {shown}, not for {node}")
            if not identity.pinned(proofs.pins):
                raise PeerError("wrong key: the peer's is not pinned here")
        else:
            names = Names(self._group, self._node, node)
            binding = tls.channel_binding(transport)
            nonce = secrets.token_bytes(peerauth.NONCE_BYTES)
            side = Connecting(proofs.secret, names, nonce, binding)
            transport.write(side.hello())
            try:
                transport.write(side.answer(await door.line()))
            except PeerError as error:
                await door.refuse(error.message)
                raise
        peerauth.accepted(await door.line())

    # -- listening ---------------------------------------------------------------------------

    async def listen(
        self, address: str, protocol: Callable[[str | None], asyncio.BufferedProtocol]
    ) -> Listener:
        """See ``ports.Peers``."""
        sock, name = await self._network.listening(address)
        gate = Gate.of(self.room, self._limits.strangers_max, self._limits)

        async def welcome(peer: socket.socket, leave: Callable[[], None]) -> None:
            def known(name: str) -> asyncio.BufferedProtocol:
                leave()  # its place is there for the one that the engine gives it
                return protocol(name)

            await self._welcome(peer, known)

        return _Acceptor(sock, name, welcome, gate)

    async def _welcome(
        self, peer: socket.socket, protocol: Callable[[str], asyncio.BufferedProtocol]
    ) -> None:
        """One accepted connection, from its first byte to the engine, or to its end."""
        door, proofs = _Door(), self._proofs
        address = _shown(peer)
        transport: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(self._limits.handshake_seconds):
                made, _ = await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: door,
                    peer,
                    ssl=proofs.listening,
                    ssl_handshake_timeout=self._limits.handshake_seconds,
                    ssl_shutdown_timeout=tls.SHUTDOWN_SECONDS,
                )
                transport = made
                name = await self._recognise(proofs, door, transport)
            door.hand_over(protocol(name), before=peerauth.OK)
            return
        except PeerError as error:
            why = error.message
            if transport is not None:
                await door.refuse(why)
        except OSError as error:  # ssl.SSLError is one
            why = tls.word(error)
            if transport is not None:
                transport.abort()
        except BaseException:
            if transport is not None:
                transport.abort()
            raise
        self.report("replication", address, why)

    async def _recognise(self, proofs: _Proofs, door: _Door, transport: asyncio.Transport) -> str:
        """The peer's name, once it is proved; PeerError why it is not taken."""
        if proofs.secret is None:
            identity = tls.Identity(transport)
            prefix = node_uri(self._group, "")
            nodes = [uri.removeprefix(prefix) for uri in identity.uris if uri.startswith(prefix)]
            if not nodes:
                raise PeerError(f"wrong name: the certificate is for no node of {self._group}")
            if not identity.pinned(proofs.pins):
                raise PeerError("wrong key: yours is not pinned here")
            return nodes[0]
        nonce = secrets.token_bytes(peerauth.NONCE_BYTES)
        binding = tls.channel_binding(transport)
        side = Listening(proofs.secret, self._group, self._node, nonce, binding)
        transport.write(side.answer(await door.line()))
        side.answer(await door.line())  # its yes is sent as the connection is handed over
        assert side.peer is not None
        return side.peer


class _Door(asyncio.BufferedProtocol):
    """The protocol of a connection until it has proved itself: lines, then another protocol."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(_BUFFER_BYTES)
        self._framer = LineFramer(peerauth.LINE_BYTES_MAX)
        self._lines: list[bytes] = []
        self._arrived = asyncio.Event()
        self._gone = asyncio.Event()
        self._lost: BaseException | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._lines += self._framer.feed(memoryview(self._buffer)[:nbytes])
        except FormatError as error:
            self._fail(PeerError(error.message))
        if len(self._lines) > 1:  # nobody has more to say before it is answered
            self._fail(PeerError("the peer speaks out of turn"))
        self._arrived.set()

    def eof_received(self) -> bool:
        self._fail(ConnectionResetError("the peer hung up"))
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        self._gone.set()
        self._fail(exc or ConnectionResetError("the peer hung up"))

    def _fail(self, error: BaseException) -> None:
        self._lost = self._lost or error
        self._arrived.set()

    async def refuse(self, why: str) -> None:
        """Says so, and closes; returns when the connection is gone. The peer has as long to take
        leave as TLS allows; who is cancelled meanwhile closes at once."""
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(peerauth.refusal(why))
            self._transport.close()
        try:
            await self._gone.wait()
        finally:
            self._transport.abort()

    async def line(self) -> bytes:
        """The next line; what ended the connection if there is none."""
        while not self._lines:
            if self._lost is not None:
                raise self._lost
            self._arrived.clear()
            await self._arrived.wait()
        return self._lines.pop()

    def hand_over(
        self, protocol: asyncio.BufferedProtocol, *, before: bytes = b""
    ) -> asyncio.Transport:
        """From here on the connection is the protocol's; ``before`` is sent first. In the step in
        which the peer was recognised, so that no byte of its stream can have come here."""
        transport = self._transport
        assert transport is not None
        if self._lines or self._lost is not None:
            transport.abort()
            raise PeerError("the peer speaks out of turn")
        if before:
            transport.write(before)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        return transport


class _Acceptor:
    """A listening socket, and the strangers that it let in."""

    def __init__(self, sock: socket.socket, name: Listener, welcome: Welcome, gate: Gate) -> None:
        """``welcome`` is given a connection, and what it calls once that is no stranger's."""
        self.address = name.address
        self._socket = sock
        self._name = name
        self._welcome = welcome
        self._gate = gate
        self._tasks: dict[socket.socket, asyncio.Task[None]] = {}
        self._task = asyncio.ensure_future(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, _ = await loop.sock_accept(self._socket)
                where = _counted(peer)
            except OSError:  # no descriptors left, or a peer that has gone: not for long
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            guest = self._gate.enter(where, functools.partial(self._end, peer))
            if guest is None:
                peer.close()
                continue
            task = self._tasks[peer] = asyncio.ensure_future(self._welcome(peer, guest.leave))
            task.add_done_callback(functools.partial(self._done, peer, guest))

    def _end(self, peer: socket.socket) -> None:
        self._tasks[peer].cancel()

    def _done(self, peer: socket.socket, guest: Guest, task: asyncio.Task[None]) -> None:
        del self._tasks[peer]
        guest.leave()
        if task.cancelled():
            peer.close()

    def close(self) -> None:
        """Stops accepting; strangers go, connections that were handed over stay."""
        self._task.cancel()
        for task in self._tasks.values():
            task.cancel()
        self._name.close()


def _counted(peer: socket.socket) -> str:
    if peer.family == socket.AF_UNIX:
        return ""
    return counted_as(str(peer.getpeername()[0]))


def _shown(peer: socket.socket) -> str:
    try:
        name = peer.getpeername()
    except OSError:
        return "?"
    return str(name[0]) if isinstance(name, tuple) else "unix"
