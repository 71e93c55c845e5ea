"""A remote's state from facts (M6, X4, X5): one word each, and the next thing to do."""

from __future__ import annotations

from typing import Any

import pytest

from nbdmirror.core.remotestate import Facts, Stall, facet_word, next_action, state_of

UP = {"initialised": True, "connected": True}


@pytest.mark.parametrize(
    ("facts", "state", "word", "action"),
    [
        ({}, "uninitialised", "not-synchronised", "start beta"),
        ({"connected": True}, "uninitialised", "not-synchronised", None),
        (UP, "synchronised", "synchronised", None),
        ({"initialised": True}, "behind", "synchronised", "mend the network"),
        (UP | {"tracking": True}, "tracking", "not-synchronised", None),
        ({"initialised": True, "consistent": False}, "tracking", "not-synchronised", "mend the"),
        (UP | {"dirty_regions": 1}, "tracking", "not-synchronised", None),
        (UP | {"resyncing": True, "full": True}, "resyncing", "being-synchronised", None),
        (UP | {"paused": True}, "paused", "not-synchronised", "nbdmirror resume beta"),
        (UP | {"failed": "disk"}, "failed", "not-synchronised", "replace the disk"),
        (UP | {"refused": "T6"}, "refused", "not-synchronised", "correct what"),
        (UP | {"diverged": True, "refused": "T9"}, "diverged", "not-synchronised", "decide which"),
        (UP | {"paused": True, "resyncing": True}, "paused", "not-synchronised", "resume"),
        (UP | {"paused": True, "failed": "disk"}, "failed", "not-synchronised", "resume beta"),
        ({"initialised": True, "shut": True}, "behind", "synchronised", "nbdmirror pause beta"),
        (UP | {"refused": "T6", "shut": True}, "refused", "not-synchronised", "pause beta"),
        (UP | {"failed": "disk", "shut": True}, "failed", "not-synchronised", "pause beta"),
        ({"paused": True, "refused": "T6"}, "paused", "not-synchronised", "nbdmirror resume beta"),
        (UP | {"differing": 3}, "synchronised", "synchronised", "nbdmirror verify beta --repair"),
        (UP | {"stall": Stall("it is", "do")}, "synchronised", "synchronised", "do"),
        ({"initialised": True, "differing": 3}, "behind", "synchronised", "mend the network"),
    ],
)
def test_states(facts: dict[str, Any], state: str, word: str, action: str | None) -> None:
    known = Facts(**facts)
    assert state_of(known) == state
    assert facet_word(state) == word
    text = next_action(known, "beta")
    assert (text is None) if action is None else (text is not None and action in text)
