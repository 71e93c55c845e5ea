"""The command line against a real admin socket: output, exit codes, discovery (X4)."""

from __future__ import annotations

import pytest

Output = pytest.CaptureFixture[str]
