"""Checked reading of the JSON that a peer sends: types, ranges and sizes, before any use (I9)."""

from __future__ import annotations

from typing import Any

from nbdmirror.errors import PeerError

SEQ_MAX = 1 << 62
EPOCH_MAX = (1 << 32) - 1
ENTRIES_MAX = 1000
TEXT_MAX = 64
SAID_MAX = 1000

Json = dict[str, Any]


def brief(value: object) -> str:
    """What a peer said, for people: as long as an event, or a REFUSE, may well be."""
    return str(value)[:SAID_MAX]


def integer(message: Json, key: str, high: int = SEQ_MAX) -> int:
    """A whole number from 0 to ``high``; PeerError if it is anything else."""
    value = message.get(key)
    if type(value) is not int or not 0 <= value <= high:
        raise PeerError(f"{key} must be a whole number up to {high}, not {str(value)[:80]}")
    return value


def text(message: Json, key: str) -> str:
    """A short, printable text in ASCII: as such it fits where it is kept; PeerError if it is
    anything else."""
    value = message.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= TEXT_MAX:
        raise PeerError(f"{key} must be a text of 1 to {TEXT_MAX} characters")
    if not (value.isascii() and value.isprintable()):
        raise PeerError(f"{key} must be of printable ASCII")
    return value


def _pairs(message: Json, key: str) -> list[list[Any]]:
    value = message.get(key)
    if not isinstance(value, list) or len(value) > ENTRIES_MAX:
        raise PeerError(f"{key} must be a list of at most {ENTRIES_MAX} pairs")
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise PeerError(f"{key} holds something that is not a pair")
    return value


def history(message: Json) -> tuple[tuple[str, int], ...]:
    """((generation, end seq), ...) under ``history``."""
    pairs = [{"generation": pair[0], "end": pair[1]} for pair in _pairs(message, "history")]
    return tuple((text(pair, "generation"), integer(pair, "end")) for pair in pairs)


def forks(message: Json) -> list[list[int]]:
    """[[epoch, end seq], ...] under ``forks``."""
    pairs = [{"epoch": pair[0], "end": pair[1]} for pair in _pairs(message, "forks")]
    return [[integer(pair, "epoch", EPOCH_MAX), integer(pair, "end")] for pair in pairs]
