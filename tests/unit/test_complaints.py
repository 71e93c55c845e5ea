"""What goes wrong elsewhere (peers, section 3, 10-30) is a test here; each says which it holds.

``peers 12`` or ``peers 12, 28`` in a test's docstring.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
CASES = range(10, 31)
CLAIM = re.compile(r"peers (\d+(?:, \d+)*)")


def _claimed() -> Iterator[int]:
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                text = " ".join((ast.get_docstring(node) or "").split())
                named = re.findall(r"^test_peers_(\d+)", node.name)
                for claim in CLAIM.findall(text) + named:
                    yield from map(int, claim.split(", "))


def test_each_complaint_has_a_test() -> None:
    """All of them, and no number that there is not."""
    assert set(_claimed()) >= set(CASES)
    assert max(_claimed()) <= 36
