"""``nbdmirror serve``: one node in the foreground, from its configuration to its clean stop.

SIGTERM and SIGINT stop it cleanly; SIGHUP reads the configuration again and says what would need
a restart. A disk that failed for good ends it with exit code 1 (O16).
"""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

from nbdmirror.config import Config
from nbdmirror.configfile import load
from nbdmirror.edge import env as world
from nbdmirror.edge.notify import notify
from nbdmirror.engine.node import Node
from nbdmirror.errors import ConfigError, NbdmirrorError


def serve(config_path: str) -> int:
    """Runs the node of this configuration until it is told to stop; returns the exit code."""
    config = load(config_path)
    if config.nbd.frontend == "nbdkit":
        from nbdmirror.edge.nbdkit import supervise

        return supervise(config)
    return world.run(run_node(config))


async def run_node(config: Config, *, nbd: bool = True) -> int:
    """Starts, serves and stops a node on the running loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    node = Node(world.real_env(), config, peer_uid=world.peer_uid)
    node.events.listen(_journal)
    loop.add_signal_handler(signal.SIGHUP, _reload, node, config)
    await node.start(nbd=nbd)
    world.settle_garbage()
    notify("READY=1\nSTATUS=serving as " + node.role)
    assert node.failed is not None
    stopped = asyncio.ensure_future(stop.wait())
    ends: list[asyncio.Future[Any]] = [stopped, node.failed]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    notify("STOPPING=1")
    error = node.failed.result() if node.failed.done() else None
    stopped.cancel()
    await node.stop()
    if error is not None:
        raise error
    return 0


def _journal(event: dict[str, Any]) -> None:
    fields = {k: v for k, v in event.items() if k not in ("cursor", "time", "kind")}
    world.say(f"{event['kind']} {json.dumps(fields)}" if fields else event["kind"])


def _reload(node: Node, config: Config) -> None:
    """What can change at run time is changed by commands; the file is checked and compared."""
    notify("RELOADING=1")
    try:
        fresh = load(config.path)
    except (ConfigError, NbdmirrorError) as error:
        node.events.emit("reload-failed", why=error.message)
    else:
        changed = [
            name for name in Config.__slots__ if getattr(fresh, name) != getattr(config, name)
        ]
        node.events.emit("reloaded", needs_restart=changed)
    notify("READY=1")
