"""The little of QEMU's monitor protocol that it takes to watch a mirror job, or to halt a guest."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0
Json = dict[str, Any]


class Qmp:
    """A client of one monitor socket; commands one at a time, events kept in order."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        self._events: list[Json] = []
        assert "QMP" in self._receive()
        self.execute("qmp_capabilities")

    def _receive(self) -> Json:
        line = self._lines.readline()
        assert line, "the monitor hung up"
        message: Json = json.loads(line)
        return message

    def execute(self, command: str, **arguments: object) -> Any:
        """Runs a command; AssertionError with the monitor's words if it fails."""
        names = {key.replace("_", "-"): value for key, value in arguments.items()}
        request = {"execute": command, "arguments": names}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._receive()
            if "event" in message:
                self._events.append(message)
                continue
            assert "return" in message, f"{command}: {message}"
            return message["return"]

    def wait_event(self, name: str) -> Json:
        """The next event of that name, past or to come."""
        while True:
            while self._events:
                event = self._events.pop(0)
                if event["event"] == name:
                    return event
            self._events.append(self._receive())

    def close(self) -> None:
        """Hangs up."""
        self._lines.close()
        self._socket.close()
