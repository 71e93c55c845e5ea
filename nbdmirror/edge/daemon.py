"""``nbdmirror serve``: one node in the foreground, from its configuration to its clean stop.

SIGTERM and SIGINT stop it cleanly; SIGHUP reads certificates and secrets again, and the
configuration, and says what would need a restart. A disk that failed for good ends it with exit
code 1 (O16), as everything else that it can put a name to and that starting again does not mend;
its own mistakes with ``env.EXIT_MISTAKE``.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
from collections.abc import Callable
from typing import Any

from nbdmirror.config import Config
from nbdmirror.configfile import load
from nbdmirror.edge import env as world
from nbdmirror.edge import signals
from nbdmirror.edge.lock import exclusive
from nbdmirror.edge.net import LinuxNetwork
from nbdmirror.edge.notify import keep_alive, notify
from nbdmirror.edge.security import (
    Descriptors,
    Security,
    give_to_group,
    raise_descriptors,
)
from nbdmirror.edge.sockets import Sockets
from nbdmirror.engine.agreement import objection
from nbdmirror.engine.node import Node
from nbdmirror.errors import ConfigError, NbdmirrorError

COLLECT_SECONDS = 1.0
"""So long after a link has ended nothing of it is needed any more."""


def serve(config_path: str) -> int:
    """Runs the node of this configuration until it is told to stop; returns the exit code. Says
    what it ends with itself: the journal may be one that nobody reads."""
    world.hold_standard_streams()
    try:
        sockets = Sockets.of(os.environ)
        return _serve_config(sockets.extended(load(config_path)), sockets)
    except Exception as error:
        return world.say_why(error)


def _serve_config(config: Config, sockets: Sockets) -> int:
    if config.nbd.frontend == "nbdkit" and config.nbd.listen:
        from nbdmirror.edge.nbdkit import supervise

        return supervise(config, sockets)
    with exclusive(config.state_dir):
        world.run(_serve(config, sockets))
    return 0


async def _serve(config: Config, sockets: Sockets) -> None:
    """The native front end: the node, and the signals of this process."""
    daemon = Daemon(config, sockets)
    with signals.handled(daemon.stop.set, daemon.reload):
        await daemon.start()
        daemon.ready()
        await daemon.ending()
        await daemon.finish()


class Daemon:
    """A node and what surrounds it: journal, service manager, reload. Both front ends run one:
    ``start``, ``ready``, ``ending``, ``finish``, on one loop; ``stop`` is set to end it."""

    def __init__(
        self, config: Config, sockets: Sockets, *, tell: Callable[[str], None] = notify
    ) -> None:
        """``config``: ``extended`` by ``sockets``. ``tell`` takes what the service manager should
        know, as sd_notify has it."""
        self.config = config
        self.stop = asyncio.Event()
        self._sockets = sockets
        network = LinuxNetwork(sockets)
        self._security = Security(config, network)
        self.node = Node(
            self._security.env(world.real_env(network)),
            config,
            peer_uid=world.peer_uid,
            owners=(0, os.geteuid()),
        )
        self.node.events.listen(_journal)
        self.node.events.listen(_collect)
        self._security.admit(self.node.doors.room, self.node.doors.refusals.tell)
        self._tell = tell
        self._alive: asyncio.Task[None] | None = None
        self._ready = self._reload_wanted = False

    async def start(self, *, nbd: bool = True) -> None:
        """Recovers and serves; ``nbd`` as in ``Node.start``, whose errors pass through.

        From then on until the loop ends the service manager's watchdog is told that it turns."""
        raise_descriptors()
        await self.node.start(nbd=nbd)
        try:
            give_to_group(self.config.admin)
            reserved = self.config.limits.descriptors_reserved
            self.node.doors.set_descriptors(Descriptors(reserved).count, reserved)
        except ConfigError:
            await self.node.stop()
            raise
        world.settle_garbage()
        self._alive = asyncio.ensure_future(keep_alive(self._tell))

    def ready(self) -> None:
        """Tells the service manager that clients are served."""
        self._tell("READY=1\nSTATUS=serving as " + self.node.role)
        self._ready = True
        if self._reload_wanted:
            self.reload()

    async def ending(self) -> None:
        """Returns when the node must end: told to stop, or failed for good."""
        assert self.node.failed is not None
        stopped = asyncio.ensure_future(self.stop.wait())
        ends: list[asyncio.Future[Any]] = [stopped, self.node.failed]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        self._tell("STOPPING=1")
        stopped.cancel()

    async def finish(self) -> None:
        """Stops the node cleanly; raises what it failed with, before or meanwhile, if it did."""
        await self.node.stop()
        failed = self.node.failed
        if failed is not None and failed.done():
            raise failed.result()

    def reload(self) -> None:
        """Certificates, keys and secrets are read again, for connections from then on. What else
        can change at run time is changed by commands; the file is checked and compared, and the
        event says what a restart would take over or refuse. Before clients are served it waits for
        that: the end of a reload tells the service manager that they are."""
        if not self._ready:
            self._reload_wanted = True
            return
        config, events = self.config, self.node.events
        self._tell("RELOADING=1")
        try:
            fresh = self._sockets.extended(load(config.path))
            self._security.reload(fresh)
        except (NbdmirrorError, OSError) as error:
            why = error.message if isinstance(error, NbdmirrorError) else str(error)
            events.emit("reload-failed", why=why)
        else:
            changed = [
                name for name in Config.__slots__ if getattr(fresh, name) != getattr(config, name)
            ]
            refused = objection(self.node.env.disk, self.node.store.state, fresh)
            told = {} if refused is None else {"refused": refused}
            events.emit("reloaded", needs_restart=changed, **told)
        self._tell("READY=1")


def _journal(event: dict[str, Any]) -> None:
    fields = {k: v for k, v in event.items() if k not in ("cursor", "time", "kind")}
    world.say(f"{event['kind']} {json.dumps(fields)}" if fields else event["kind"])


def _collect(event: dict[str, Any]) -> None:
    """The session of a link that has ended is in cycles, with the last frames (I6)."""
    if event["kind"] == "disconnected":
        asyncio.get_running_loop().call_later(COLLECT_SECONDS, gc.collect)
