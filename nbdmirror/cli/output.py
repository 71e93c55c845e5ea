"""How commands print: JSON, text, and progress that is a bar on a terminal and lines elsewhere.

Owns standard output; messages about failures are ``main``'s. Called by the commands.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from nbdmirror.cli.render import Json, percent, remote_text

PLAIN_SECONDS_MAX = 30.0
_CLEAR_SCREEN = "\x1b[H\x1b[2J"
_CLEAR_LINE = "\r\x1b[K"


def print_json(data: Any) -> None:
    """One document, indented: for people with --json, and for any parser."""
    print(json.dumps(data, indent=2), flush=True)


def print_json_line(data: Any) -> None:
    """One document on one line: for streams."""
    print(json.dumps(data, separators=(",", ":")), flush=True)


def teller(as_json: bool) -> Callable[[Json, str], None]:
    """Prints what happens as it happens: data, one object a line, for --json; else the text."""

    def tell(data: Json, text: str) -> None:
        if as_json:
            print_json_line(data)
        else:
            print(text, flush=True)

    return tell


def print_screen(text: str) -> None:
    """Replaces what the terminal shows."""
    print(_CLEAR_SCREEN + text, flush=True)


def discard_output(stream: TextIO | None = None) -> None:
    """Nobody reads it any more (``None``: stdout): neither what is printed from now on nor the
    flush at the end of the process is to fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def is_terminal() -> bool:
    """Whether what is printed goes to a terminal; a caller may have closed it: >&-"""
    return sys.stdout is not None and sys.stdout.isatty()


class Progress:
    """The progress of remotes: redrawn in place on a terminal; elsewhere a line when a state or
    another tenth is reached, and every half a minute."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._interactive = enabled and is_terminal()
        self._shown: object = None
        self._shown_at = 0.0

    def show(self, remotes: list[Json]) -> None:
        """Shows where these remotes are now."""
        if not self._enabled or not remotes:
            return
        try:
            self._show(remotes)
        except BrokenPipeError:  # who reads has enough; what is waited for goes on
            self._enabled = self._interactive = False
            discard_output()

    def _show(self, remotes: list[Json]) -> None:
        text = "; ".join(map(remote_text, remotes))
        if self._interactive:
            width = shutil.get_terminal_size().columns
            print(_CLEAR_LINE + text[: width - 1], end="", flush=True)
            self._shown = text
            return
        stage = [_stage(remote) for remote in remotes]
        if stage != self._shown or time.monotonic() - self._shown_at >= PLAIN_SECONDS_MAX:
            print(text, flush=True)
            self._shown, self._shown_at = stage, time.monotonic()

    def end(self) -> None:
        """Leaves the terminal's line clean for what is printed next."""
        if self._interactive and self._shown is not None:
            print(_CLEAR_LINE, end="", flush=True)


def _stage(remote: Json) -> tuple[object, ...]:
    resync = remote.get("resync") or {}
    tenth = percent(resync.get("done_bytes", 0), resync.get("total_bytes", 0)) // 10
    return remote.get("link"), remote.get("state"), resync.get("kind"), tenth
