"""The handshake's decision: a named case for each rule (T2-T9, T12); ``tests/property`` proves that
no history loses a change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nbdmirror.core.identity import Action, Fork, Source, Target, decide

SOURCE = Source(
    generation="g2",
    history=(("g1", 40),),
    epoch=5,
    forks=(),
    tail_seq=50,
    next_seq=101,
    base_seq=20,
    tracking=False,
    met_epoch=5,
    consistent=True,
)
TARGET = Target(initialised=True, generation="g2", epoch=5, durable_seq=80)
FORKS = (Fork(3, 70), Fork(4, 90))

CONTINUE, RESET, FULL, REFUSE = Action.CONTINUE, Action.RESET, Action.FULL, Action.REFUSE

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Action, str, int]] = {
    # name: source, target, action, rule, first record of the stream
    "T2 holds nothing yet": ({}, {"initialised": False, "generation": None}, FULL, "T2", 101),
    "T3 the log holds it": ({}, {}, CONTINUE, "T3", 81),
    "T3 nothing is pending": ({}, {"durable_seq": 100}, CONTINUE, "T3", 101),
    "T3 at the tail": ({}, {"durable_seq": 49}, CONTINUE, "T3", 50),
    "T3 a fork behind it": ({"forks": FORKS}, {"epoch": 5}, CONTINUE, "T3", 81),
    "T3 up to the fork": (
        {"forks": FORKS},
        {"epoch": 4, "durable_seq": 90},
        CONTINUE,
        "T3",
        91,
    ),
    "T5 a snapshot was restored there": ({}, {"altered": True}, FULL, "T5", 101),
    "T5 ... while it was tracked": ({"tracking": True}, {"altered": True}, FULL, "T5", 101),
    "T5 the superblock there was damaged": (
        {"consistent": False},
        {"altered": True, "damaged": True, "consistent": False},
        FULL,
        "T5",
        101,
    ),
    "T5 a facet there is new": (
        {},
        {"altered": True, "rejoined": True, "patient": True},
        FULL,
        "T5",
        101,
    ),
    "T3 ... and a volume has nothing else": (
        {"needed": True},
        {"altered": True, "rejoined": True, "patient": True},
        CONTINUE,
        "T3",
        81,
    ),
    "T5 ... but something else is altered too": (
        {"needed": True},
        {"altered": True, "rejoined": True},
        FULL,
        "T5",
        101,
    ),
    "T5 ... but it lost what it had confirmed": (
        {"needed": True},
        {"altered": True, "rejoined": True, "patient": True, "consistent": False},
        FULL,
        "T5",
        101,
    ),
    "T4 tracked by the map": ({"tracking": True}, {}, RESET, "T4", 101),
    "T4 the log is gone, the map has it": (
        {"tracking": True, "tail_seq": 101},
        {"durable_seq": 20},
        RESET,
        "T4",
        101,
    ),
    "T5 one before the map's base": ({"tracking": True}, {"durable_seq": 19}, FULL, "T5", 101),
    "T5 one before the log": ({}, {"durable_seq": 48}, FULL, "T5", 101),
    "T5 lost what it confirmed": ({}, {"consistent": False}, FULL, "T5", 101),
    "T6 the primary lost history": ({}, {"durable_seq": 101}, REFUSE, "T6", 101),
    "T6 set back while it ran, and went on": (
        {"ends": ((4, 70), (3, 60))},
        {"epoch": 4, "durable_seq": 71},
        REFUSE,
        "T6",
        101,
    ),
    "T6 ... and a fork later": (
        {"ends": ((3, 70),), "forks": (Fork(4, 90),)},
        {"epoch": 3, "durable_seq": 91},
        REFUSE,
        "T6",
        101,
    ),
    "T6 ... and a fork before anything was written": (
        {"ends": ((3, 70),), "forks": (Fork(4, 70),)},
        {"epoch": 3, "durable_seq": 71},
        REFUSE,
        "T6",
        101,
    ),
    "T3 up to where its run ended": (
        {"ends": ((4, 70), (3, 60))},
        {"epoch": 4, "durable_seq": 70},
        CONTINUE,
        "T3",
        71,
    ),
    "T7 a fork before where a later run ended": (
        {"forks": (Fork(3, 70),), "ends": ((4, 70),), "consistent": False, "met_epoch": 3},
        {"epoch": 3, "durable_seq": 71},
        RESET,
        "T7",
        71,
    ),
    "T7 ahead of a fork, in the log": (
        {"forks": FORKS, "consistent": False, "met_epoch": 4},
        {"epoch": 4, "durable_seq": 91},
        RESET,
        "T7",
        91,
    ),
    "T7 ahead of a fork, in the map": (
        {"forks": FORKS, "consistent": False, "met_epoch": 4, "tracking": True},
        {"epoch": 4, "durable_seq": 99},
        RESET,
        "T7",
        101,
    ),
    "T7 the first fork counts": (
        {"forks": FORKS, "consistent": False, "met_epoch": 3},
        {"epoch": 3, "durable_seq": 80},
        RESET,
        "T7",
        71,
    ),
    "T7 but the log begins later": (
        {"forks": FORKS, "consistent": False, "met_epoch": 3, "tail_seq": 72},
        {"epoch": 3, "durable_seq": 80},
        FULL,
        "T5",
        101,
    ),
    "T5 ... from within a resync": (
        {"consistent": False, "tracking": True, "copies": 8},
        {"consistent": False, "copies": 7},
        FULL,
        "T5",
        101,
    ),
    "T5 ... from before a resync": (
        {"consistent": False, "tracking": True, "copies": 8},
        {"copies": 7},
        FULL,
        "T5",
        101,
    ),
    "T5 ... that its log does not tell": ({"copies": 8}, {"copies": 7}, FULL, "T5", 101),
    "T4 it has more than it acknowledged": (
        {"consistent": False, "tracking": True, "copies": 8},
        {"consistent": False, "copies": 9},
        RESET,
        "T4",
        101,
    ),
    "T4 it does not count": (
        {"consistent": False, "tracking": True, "copies": 8},
        {"consistent": False},
        RESET,
        "T4",
        101,
    ),
    "T6 comes before an old copy": (
        {"copies": 8},
        {"durable_seq": 101, "copies": 7},
        REFUSE,
        "T6",
        101,
    ),
    "T7 but a copy of before it was copied to": (
        {"forks": FORKS, "consistent": False, "met_epoch": 3, "copies": 8},
        {"epoch": 3, "durable_seq": 80, "copies": 7},
        FULL,
        "T5",
        101,
    ),
    "T7 but an old copy": ({"forks": FORKS}, {"epoch": 4, "durable_seq": 91}, FULL, "T5", 101),
    "T8 a former generation, within it": (
        {"tail_seq": 10, "base_seq": 0},
        {"generation": "g1", "durable_seq": 40},
        CONTINUE,
        "T3",
        41,
    ),
    "T9 a former generation, past its end": (
        {},
        {"generation": "g1", "durable_seq": 41},
        FULL,
        "T9",
        101,
    ),
    "T12 unrelated": ({}, {"generation": "x"}, REFUSE, "T12", 101),
    "T12 comes before all else": (
        {"tracking": True},
        {"generation": "x", "durable_seq": 0},
        REFUSE,
        "T12",
        101,
    ),
}


@pytest.mark.parametrize(
    ("source", "target", "action", "rule", "seq"), CASES.values(), ids=CASES.keys()
)
def test_rules(
    source: dict[str, Any], target: dict[str, Any], action: Action, rule: str, seq: int
) -> None:
    decision = decide(replace(SOURCE, **source), replace(TARGET, **target))
    assert (decision.action, decision.rule) == (action, rule), decision.why
    assert decision.why
    assert decision.put_off == (action is CONTINUE and "altered" in target)
    if action is not REFUSE:
        assert decision.seq == seq


def test_every_doubt_ends_in_a_comparison() -> None:
    """I5: whatever a confused secondary says, nothing is continued that the log does not hold."""
    for generation in ("g1", "g2"):
        for epoch in range(7):
            for durable in (-1, 0, 19, 20, 40, 49, 70, 90, 100, 101, 2**63):
                for consistent in (False, True):
                    target = Target(True, generation, epoch, durable, consistent)
                    decision = decide(replace(SOURCE, forks=FORKS), target)
                    if decision.action is CONTINUE:
                        assert SOURCE.tail_seq <= decision.seq <= SOURCE.next_seq
                        assert durable >= SOURCE.base_seq and consistent
                    elif decision.action is RESET:
                        assert SOURCE.tail_seq <= decision.seq <= SOURCE.next_seq
