"""Which primary a secondary lets in: what HELLO says of the group and its volumes is compared with
what is here, and both are named where they differ (T1, V1); and what it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbdmirror.codec import fields, repl
from nbdmirror.engine.rejoin import altered
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import PeerError

Refusal = tuple[str, str]
"""(rule, reason)."""


def misfit(
    hello: dict[str, Any], node: str, group: str, uuid: str | None, volumes: Sequence[Volume]
) -> Refusal | None:
    """Why this HELLO is not for ``node`` of ``group``, which holds the group ``uuid`` (``None``:
    none yet); ``None`` if it is."""
    low, high = repl.PROTOCOL_VERSIONS
    versions = hello.get("versions")
    if not isinstance(versions, list) or [type(v) for v in versions] != [int, int]:
        return "T1", "HELLO names no versions"
    if not (versions[0] <= high and low <= versions[1]):
        theirs = f"{versions[0]}..{versions[1]}"
        return "T1", f"the primary speaks protocol versions {theirs}, {node} {low}..{high}"
    try:
        _check(hello)
    except PeerError as error:
        return "T1", f"HELLO: {error.message}"
    if hello.get("group") != group:
        return "T1", f"the primary serves group {hello.get('group')!r}, {node} belongs to {group!r}"
    if uuid is not None and uuid != hello.get("uuid"):
        return "T1", f"the primary's group has uuid {hello.get('uuid')}, {node} holds {uuid}"
    return _other_volumes(hello.get("volumes"), node, volumes)


def second_name(hello: dict[str, Any], current: dict[str, Any], node: str) -> Refusal | None:
    """Why a HELLO may not replace the connection that began with ``current``: it is the same run of
    the same primary, which has ``node`` under another name too. The names would end each other's
    connections for ever (T1). A remote that was renamed is let in once its former link has ended.
    """
    former, name = current.get("remote"), hello.get("remote")
    if (hello.get("node"), hello.get("run")) != (current.get("node"), current.get("run")):
        return None
    if former == name:
        return None
    return "T1", (
        f"the node there is {node}, and that is remote {former} of {hello.get('node')}; "
        f"correct the address of {name}, or remove one of the two"
    )


def second_run(hello: dict[str, Any], current: dict[str, Any]) -> Refusal | None:
    """Why a HELLO may not replace the connection that began with ``current``: a copy of the same
    primary's state is in use elsewhere (a cloned machine, a backup that is tried out), and would
    end that connection at each attempt, only to learn that it is not the one (T6). A restart is of
    a later epoch, whatever was lost of the superblock."""
    theirs, ours = hello["epoch"], current["epoch"]
    if hello["generation"] != current["generation"] or hello["run"] == current["run"]:
        return None
    if theirs > ours:
        return None
    return "T6", (
        f"{current['node']} is connected, in its run of epoch {ours}, and this is another run of "
        f"it, of epoch {theirs}: a copy of its state is in use"
    )


def _check(hello: dict[str, Any]) -> None:
    """PeerError unless everything that a secondary stores is of its type and size (I9)."""
    for key in ("uuid", "generation", "node", "run"):
        fields.text(hello, key)
    fields.integer(hello, "epoch", fields.EPOCH_MAX)
    fields.history(hello)
    fields.forks(hello)


def _other_volumes(theirs: Any, node: str, volumes: Sequence[Volume]) -> Refusal | None:
    if not isinstance(theirs, list) or not all(isinstance(v, dict) for v in theirs):
        return "T1", "HELLO names no volumes"
    ours = [volume.name for volume in volumes]
    names = [v.get("name") for v in theirs]
    if names != ours:
        return "T1", f"the primary has volumes {names}, {node} has {ours}"
    for volume, other in zip(volumes, theirs, strict=True):
        where = f"volume {volume.name}: the primary's"
        for key, value in (("size", volume.size), ("region_size", volume.region_size)):
            if other.get(key) != value:
                return "T1", f"{where} {key} is {other.get(key)}, {node} has {value}"
        try:
            uuid = fields.text(other, "uuid")
        except PeerError as error:
            return "T1", f"volume {volume.name}: {error.message}"
        if volume.uuid and volume.uuid != uuid:
            return "T1", f"{where} uuid is {uuid}, {node} has {volume.uuid}"
    return None


def answer(
    hello: dict[str, Any], node: str, state: dict[str, Any], durable_seq: int, copies: int
) -> dict[str, Any]:
    """WELCOME: what a secondary says of itself, in the highest version that both speak."""
    return {
        "version": min(repl.PROTOCOL_VERSIONS[1], hello["versions"][1]),
        "node": node,
        "initialised": state["uuid"] is not None,
        "uuid": state["uuid"],
        "generation": state["generation"],
        "history": state["history"],
        "epoch": state["epoch"],
        "run": state.get("run"),
        "durable_seq": durable_seq,
        "consistent": bool((state["upstream"] or {}).get("consistent")),
        "copies": copies,
        **altered(state),
    }
