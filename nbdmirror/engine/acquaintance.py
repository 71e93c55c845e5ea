"""Which node a remote is, for its map and its place in the log are those of no other; and what it
says of itself.
"""

from __future__ import annotations

from typing import Any

from nbdmirror.codec import fields
from nbdmirror.core.identity import Target
from nbdmirror.errors import Refused


def said(welcome: dict[str, Any]) -> Target:
    """What WELCOME says; PeerError where it is of no such type or size (I9)."""
    generation = welcome.get("generation")
    return Target(
        initialised=welcome.get("initialised") is True,
        generation=None if generation is None else fields.text(welcome, "generation"),
        epoch=fields.integer(welcome, "epoch", fields.EPOCH_MAX),
        run=None if welcome.get("run") is None else fields.text(welcome, "run"),
        durable_seq=fields.integer(welcome, "durable_seq"),
        consistent=welcome.get("consistent") is True,
        altered=welcome.get("altered") is True,
        rejoined=welcome.get("rejoined") is True,
        damaged=welcome.get("damaged") is True,
        patient=welcome.get("patient") is True,
        copies=fields.integer(welcome, "copies") if "copies" in welcome else None,
        history=fields.history(welcome),
    )


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
