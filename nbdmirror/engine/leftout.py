"""Marks that a stream of records leaves out, because it begins behind them: told in its START.

A remote in DCM logging gets regions instead of records, so what is said of snapshots meanwhile
never reaches it: it lacks those that were taken, and has those that were deleted everywhere. With
the stream that makes it consistent again come the snapshots that there are, for it to say which it
lacks, and the deletions, for it to follow. A snapshot may also outlive its record, which a log in
memory held (M13): it comes with whatever stream is the next. Called by both ends of a session
(``engine.session``, ``engine.receiver``).

START's ``marks``: [{seq, epoch, time_ns: of the record; mark: as in ``codec.mark``}, ...]; the
deletions, which have no seq any more, come with 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nbdmirror.codec import fields
from nbdmirror.codec import mark as marks
from nbdmirror.codec.mark import Mark
from nbdmirror.errors import FormatError, PeerError

MARKS_MAX = 1000
"""Of one START; the oldest are left out past it."""
DELETIONS_MAX = 256
"""That a remote may miss: as many as there can be snapshots; the oldest are forgotten past it."""
TIME_MAX = 1 << 63

Json = dict[str, Any]

OWN = ("resync", "delayed")
"""Kinds of snapshots that a node made for itself: no other one has them."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A mark with what is told of its record."""

    seq: int
    epoch: int
    time_ns: int
    mark: Mark


def deletion(mark: Mark) -> str | None:
    """The uuid of the snapshot that is gone by a mark; ``None`` if none is."""
    return mark.uuid if mark.do == marks.DELETE else mark.replaces


def told(entries: list[Json], deletions: list[str], seq: int, forks: list[list[int]]) -> list[Json]:
    """The marks for a START at ``seq``: the snapshots of ``entries`` (see ``engine.snapshots``)
    that were taken before it, or whose record was lost in one of ``forks``, which the remote has
    not heard of; and the deletions, by uuid."""
    found = [
        {
            "seq": entry["seq"],
            "epoch": entry["epoch"],
            "time_ns": entry["time_ns"],
            "mark": asdict(
                Mark(
                    marks.SNAPSHOT,
                    entry["uuid"],
                    tuple(entry["volumes"]),
                    entry["number"],
                    entry["protected"],
                )
            ),
        }
        for entry in entries
        if entry["kind"] not in OWN
        and not (entry.get("lost") or entry.get("deleting"))
        and entry["seq"] is not None
        and (entry["seq"] < seq or _ended(entry, forks))
    ]
    for uuid in deletions:
        mark = asdict(Mark(marks.DELETE, uuid, (0,)))  # it goes whole, whatever it was of
        found.append({"seq": 0, "epoch": 0, "time_ns": 0, "mark": mark})
    return found[-MARKS_MAX:]


def _ended(entry: Json, forks: list[list[int]]) -> bool:
    return any(entry["seq"] > end and entry["epoch"] <= epoch for epoch, end in forks)


def parse(start: Json, volumes: int) -> list[LeftOut]:
    """The marks of a START, checked before any use (I9); PeerError says what is wrong."""
    value = start.get("marks", [])
    if not isinstance(value, list) or len(value) > MARKS_MAX:
        raise PeerError(f"START has no list of at most {MARKS_MAX} marks")
    found = []
    for one in value:
        if not isinstance(one, dict):
            raise PeerError("START has a mark that is none")
        try:
            mark = marks.checked(one.get("mark"))
        except FormatError as error:
            raise PeerError(f"START: {error.message}") from error
        if mark.do not in (marks.SNAPSHOT, marks.DELETE) or mark.volumes[-1] >= volumes:
            raise PeerError(f"START has a mark {mark.do} of volume {mark.volumes[-1]}")
        found.append(
            LeftOut(
                fields.integer(one, "seq"),
                fields.integer(one, "epoch", fields.EPOCH_MAX),
                fields.integer(one, "time_ns", TIME_MAX),
                mark,
            )
        )
    return found
