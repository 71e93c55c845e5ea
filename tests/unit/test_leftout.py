"""What a START tells of marks that its stream leaves out: both ends, and bad input (V9, I9)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nbdmirror.codec import mark as marks
from nbdmirror.codec.mark import Mark
from nbdmirror.engine import leftout
from nbdmirror.errors import PeerError

UUID = "0123456789abcdef" * 2


def entry(number: int, seq: int | None, **more: Any) -> dict[str, Any]:
    """As ``engine.snapshots`` keeps it."""
    return {
        "uuid": f"{number:032x}",
        "number": number,
        "kind": "user",
        "seq": seq,
        "epoch": 3,
        "time_ns": 7,
        "volumes": [0, 1],
        "protected": False,
        **more,
    }


def sent(value: Any) -> Any:
    """As it comes out of a frame."""
    return json.loads(json.dumps(value))


def test_what_is_told_is_what_was_taken_before_the_stream_and_is_still_there() -> None:
    entries = [
        entry(1, 5),
        entry(2, 9),
        entry(3, 10),  # its mark is in the stream
        entry(4, None),
        entry(5, 6, lost="no space"),
        entry(6, 6, deleting=True),
        entry(7, 6, kind="resync"),
        entry(8, 6, kind="delayed"),
    ]
    found = leftout.parse({"marks": sent(leftout.told(entries, [UUID], 10, []))}, 2)
    assert [(one.mark.do, one.mark.number, one.seq) for one in found] == [
        (marks.SNAPSHOT, 1, 5),
        (marks.SNAPSHOT, 2, 9),
        (marks.DELETE, 0, 0),
    ]
    assert (found[0].epoch, found[0].time_ns, found[0].mark.volumes) == (3, 7, (0, 1))
    assert found[2].mark.uuid == UUID


def test_a_snapshot_that_outlived_its_record_is_told_with_any_stream() -> None:
    """M13: a log in memory was lost with record 9 of epoch 3; the seq belongs to another now."""
    entries = [entry(1, 8), entry(2, 9), entry(3, 9, epoch=4)]
    for forks, told in (([[3, 8]], [2]), ([[4, 8]], [2, 3]), ([[2, 8]], []), ([], [])):
        found = leftout.parse({"marks": sent(leftout.told(entries, [], 0, forks))}, 2)
        assert [one.mark.number for one in found] == told


def test_a_deletion_is_a_delete_or_what_a_refresh_replaces() -> None:
    assert leftout.deletion(Mark(marks.DELETE, UUID, (0,))) == UUID
    assert leftout.deletion(Mark(marks.SNAPSHOT, "f" * 32, (0,), 1, False, UUID)) == UUID
    assert leftout.deletion(Mark(marks.SNAPSHOT, UUID, (0,), 1)) is None
    assert leftout.deletion(Mark(marks.CHANGED, None, (0,))) is None


def test_an_older_primary_tells_nothing() -> None:
    assert leftout.parse({}, 1) == []


@pytest.mark.parametrize(
    "broken",
    [
        7,
        [7],
        [{}],
        [{"seq": -1}],
        [{"mark": {"do": "restore", "volumes": [0]}}],
        [{"seq": 1 << 63}],
        [{"epoch": "x"}],
        [{"time_ns": None}],
        [{"volumes": [2]}],
        [{}] * (leftout.MARKS_MAX + 1),
    ],
)
def test_bad_input_is_refused(broken: Any) -> None:
    """Each breaks one field of a list that would be taken."""
    (good,) = sent(leftout.told([entry(1, 5)], [], 10, []))
    value = broken
    if isinstance(broken, list) and broken and broken != [7] and broken != [{}]:
        change = dict(broken[0])
        mark = {**good["mark"], **change.pop("mark", {})}
        mark.update({k: change.pop(k) for k in ("volumes",) if k in change})
        value = [{**good, **change, "mark": mark}] * len(broken)
    with pytest.raises(PeerError):
        leftout.parse({"marks": value}, 2)
