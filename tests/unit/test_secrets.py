"""Files with secrets: whose, how open, how long; and that no message holds what is in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdmirror.edge.secrets import check_secret, read_secret, resolve
from nbdmirror.errors import ConfigError

SECRET = "f" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "secret"
    made.write_text(f"\n{SECRET}\n")
    made.chmod(0o600)
    return made


def test_read(path: Path) -> None:
    assert read_secret(str(path)) == SECRET.encode()
    path.chmod(0o400)
    assert read_secret(str(path)) == SECRET.encode()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o777])
def test_open_to_others(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}") as caught:
        check_secret(str(path))
    assert caught.value.hint == f"chmod 600 {path}"
    assert SECRET not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away: needs root")
def test_of_somebody_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(path, 12345, -1)
    check_secret(str(path))  # root checks for others
    monkeypatch.setattr(os, "geteuid", lambda: 999)
    with pytest.raises(ConfigError, match="uid 12345"):
        check_secret(str(path))


@pytest.mark.parametrize("content", ["", "tiny!", "x" * 31, "x" * 70_000])
def test_length(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(ConfigError, match="at least 32") as caught:
        read_secret(str(path))
    assert not content or content not in str(caught.value)


def test_missing_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        read_secret(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="not a regular file"):
        read_secret(str(tmp_path))


def test_credentials(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service manager guards their directory: group bits there are its ACL."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match="no credentials"):
        resolve("credential:secret")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(path.parent))
    path.chmod(0o440)
    assert read_secret("credential:secret") == SECRET.encode()
    path.chmod(0o444)
    with pytest.raises(ConfigError, match="others can read"):
        read_secret("credential:secret")
