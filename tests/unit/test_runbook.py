"""The failure table (M15): each row of README's runbook is held by tests with real daemons.

A test names its row in its docstring: ``Runbook: WHAT`` with the row's first cell. A row without a
test, a test of a row that is not there, a word of "what you see" that its tests do not look for,
and a command of "what you do" that they do not run, fail here.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
README = TESTS.parent / "README.md"
WITH_DAEMONS = ("faults", "integration", "guest")
CLAIM = re.compile(r"Runbook: ([^.]+)\.")
COMMANDS = ("nbdmirror ", "facet ", "pause ", "verify ")
CODE = re.compile(r"`([^`]+)`")


class Row(NamedTuple):
    """What breaks; what a person sees, what happens by itself, what the person does."""

    what: str
    see: str
    happens: str
    do: str


def rows() -> list[Row]:
    """The table."""
    text = README.read_text().split("## What happens when things break")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return [Row(what.removeprefix("... "), *rest) for what, *rest in cells]


@functools.cache
def claims() -> list[tuple[str, str, str]]:
    """(row, test, its source) of every test that names one."""
    return list(_claims())


def _claims() -> Iterator[tuple[str, str, str]]:
    for top in WITH_DAEMONS:
        for path in sorted((TESTS / top).glob("test_*.py")):
            source = path.read_text()
            for node in ast.walk(ast.parse(source)):
                if not isinstance(node, ast.FunctionDef):
                    continue
                for claim in CLAIM.findall(" ".join((ast.get_docstring(node) or "").split())):
                    code = ast.get_source_segment(source, node)
                    assert code is not None
                    for row in claim.split("; "):
                        yield row, f"{path.name}::{node.name}", code


def source_of(row: Row) -> str:
    """Of all tests of the row."""
    return "\n".join(code for what, _, code in claims() if what == row.what)


def test_claims_name_rows() -> None:
    """A row that was renamed takes its tests along."""
    known = {row.what for row in rows()}
    assert not [(test, what) for what, test, _ in claims() if what not in known]


def is_there(word: str, source: str) -> bool:
    """Whether tests look for this word, make this setting, or give this command."""
    if "=" in word:
        return word.replace(" ", "") in source.replace(" ", "")
    if word.startswith(COMMANDS):
        words = re.findall(r"[a-z]+", word.removeprefix("nbdmirror ").split(" [")[0])
        return all(_is_spelt(one, source) for one in words)
    parts = re.split(r"\.\.\.|: ", word)
    return all(part.strip().casefold() in source.casefold() for part in parts)


def _is_spelt(word: str, source: str) -> bool:
    return any(form in source for form in (f'"{word}"', f'"--{word}"', f".{word}("))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.what)
def test_each_row_has_a_test_that_sees_what_it_says(row: Row) -> None:
    """M15: the row, the words that a person looks for, the commands."""
    source = source_of(row)
    assert source, "no test with real daemons names this row"
    missing = [word for word in CODE.findall(f"{row.see} {row.do}") if not is_there(word, source)]
    assert not missing, "none of its tests sees or does this"
