"""What a primary tells of a remote: its object in the status (X4, M10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbdmirror.core.remotestate import Facts, next_action, state_of

if TYPE_CHECKING:
    from nbdmirror.engine.remote import Remote


def remote_state(remote: Remote) -> str:
    """The state in one word (``core.remotestate``)."""
    return state_of(_facts(remote))


def remote_status(remote: Remote, now: float, wall_ns: int) -> dict[str, Any]:
    """The remote's object in the status, schema 1; ``now`` is of the loop."""
    facts = _facts(remote)
    state = state_of(facts)
    log = remote.group.log
    pending = 0 if remote.tracking else log.next_seq - 1 - remote.durable_seq
    oldest = remote.behind_ns
    why = remote.refused or remote.failed or (remote.stall and remote.stall.why)
    if why is None and (state != "synchronised" or remote.put_off):
        why = remote.facts["why"] or remote.unheard
    if why is None and facts.differing:
        why = f"the last verify found {facts.differing} regions that differ"
    return {
        "name": remote.name,
        "address": remote.facts["address"],
        "mode": remote.facts["mode"],
        "in_step": None if remote.gate is None else remote.gate.engaged,
        "link": remote.link,
        "state": state,
        "received_seq": remote.received_seq,
        "durable_seq": remote.durable_seq,
        "applied_seq": remote.applied_seq,
        "queue": {
            "head": None if remote.tracking else remote.durable_seq + 1,
            "tail": None if remote.tracking else log.next_seq - 1,
            "count": pending,
        },
        "lag": {
            "records": pending,
            "bytes": log.bytes_between(remote.durable_seq + 1) if pending else 0,
            "seconds": max(0.0, (wall_ns - oldest) / 1e9) if oldest else 0.0,
        },
        "dirty": {"regions": facts.dirty_regions, "bytes": remote.dirty_bytes},
        "bytes_sent": remote.bytes_sent,
        "resync": None if remote.progress is None else remote.progress.status(now),
        "verify": _verify(remote.facts, wall_ns),
        "why": why,
        "next_action": next_action(facts, remote.name),
    }


def _facts(remote: Remote) -> Facts:
    facts = remote.facts
    return Facts(
        initialised=facts["initialised"],
        paused=facts["paused"],
        tracking=remote.tracking,
        consistent=facts["consistent"],
        full=facts["full"],
        dirty_regions=remote.dirty_regions,
        connected=remote.link == "connected",
        resyncing=remote.progress is not None and remote.progress.kind != "verify",
        refused=remote.refused,
        failed=remote.failed,
        stall=remote.stall,
        shut=remote.gate is not None and remote.gate.shut,
        differing=_unrepaired(facts.get("verified")),
    )


def _unrepaired(verified: Mapping[str, Any] | None) -> int:
    """How many regions a verify found to differ, and did not repair."""
    return max(0, verified["differing"] - verified["repaired"]) if verified else 0


def _verify(facts: Mapping[str, Any], wall_ns: int) -> dict[str, Any] | None:
    """The ``verify`` object of a remote's status; ``None`` if none was ever asked for."""
    last = facts.get("verified")
    if last is None and facts.get("verify") is None:
        return None
    last = last or {}
    finished = last.get("finished_ns")
    return {
        "running": facts.get("verify") is not None,
        "age_s": None if finished is None else max(0.0, round((wall_ns - finished) / 1e9, 1)),
        "differing": last.get("differing"),
        "unsettled": last.get("unsettled"),
        "repaired": last.get("repaired"),
    }
