"""One TOML table, taken key by key: types, sizes, durations, and nothing left over.

Owns how a wrong value is reported: file, key, what it is, what would be right. Knows no key of the
product. Called by ``configfile``; ``parse_duration`` by the command line too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import NoReturn, TypeVar

from nbdmirror.config import GIB, KIB, MIB, TIB
from nbdmirror.errors import ConfigError

_UNITS = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
_SIZE_PATTERN = re.compile(r"([0-9]{1,18})(KiB|MiB|GiB|TiB)")
_SIZE_FORMS = 'a size is an integer of bytes or a string like "64KiB", "8MiB", "1GiB", "2TiB"'

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PATTERN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h)")
_DURATION_FORMS = 'a duration is a number of seconds or a string like "500ms", "10s", "5m", "1h"'

_REQUIRED = object()

Value = TypeVar("Value")
Result = TypeVar("Result")


def parse_size(value: object) -> int:
    """Bytes from an integer or "64KiB"; ConfigError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE_PATTERN.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{show(value)} is not a size: {_SIZE_FORMS}")
    return int(match[1]) * _UNITS[match[2]]


def parse_duration(value: object) -> float:
    """Seconds from a number or "500ms"; ConfigError for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = _DURATION_PATTERN.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{show(value)} is not a duration: {_DURATION_FORMS}")
    return float(match[1]) * _SECONDS[match[2]]


def format_size(size: int) -> str:
    """The size as the configuration would write it, exact."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


def show(value: object) -> str:
    """A value as TOML writes it, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Table:
    """The keys of one table; each is taken once, then ``finish`` refuses what nobody took."""

    def __init__(self, file: str, label: str, data: dict[str, object]) -> None:
        self.file = file
        self.label = label
        self._data = data
        self._taken: list[str] = []

    def fail(self, key: str, problem: str, hint: str | None = None) -> NoReturn:
        """Raises ConfigError with file, key and problem."""
        where = f"{self.label}.{key}" if self.label else key
        raise ConfigError(f"{self.file}: {where}: {problem}", hint=hint)

    def raw(self, key: str, default: object = _REQUIRED) -> object:
        """The value as TOML gave it; refused if it is missing and has no default."""
        self._taken.append(key)
        value = self._data.get(key, default)
        if value is _REQUIRED:
            self.fail(key, "missing; it has no default")
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def text(self, key: str, default: object = _REQUIRED) -> str:
        """A string that is not empty."""
        value = self.raw(key, default)
        if not isinstance(value, str):
            self.fail(key, f"must be a string, not {show(value)}")
        if not value or "\0" in value:
            self.fail(key, "must not be empty" if not value else "must not hold a zero byte")
        return value

    def texts(self, key: str, default: object = _REQUIRED) -> list[str]:
        """An array of strings that are not empty."""
        value = self.raw(key, default)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, f'must be an array of strings like ["..."], not {show(value)}')
        if any(not item or "\0" in item for item in value):
            self.fail(key, "holds a string that is empty or has a zero byte in it")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """One of a few words."""
        value = self.raw(key, default)
        if value not in choices:
            self.fail(key, f"must be {' or '.join(map(show, choices))}, not {show(value)}")
        assert isinstance(value, str)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.raw(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false, not {show(value)}")
        return value

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        value = self.raw(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.fail(key, f"must be an integer from {low} to {high}, not {show(value)}")
        return value

    def size(self, key: str, default: object, low: int, high: int) -> int:
        """Bytes from ``low`` to ``high``; without a default (None) the key must be there."""
        value = self.raw(key, _REQUIRED if default is None else default)
        size = self.checked(key, parse_size, value)
        if not low <= size <= high:
            limits = f"from {format_size(low)} to {format_size(high)}"
            self.fail(key, f"must be {limits}, not {show(value)}")
        return size

    def seconds(self, key: str, default: float, low: float, high: float) -> float:
        """A duration in seconds from ``low`` to ``high``."""
        value = self.raw(key, default)
        seconds = self.checked(key, parse_duration, value)
        if not low <= seconds <= high:
            self.fail(key, f"must be {low:g} to {high:g} seconds, not {show(value)}")
        return seconds

    def checked(self, key: str, check: Callable[[Value], Result], value: Value) -> Result:
        """What ``check`` makes of the value; its ConfigError gets the file and the key."""
        try:
            return check(value)
        except ConfigError as error:
            self.fail(key, error.message, error.hint)

    def table(self, key: str) -> dict[str, object]:
        """A table; empty if it is not there."""
        value = self.raw(key, {})
        if not isinstance(value, dict):
            self.fail(key, f"must be a table [{key}], not {show(value)}")
        return value

    def tables(self, key: str) -> list[dict[str, object]]:
        """An array of tables; empty if it is not there."""
        value = self.raw(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.fail(key, f"must be tables [[{key}]], not {show(value)}")
        return value

    def finish(self) -> None:
        """Refuses keys that nobody took, and says which key may have been meant."""
        for key in self._data:
            if key in self._taken:
                continue
            meant = difflib.get_close_matches(key, self._taken, n=1)
            known = f"did you mean {meant[0]}?" if meant else f"known: {', '.join(self._taken)}"
            self.fail(key, f"there is no such key; {known}")
