"""Coverage marks: how often a run took the branches that are rare and that matter.

Counted from outside, by wrapping the engine for the time of a run; a sweep that never took one of
them has not tested it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nbdmirror.core.active import ActiveMap
from nbdmirror.core.dcm import Dcm
from nbdmirror.engine.activemap import ActiveMapFile
from nbdmirror.engine.copier import Copier
from nbdmirror.engine.group import Group
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.log import Log
from nbdmirror.engine.maps import DcmFile
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.secondary import Secondary
from nbdmirror.engine.session import Session
from nbdmirror.engine.volume import Volume

Wrap = Callable[[Counter[str], Callable[..., Any]], Callable[..., Any]]


def _calls(label: str) -> Wrap:
    def wrap(counter: Counter[str], function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            counter[f"mark {label}"] += 1
            return function(*args, **kwargs)

        return counted

    return wrap


def _shrinks(label: str, attribute: str) -> Wrap:
    """Counts the calls that took something out of a collection."""

    def wrap(counter: Counter[str], function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(self: Any, *args: Any) -> Any:
            before = len(getattr(self, attribute))
            result = function(self, *args)
            counter[f"mark {label}"] += len(getattr(self, attribute)) < before
            return result

        return counted

    return wrap


MARKS: tuple[tuple[Any, str, Wrap], ...] = (
    (Log, "_append_wrapping", _calls("the ring wraps")),
    (Log, "_read_far", _calls("the log is read back from disk")),
    (Log, "rewrite", _calls("the log is written anew")),
    (Secondary, "_reset", _calls("the secondary begins a new stream")),
    (Secondary, "become_consistent", _calls("the secondary becomes consistent")),
    (Remote, "overflow", _calls("a remote is forced out of the log")),
    (Remote, "fill", _calls("everything is marked")),
    (Copier, "hole", _calls("a hole travels as a hole")),
    (Copier, "compare", _calls("regions are compared")),
    (Copier, "copy", _calls("regions are copied")),
    (Session, "_order", _calls("a resync goes on in order")),
    (DcmFile, "clear", _calls("a map is cleared")),
    (Group, "_write_later", _calls("a write has to wait")),
    (Volume, "wait_unlocked", _calls("a write waits for a range")),
    (Housekeeper, "need_space", _calls("the log is full")),
    (ActiveMapFile, "settle", _calls("the active map is written anew")),
    (ActiveMap, "admit", _shrinks("an extent is evicted", "hot")),
    (Dcm, "mark", _shrinks("a region in flight is marked again", "_in_flight")),
)

ASTRAY = ("that a verify has to find", "in a log", "in a superblock", "in a map")
"""Where writes are lost, or land elsewhere (fault 16)."""

LABELS = (
    *(
        f"mark {label}"
        for label in (
            "the ring wraps",
            "the log is read back from disk",
            "the log is written anew",
            "the secondary begins a new stream",
            "the secondary becomes consistent",
            "a remote is forced out of the log",
            "everything is marked",
            "a hole travels as a hole",
            "regions are compared",
            "regions are copied",
            "a resync goes on in order",
            "a region in flight is marked again",
            "a map is cleared",
            "a write has to wait",
            "a write waits for a range",
            "the log is full",
            "the active map is written anew",
            "an extent is evicted",
        )
    ),
    *(f"rule {rule}" for rule in ("T2", "T3", "T4", "T7")),
    *(f"event {kind}" for kind in ("overflow", "log-full", "facet-failed", "failed", "paused")),
    *(
        f"disk {what}"
        for what in (
            "power cut",
            "write unsynced at power cut",
            "name lost",
            "sync error EIO",
            "sync lose EIO",
            "pwrite error EIO",
            "pwrite error ENOSPC",
            "disk stall",
            "rot",
        )
    ),
    *(f"net {what}" for what in ("cut", "cut one way", "reset", "stall", "split", "half-open")),
    "restored",
    "restored on a secondary",
    "written into a snapshot",
    "changed beside the write path",
    "rot that a verify has to find",
    *(f"{kind} {where}" for kind in ("drop", "stray") for where in ASTRAY),
)
"""What a sweep must have seen."""


@contextmanager
def counting(counter: Counter[str]) -> Iterator[None]:
    """Counts into ``counter`` meanwhile."""
    saved = [(owner, name, owner.__dict__[name]) for owner, name, _ in MARKS]
    for owner, name, wrap in MARKS:
        setattr(owner, name, wrap(counter, owner.__dict__[name]))
    try:
        yield
    finally:
        for owner, name, function in saved:
            setattr(owner, name, function)
