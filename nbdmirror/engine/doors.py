"""Where others come in: the listeners of a node, and what they share.

NBD clients, peers that replicate, people at the admin socket, Prometheus: each kind has its gate,
all share the room that the process has descriptors for. Owns the listeners and the connections
from peers; what is said on a connection is its protocol's. ``engine.node`` opens and closes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from nbdmirror.config import Config, parse_address, reachable
from nbdmirror.engine.access import Rules
from nbdmirror.engine.admission import Gate, Guest, Reserve, Room
from nbdmirror.engine.control import ControlServer, NodeApi, PeerUid
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.export import ExportServer
from nbdmirror.engine.link import Link
from nbdmirror.engine.metrics import MetricsServer
from nbdmirror.engine.peers import peers_of
from nbdmirror.engine.primary import Primary
from nbdmirror.engine.receiver import Receiver
from nbdmirror.engine.refusals import Refusals
from nbdmirror.engine.secondary import Secondary
from nbdmirror.engine.snapshotexport import SnapshotExports
from nbdmirror.engine.turnaway import TurnedAway
from nbdmirror.errors import MORE_DESCRIPTORS, Refused, UsageError
from nbdmirror.ports import Env, Listener

P = TypeVar("P", Receiver, TurnedAway)


class Doors:
    """All listeners of one node."""

    def __init__(
        self,
        env: Env,
        config: Config,
        events: EventLog,
        peer_uid: PeerUid,
        owners: Sequence[int] | None,
    ) -> None:
        """``owners``: the users who may change something by the admin socket; None: everybody."""
        self._env = env
        self._config = config
        self._peer_uid = peer_uid
        self._owners = owners
        limits = config.limits
        self.room = Room()
        self._admin_room = Reserve(self.room)
        self.refusals = Refusals(events)
        self._upstreams = Gate.of(self.room, limits.replication_connections_max, limits)
        self.receivers: dict[asyncio.Task[None], Receiver] = {}
        """Connections from the primary, by their task."""
        self._turned: dict[asyncio.Task[None], TurnedAway] = {}
        self._listeners: list[Listener] = []
        self._secondary: Secondary | None = None
        self.exports: ExportServer | None = None
        """From before the first client on: a stop ends what they do also where ``open`` fails."""
        self._control: ControlServer | None = None
        self._metrics: MetricsServer | None = None

    async def open(
        self,
        node: NodeApi,
        primary: Primary | None,
        secondary: Secondary | None,
        snapshots: SnapshotExports,
        *,
        nbd: bool,
    ) -> None:
        """Listens wherever the configuration says; ``nbd``: for NBD clients too."""
        config, network, limits = self._config, self._env.network, self._config.limits
        self._secondary = secondary
        self.exports = exports = ExportServer(
            primary.group if primary else None,
            primary.remotes if primary else [],
            limits,
            snapshots,
            rules={volume.name: Rules(volume.access) for volume in config.volumes},
            room=self.room,
            tls=self._env.nbd_tls,
            refused=self.refusals.tell,
            watch=network.watch,
        )
        if primary is not None:
            primary.serve_beside(exports)
        self._control = ControlServer(
            node,
            limits,
            self._peer_uid,
            room=self._admin_room,
            owners=self._owners,
            refused=self.refusals.tell,
        )
        listeners = self._listeners
        if config.admin.socket:
            address = f"unix:{config.admin.socket}"
            listeners.append(await network.listen(address, self._control.connection))
        if config.admin.metrics is not None:
            self._metrics = MetricsServer(node.status, limits, self.room)
            listeners.append(await network.listen(config.admin.metrics, self._metrics.connection))
        if config.replication.listen is not None:
            take = self._take_primary if secondary is not None else self._turn_away
            listeners.append(await peers_of(self._env).listen(config.replication.listen, take))
        for address in config.nbd.listen if nbd else ():
            secured = self._env.nbd_tls is not None and address.startswith("tcp:")
            protocol = exports.secured if secured else exports.connection
            listeners.append(await network.listen(address, protocol))

    def _take_primary(self, proved: str | None) -> asyncio.BufferedProtocol:
        """A connection from a peer, who has proved this name; None: nothing proves names here."""
        assert self._secondary is not None
        receiver = Receiver(self._secondary, self._config.limits, proved)
        guest = self._enter(receiver.link, proved)
        if guest is not None:
            receiver.on_started = guest.known
            self._attend(receiver, self.receivers, guest)
        return receiver.link

    def _turn_away(self, proved: str | None) -> asyncio.BufferedProtocol:
        """A connection from a peer to a node that is itself a primary."""

        def told(why: str) -> None:
            self.refusals.tell("replication", proved or "?", why)

        turned = TurnedAway(self._config.node, self._config.limits, told)
        guest = self._enter(turned.link, proved)
        if guest is not None:
            self._attend(turned, self._turned, guest)
        return turned.link

    def _enter(self, link: Link, proved: str | None) -> Guest | None:
        """A place for a connection from a peer; None: there is none, and the link is closed."""
        guest = self._upstreams.enter(
            proved or "", lambda: link.close(ConnectionRefusedError("its place was needed"))
        )
        if guest is None:
            link.close(ConnectionRefusedError("too many replication connections"))
        return guest

    @staticmethod
    def _attend(peer: P, peers: dict[asyncio.Task[None], P], guest: Guest) -> None:
        """Listens to a peer until it has left."""

        def left(task: asyncio.Task[None]) -> None:
            peers.pop(task, None)
            guest.leave()

        task = asyncio.ensure_future(peer.run())
        peers[task] = peer
        task.add_done_callback(left)

    def set_descriptors(self, count: Callable[[bool], int | None], reserved: int) -> None:
        """``count``: how many descriptors are free, as ``Room.count``, but with the ``reserved``
        ones; of these people get half, so that no crowd of clients locks them out."""
        people = self._admin_room
        people.part = reserved // 2

        def others(at_once: bool) -> int | None:
            free = count(at_once)
            return None if free is None else free - reserved + people.used

        self.room.count = others
        self.room.recount()

    def check_descriptors(self, files: int) -> None:
        """Refused if so many files more, which stay open, are too many."""
        why = self.room.shortage(files)
        if why is not None:
            raise Refused(why, hint=MORE_DESCRIPTORS)

    def check_link(self, address: str) -> None:
        """UsageError for a remote on another host to which nothing would secure the connection."""
        open_world = self._env.peers is None and not self._config.replication.insecure
        if open_world and reachable(parse_address(address)):
            raise UsageError(
                f"{address} is another host, and the connection would be open",
                hint="set tls, secret_file, or insecure = true in [replication]",
            )

    def close(self) -> None:
        """Nobody comes in any more; who is in stays."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._metrics is not None:
            self._metrics.close()

    async def end_upstreams(self) -> None:
        """Ends the connections from peers, and lets none of them in that comes late: one whose
        handshake is not over, or that was accepted a moment before the listeners were closed."""
        if self._secondary is not None:
            self._secondary.stopping = True
        peers: list[Receiver | TurnedAway] = [*self.receivers.values(), *self._turned.values()]
        for peer in peers:
            peer.link.close(ConnectionResetError("the node stops"))
        await asyncio.gather(*self.receivers, *self._turned, return_exceptions=True)

    async def end_control(self) -> None:
        """Ends the admin connections and what they were at."""
        if self._control is not None:
            await self._control.close()

    def _security(self) -> dict[str, Any]:
        """How each kind of connection is secured, and until when our certificate is good."""
        env, config = self._env, self._config
        link = "secret" if config.replication.secret_file else "tls"
        nbd = "psk" if config.nbd.psk_file else "tls" if env.nbd_tls else "open"
        ends = {
            "replication": env.peers.expires_at() if env.peers else None,
            "nbd": env.nbd_tls.expires_at() if env.nbd_tls else None,
        }
        return {
            "replication": {"mode": link if env.peers else "open", "expires": ends["replication"]},
            "nbd": {"mode": nbd, "expires": ends["nbd"]},
        }

    def status(self) -> dict[str, Any]:
        """``limits``, ``security``, ``connections``."""
        limits = self._config.limits
        assert self.exports is not None and self._control is not None
        budget = self.exports.budget
        room = self.room
        return {
            "limits": {
                **{name: getattr(limits, name) for name in limits.__slots__},
                "descriptors_left": room.left,
            },
            "security": self._security(),
            "connections": {
                "nbd": self.exports.gate.status(),
                "replication": self._upstreams.status(),
                "admin": self._control.gate.status(),
                "refused": dict(sorted(self.refusals.counts.items())),
                "memory": {"used": budget.used, "total": budget.total, "ended": budget.ended},
            },
        }
