"""Which node a remote is: its map and its place in the log are those of no other."""

from __future__ import annotations

from typing import Any

from nbdmirror.errors import Refused


def meet(remotes: dict[str, dict[str, Any]], name: str, node: str, *, holds: bool) -> None:
    """The node at the address of remote ``name`` says who it is; whoever saves the facts next makes
    that durable. ``holds``: it was initialised. Refused if another one was met there before, or if
    it is another remote: two of them would end each other's connections (T1)."""
    for other, facts in remotes.items():
        if other != name and facts.get("node") == node:
            raise Refused(
                f"T1: the node at {remotes[name]['address']} is {node}, and that is remote {other}",
                hint=f"correct the address of {name}, or remove one of the two",
            )
    known = remotes[name].get("node")
    if holds and known not in (None, node):
        raise Refused(
            f"T1: remote {name} is node {known}, and {node} is at {remotes[name]['address']}",
            hint=f"correct the address; for another node: nbdmirror remote remove {name}, then add",
        )
    remotes[name]["node"] = node
