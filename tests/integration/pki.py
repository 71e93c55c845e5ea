"""Certificates for tests, made by ``deploy/nbdmirror-ca`` as a person would make them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

TOOL = Path(__file__).parents[2] / "deploy" / "nbdmirror-ca"


class Authority:
    """One CA in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._run("init", str(directory))

    def _run(self, *args: str, days: int | None = None) -> str:
        env = {**os.environ, **({} if days is None else {"DAYS": str(days)})}
        done = subprocess.run(
            [str(TOOL), *args], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def node(self, name: str, *, group: str = "db", days: int | None = None) -> Path:
        """The directory of a node's certificate, good for 127.0.0.1 as well."""
        self._run("node", str(self.directory), group, name, "127.0.0.1", "localhost", days=days)
        return self.directory / name

    def client(self, name: str, *, days: int | None = None) -> Path:
        """The directory of a client's certificate, with the file names that libnbd knows."""
        self._run("client", str(self.directory), name, days=days)
        return self.directory / name

    def pin(self, certificate: Path) -> str:
        """The digest of its key."""
        return self._run("pin", str(certificate))


def tls_line(node: Path, *, ca: Path | None = None, pins: tuple[str, ...] = ()) -> str:
    """``tls = {...}`` for a node's directory."""
    return (
        f'tls = {{ cert = "{node}/cert.pem", key = "{node}/key.pem", '
        f'client_ca = "{ca or node / "ca.pem"}", pins = {json.dumps(list(pins))} }}'
    )
