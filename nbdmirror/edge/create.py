"""``nbdmirror create``: the engine's creation, on this machine."""

from __future__ import annotations

from typing import Any

from nbdmirror.config import Config
from nbdmirror.edge import env as world
from nbdmirror.engine.create import create as engine_create


def create(config: Config, role: str, force: bool) -> dict[str, Any]:
    """Makes the node's state; Refused if there is some and not ``force``."""
    return world.run(engine_create(world.real_env(), config, role, force=force))
