"""What a mark record says: the JSON in its payload, checked before any use (I9).

    do         "snapshot", "delete", "restore" or "changed"
    uuid       of the snapshot that is taken, deleted or restored from: 32 hex digits; of "changed"
               none
    volumes    indices of the volumes that it is about, ascending; of a "delete" all that it had
    number     of a snapshot: what people call it
    protected  of a snapshot: it is not given up for space while there is another
    replaces   of a snapshot: the uuid of the one that it takes the place of (a refresh), or null

A secondary does on its side what "snapshot" and "delete" say, at the same point of the write
order. "restore" and "changed" tell where a volume was changed beside the log: the regions follow
in a resync, and a secondary that reads one of them in its stream has missed that resync.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from nbdmirror.errors import FormatError
from nbdmirror.ports import Buffer

SNAPSHOT, DELETE, RESTORE, CHANGED = "snapshot", "delete", "restore", "changed"
VERBS = (SNAPSHOT, DELETE, RESTORE, CHANGED)
SIZE_MAX = 16 << 10
VOLUMES_MAX = 1024
_UUID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Mark:
    """A checked mark."""

    do: str
    uuid: str | None
    volumes: tuple[int, ...]
    number: int = 0
    protected: bool = False
    replaces: str | None = None

    def encode(self) -> bytes:
        """The payload."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()


def decode(payload: Buffer) -> Mark:
    """The mark in a payload; FormatError says what is wrong with it."""
    if len(payload) > SIZE_MAX:
        raise FormatError(f"a mark of {len(payload)} bytes")
    try:
        value = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"a mark is not JSON: {error}") from error
    return checked(value)


def checked(value: object) -> Mark:
    """The mark that a JSON value is; FormatError says why it is none."""
    problem = _problem(value)
    if problem is not None:
        raise FormatError(f"a mark has {problem}")
    assert isinstance(value, dict)
    return Mark(**{**value, "volumes": tuple(value["volumes"])})


def _problem(value: object) -> str | None:
    if not isinstance(value, dict) or value.keys() != Mark.__dataclass_fields__.keys():
        return "the wrong fields"
    if value["do"] not in VERBS:
        return f"an unknown verb {str(value['do'])[:40]!r}"
    for key in ("uuid", "replaces"):
        text = value[key]
        if text is not None and not (isinstance(text, str) and _UUID.fullmatch(text)):
            return f"a {key} that is none"
    if value["uuid"] is None and value["do"] != CHANGED:
        return "no uuid"
    number, volumes = value["number"], value["volumes"]
    if type(number) is not int or not 0 <= number < 1 << 53:
        return "a number out of range"
    if not isinstance(value["protected"], bool):
        return "no word on its protection"
    if not isinstance(volumes, list) or not 0 < len(volumes) <= VOLUMES_MAX:
        return "no volumes"
    if any(type(index) is not int or not 0 <= index < VOLUMES_MAX for index in volumes):
        return "a volume out of range"
    return None if volumes == sorted(set(volumes)) else "volumes out of order"
