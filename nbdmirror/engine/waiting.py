"""``wait --until``: what the conditions mean, and waiting for them without polling.

in-sync      every change that was there when the wait began is in the remote's facets, and the
             remote is synchronised; writes that come later do not prolong the wait
connected    the link is up
verified     no verify is wanted or running
consistent   the remote may be trusted as an image of the group (X2)
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nbdmirror.errors import Refused, TimedOut

if TYPE_CHECKING:
    from nbdmirror.engine.node import Node
    from nbdmirror.engine.remote import Remote
    from nbdmirror.engine.secondary import Secondary

SECONDARY_POLL_SECONDS = 0.2
ELSEWHERE = "run this on the primary, or without --remote: then it is about this node"


async def wait_until(
    node: Node, until: str, remote: str | None, timeout: float | None, seq: int | None
) -> None:
    """Returns when the condition holds for the remote (``None``: for all that stay); TimedOut if
    not, Refused if the one that was asked for is removed meanwhile.

    ``seq``: the last change that has to be there (``None``: the last there is now), so that who
    waits in several steps does not wait for what was written between them."""
    try:
        async with asyncio.timeout(timeout):
            if node.secondary is not None:
                if remote is not None:
                    name = node.config.node
                    raise Refused(f"{name} is a secondary: it has no remotes", hint=ELSEWHERE)
                await _secondary(node.secondary, until)
                return
            primary = node.primary
            assert primary is not None
            remotes = [primary.remote(remote)] if remote else list(primary.remotes)
            seq = node.log.next_seq - 1 if seq is None else seq
            for one in remotes:
                while one in primary.remotes and not _holds(one, until, seq):
                    await one.changed.wait()
                if remote is not None and one not in primary.remotes:
                    raise Refused(f"remote {remote} was removed before it was {until}")
    except TimeoutError:
        raise TimedOut(f"not {until} after {timeout:g} s", hint="see: nbdmirror status") from None


def _holds(remote: Remote, until: str, seq: int) -> bool:
    if until == "connected":
        return remote.link == "connected"
    if until == "verified":
        return remote.facts.get("verify") is None
    if until == "consistent":
        return bool(remote.facts["consistent"])
    return (
        remote.state == "synchronised"
        and not remote.put_off
        and remote.dirty_regions == 0
        and bool(remote.facts["consistent"])
        and remote.applied_seq >= seq
    )


async def _secondary(secondary: Secondary, until: str) -> None:
    """On a secondary the conditions are its own."""
    while True:
        status = secondary.status()
        connected = status["link"] == "connected"
        settled = status["consistent"] and status["applied_seq"] >= status["received_seq"]
        # It has nobody to verify.
        own = {"connected": connected, "consistent": status["consistent"], "verified": True}
        if own.get(until, connected and settled):
            return
        await asyncio.sleep(SECONDARY_POLL_SECONDS)
