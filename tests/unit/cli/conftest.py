"""The node that the command line talks to, and the configuration that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror.cli import waiting
from tests.unit.fake_node import FakeNode, serving

CONFIG = """
group = "db"
node = "alpha"
state_dir = "state"
[nbd]
listen = ["unix:db.nbd"]
[admin]
socket = "db.sock"
[[volume]]
name = "data"
size = "1MiB"
facets = ["data.img"]
[[remote]]
name = "beta"
address = "tcp:192.0.2.2:10810"
[replication]
insecure = true
"""


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def path(tmp_path: Path, node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The socket of a node that is served; the only one in the runtime directory."""
    monkeypatch.setenv("NBDMIRROR_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(waiting, "WAIT_STEP_SECONDS", 0.02)
    with serving(node, tmp_path / "db.sock"):
        yield str(tmp_path / "db.sock")


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "db.toml").write_text(CONFIG)
    return str(tmp_path / "db.toml")
