"""What a primary would do for a secondary if both went on from here: is every difference found?

Between two recovered nodes each cell that differs must lie in a marked region or in a record that
will be sent (I2, O12): else they stay different for ever, and nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence

from nbdmirror.codec.record import Record
from nbdmirror.core.identity import Action, Decision, Fork, Source, Target, decide
from nbdmirror.engine.node import Node
from tests.sim.oracle import Violation


def decision(primary: Node, name: str, secondary: Node) -> Decision:
    """What the two would agree upon."""
    assert primary.primary is not None
    state, other = primary.store.state, secondary.store.state
    remote = primary.primary.remote(name)
    upstream = other["upstream"]
    ring = primary.log.ring
    source = Source(
        generation=state["generation"],
        history=(),
        epoch=state["epoch"],
        ends=tuple((epoch, end) for epoch, end in state["ends"]),
        forks=tuple(Fork(epoch, end) for epoch, end in state["forks"]),
        tail_seq=ring.tail_seq,
        next_seq=ring.next_seq,
        base_seq=remote.facts["base_seq"],
        tracking=remote.tracking,
        met_epoch=remote.facts["met_epoch"],
        consistent=remote.facts["consistent"],
    )
    return decide(
        source,
        Target(
            initialised=other["uuid"] is not None,
            generation=other["generation"],
            epoch=other["epoch"],
            durable_seq=secondary.log.next_seq - 1,
            consistent=bool(upstream and upstream["consistent"]),
            altered=bool(other.get("damaged")),
        ),
    )


def check(
    primary: Node,
    name: str,
    secondary: Node,
    pending: Sequence[Record],
    here: Sequence[bytes],
    there: Sequence[bytes],
    cell: int,
) -> str:
    """Violation if a difference is neither marked nor pending, or if everything would have to be
    compared though nothing was lost (I4); returns the rule that applies."""
    if secondary.store.state.get("altered") or secondary.store.state.get("rejoined"):
        return "V14"  # it says that everything is to be compared
    agreed = decision(primary, name, secondary)
    if agreed.rule == "T2":
        return agreed.rule
    if agreed.action in (Action.FULL, Action.REFUSE):
        raise Violation(f"clones of the primary and {name}: {agreed.rule} {agreed.why}")
    assert primary.primary is not None
    remote = primary.primary.remote(name)
    for volume, (mine, other) in enumerate(zip(here, there, strict=True)):
        if mine == other:
            continue
        marked, region = remote.dcms[volume].map, remote.dcms[volume].region_size
        sent = bytearray(len(mine) // cell)
        for record in pending:
            if record.volume == volume and record.seq >= agreed.seq:
                first, count = record.offset // cell, record.length // cell
                sent[first : first + count] = b"\1" * count
        for number in range(len(sent)):
            at = number * cell
            same = mine[at : at + cell] == other[at : at + cell]
            if not (same or sent[number] or marked.is_marked(at // region)):
                raise Violation(
                    f"clones of the primary and {name} ({agreed.rule}): volume {volume} differs "
                    f"at {at}, which is neither marked nor pending (I2)"
                )
    return agreed.rule
