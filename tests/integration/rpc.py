"""Requests at a daemon's admin socket.

Used by ``cluster``, and inside guests, where starting must be cheap: imports little.
"""

from __future__ import annotations

import json
import socket
from typing import Any

Json = dict[str, Any]


def ask(path: str, method: str, params: Json, *, seconds: float = 30.0) -> Any:
    """The result of ``method``; AssertionError if the answer is an error."""
    result, _ = _exchange(path, method, seconds, params)
    return result


def events(path: str) -> list[Json]:
    """The events that this run of the daemon has seen."""
    _, notifications = _exchange(path, "events", 30.0, {"follow": False})
    return [one["params"] for one in notifications]


def _exchange(path: str, method: str, seconds: float, params: Json) -> tuple[Any, list[Json]]:
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    notifications = []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(seconds)
        sock.connect(path)
        sock.sendall(json.dumps(request).encode() + b"\n")
        with sock.makefile("rb") as lines:
            while "id" not in (answer := json.loads(lines.readline())):
                notifications.append(answer)
    assert answer["id"] == 1 and "result" in answer, f"{method}: {answer}"
    return answer["result"], notifications
