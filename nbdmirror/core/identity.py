"""What two nodes do when they meet: a pure function over what each knows of itself.

The rules are numbered as in the handshake table (T1-T14); ``decide`` names the one that applied,
so that a status, an event or ``explain`` can say why (X1, X4). Nothing here moves data.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum


class Action(Enum):
    """What follows from a handshake."""

    CONTINUE = "continue"
    """Send the log from the record after the secondary's last durable one."""
    RESET = "reset"
    """Start a new stream at ``Decision.seq``; every change before it is in the DCM."""
    FULL = "full"
    """As RESET, with every region in the DCM, compared by hash before it is sent."""
    REFUSE = "refuse"
    """Nothing moves; a person has to look."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a power loss ended an epoch: records of it above ``end_seq`` are not in the history.

    A secondary may hold such records; they lie in extents that were active then, which recovery
    put into every remote's DCM. (The death of a process alone loses no record, and is no fork.)"""

    epoch: int
    end_seq: int


@dataclass(frozen=True, slots=True)
class Source:
    """The primary's knowledge of one remote."""

    generation: str
    history: tuple[tuple[str, int], ...]
    epoch: int
    forks: tuple[Fork, ...]
    tail_seq: int
    next_seq: int
    base_seq: int
    """The remote's DCM holds every change after this seq that the log does not."""
    tracking: bool
    met_epoch: int = 0
    """The epoch in which the remote last agreed to a stream."""
    consistent: bool = False
    """The remote said, after its last resync, that it is consistent."""
    runs: tuple[tuple[int, str], ...] = ()
    """(epoch, random id) of each start, oldest first; an empty id stands for one that was lost."""
    ends: tuple[tuple[int, int], ...] = ()
    """(epoch, last record) of each former run that did not end in a fork. A secondary of that
    epoch, or of one before, that holds more followed what is not in the history: the primary was
    set back to a copy of its running self, and may have written as much since."""
    copies: int = 0
    """The number that the remote saved before the last region copy that it acknowledged."""
    needed: bool = False
    """A volume has no facet here, and no other remote (M11): there is nothing to compare with."""


@dataclass(frozen=True, slots=True)
class Target:
    """The secondary's knowledge of itself, from its WELCOME."""

    initialised: bool
    generation: str | None = None
    epoch: int = 0
    durable_seq: int = 0
    consistent: bool = True
    history: tuple[tuple[str, int], ...] = field(default=())
    run: str | None = None
    """The id of the primary's run that it followed last."""
    altered: bool = False
    """Its volumes were changed by something else since: a snapshot was restored there (V14), or
    (``rejoined``) one of its facets holds something else than the others, or (``damaged``) what it
    knows of them may be out of date."""
    rejoined: bool = False
    damaged: bool = False
    patient: bool = False
    """``rejoined``, and nothing else: other facets have all of each volume, and it goes on to say
    so until it was compared."""
    copies: int | None = None
    """It grows, durably, before region copies are acknowledged; ``None``: it does not say."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The action, the rule it follows from, and a sentence for people."""

    action: Action
    rule: str
    why: str
    seq: int = 0
    """The first record of the stream; meaningless for a REFUSE."""
    put_off: bool = False
    """What is new there is compared another time."""


def _common_end(source: Source, epoch: int) -> tuple[int, Fork | None]:
    """The last record of the history that a target of that epoch may hold, and the fork that ended
    it there; ``None`` if that was none."""
    forks = [(one.end_seq, one.epoch) for one in source.forks if one.epoch >= epoch]
    ends = [(end, other) for other, end in source.ends if other >= epoch]
    end_seq, ended = min([*forks, *ends, (source.next_seq - 1, source.epoch)])
    return end_seq, Fork(ended, end_seq) if (end_seq, ended) in forks else None


def _run_doubt(source: Source, target: Target) -> Decision | None:
    """Whether the secondary followed a run of which this primary knows nothing: then equal epochs
    and seqs name different records."""
    if target.run is None or not source.runs:
        return None
    if target.epoch < source.runs[0][0]:
        return _full(f"the secondary was last here in epoch {target.epoch}, too long ago to prove")
    known = dict(source.runs).get(target.epoch)
    if known == "":
        return _full("what the primary knew of the run that the secondary followed was lost")
    if known == target.run:
        return None
    return Decision(
        Action.REFUSE,
        "T6",
        f"the secondary followed a run of epoch {target.epoch} that is not in the primary's "
        "history: the primary was restored from a backup",
    )


def _set_back(source: Source, target: Target) -> bool:
    """Whether region copies that it acknowledged are missing: it was set back to before them. No
    record need have travelled since, and within a resync it is not consistent either way (I5)."""
    return target.copies is not None and target.copies < source.copies


def decide(source: Source, target: Target) -> Decision:
    """First match wins; every doubt ends in a comparison by hash, never in trust (I5)."""
    decision = _decide(source, target)
    if _puts_off(source, target) and decision.action in (Action.CONTINUE, Action.RESET):
        why = f"{decision.why}; a facet there is new, and compared when there is one here again"
        decision = replace(decision, why=why, put_off=True)
    if decision.action is Action.CONTINUE:
        return replace(decision, seq=target.durable_seq + 1)
    return decision if decision.seq else replace(decision, seq=source.next_seq)


def _puts_off(source: Source, target: Target) -> bool:
    """Whether what is new on the secondary waits: marked, it would not be the one any more that a
    volume is read from, and that a local facet can come back from (I2, M11)."""
    return source.needed and target.patient


def _decide(source: Source, target: Target) -> Decision:
    if not target.initialised:
        why = "the secondary holds nothing yet: first synchronisation"
        return Decision(Action.FULL, "T2", why)
    if target.generation != source.generation:
        known = dict(source.history)
        if target.generation not in known:
            return Decision(
                Action.REFUSE,
                "T12",
                f"the secondary follows generation {target.generation}, which is not in the "
                f"history of {source.generation}: unrelated data",
            )
        end = known[target.generation]
        if target.durable_seq > end:
            return Decision(
                Action.FULL,
                "T9",
                f"the secondary holds records {end + 1}..{target.durable_seq} of a former "
                "generation that are not part of the history",
            )
    elif (doubt := _run_doubt(source, target)) is not None:
        return doubt
    if target.altered and not _puts_off(source, target):
        what = "a facet is new" if target.rejoined else "a snapshot was restored"
        what = "a file of the node's own was damaged" if target.damaged else what
        return _full(f"{what} on the secondary")
    end, fork = _common_end(source, target.epoch)
    if target.durable_seq > end:
        if fork is None:
            return Decision(
                Action.REFUSE,
                "T6",
                f"the secondary holds record {target.durable_seq} of epoch {target.epoch}, which "
                f"ends at {end} here: the primary lost history (a restored backup, a volume that "
                "was set back, or a disk that lied)",
            )
        if source.met_epoch > fork.epoch or _set_back(source, target):
            return _full(f"the secondary is back at epoch {target.epoch}: an old copy of it")
        if not source.tracking and end + 1 < source.tail_seq:
            return _full(f"the log begins at {source.tail_seq}, the common history ends at {end}")
        return Decision(
            Action.RESET,
            "T7",
            f"the primary lost power; the secondary's records {end + 1}..{target.durable_seq} "
            "lie in extents that are compared",
            # What was written since is in the DCM of a remote that is tracked, else in the log.
            source.next_seq if source.tracking else end + 1,
        )
    if target.durable_seq < source.base_seq:
        return _full(
            f"the secondary ends at record {target.durable_seq}, the map begins at "
            f"{source.base_seq}: nothing proves what is the same in between"
        )
    if _set_back(source, target):
        return _full("the secondary lacks what was copied to it: an old copy of it")
    if source.consistent and not target.consistent:
        return _full("the secondary lost what it had confirmed: an old copy of it")
    if source.tracking:
        return Decision(
            Action.RESET, "T4", f"changes since record {target.durable_seq} are in the map"
        )
    if target.durable_seq + 1 < source.tail_seq:
        return _full(
            f"the secondary ends at record {target.durable_seq}, the log begins at "
            f"{source.tail_seq}: it lost what it had confirmed"
        )
    return Decision(
        Action.CONTINUE, "T3", f"the log holds everything since record {target.durable_seq}"
    )


def _full(why: str) -> Decision:
    return Decision(Action.FULL, "T5", why)
