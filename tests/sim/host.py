"""A machine of a run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nbdmirror.codec import slots
from nbdmirror.codec.mark import Mark
from nbdmirror.config import Config
from nbdmirror.engine.node import Node
from nbdmirror.engine.volume import Volume
from nbdmirror.errors import FormatError
from tests.sim.clock import SimClock
from tests.sim.disk import SimDisk
from tests.sim.loop import Incarnation
from tests.sim.oracle import Violation

if TYPE_CHECKING:
    from tests.sim.world import World


class Host:
    """A machine that runs one node: its disk outlives the node's lives."""

    def __init__(self, world: World, name: str, config: Config, role: str) -> None:
        self.world = world
        self.name = name
        self.config = config
        self.role = role
        self.life = Incarnation(name)
        self.gone: asyncio.Future[None] = world.loop.create_future()
        self.waiting: dict[asyncio.Future[None], None] = {}
        """Those of the world who wait for work in this life: they hear of its end."""
        self.node: Node | None = None
        """The node while it serves."""
        self.coming: Node | None = None
        """The one that was started last, though it may not be up yet."""
        self.end_seq = 0
        """How far its log went when it said that it had started."""
        self.early: list[Mark] = []
        """What it marked by itself before anybody could write."""
        self.created = False
        self.lost_power = False
        self.restored = self.swapped = False
        """A snapshot was restored on it, as a secondary (V14)."""
        self.forked = False
        """The last start began a new line of history: the log, or its end, was lost."""
        self.memory_gone = False
        """What its log had in memory went with its process, and no start has said so yet: one may
        have noted it, and died."""
        self.unsynced_lost = False
        """Since its last start a facet lost what was not synced, and no other is sure to have it:
        without a redo it is gone. A start that was cut may have trusted that facet again."""
        self.starting = False
        self.stopping = False
        self.failed: str | None = None
        self.sources = [volume.facets[0] for volume in config.volumes]
        """A facet of each volume that was in service when the node last stopped."""
        self.leaned = False
        self.replaced = 0
        self.disk: SimDisk
        self.clock: SimClock
        self.new_disk()

    def new_disk(self) -> None:
        """A disk with nothing on it."""
        self.disk = SimDisk(
            self.name, f"{self.world.seed}:{self.replaced}", timing=self.world.options.timing
        )
        self.disk.exclusive = True
        self.disk.add_directory("/logs")  # for what a person puts there
        for volume in self.config.volumes if self.world.options.devices else ():
            for path in volume.facets:
                self.disk.add_block_device(path, volume.size)
        self.clock = SimClock(self.world.loop, self.disk)

    @property
    def alive(self) -> bool:
        """Whether a process runs."""
        return self.life.alive and (self.node is not None or self.starting or self.stopping)

    @property
    def leaning(self) -> bool:
        """Whether a volume has no facet here, as people know from its last status, or soon will,
        its disks being gone: nobody then throws away, or restores, what another node has (M11)."""
        if self.node is None:
            return self.leaned
        there = [[facet.path for facet in v.in_service()] for v in self.node.volumes]
        return any(self.disk.broken.issuperset(paths) for paths in there)

    @property
    def set_back(self) -> bool:
        """Whether people have restored something on it (V14), or given it a new disk that is not
        filled yet: it does not have what the primary may believe."""
        upstream = self.node.store.state["upstream"] if self.node is not None else None
        filled = bool(upstream and upstream["consistent"])
        return self.restored or (self.replaced > 0 and not filled)

    def look_for_memory(self) -> None:
        """Before a start: whether the log was in memory when the process ended."""
        content, size = self.disk.content("/state/superblock"), slots.SLOT_SIZE
        with contextlib.suppress(FormatError):
            _, _, state = slots.choose([content[:size], content[size:]])
            gone = bool(state.get("log_spill")) and not state["clean"]
            self.memory_gone = self.memory_gone or gone

    def paths(self) -> list[list[str]]:
        """The facets of each volume."""
        return [list(volume.facets) for volume in self.config.volumes]

    @property
    def lost_unnoted(self) -> bool:
        """A sync of its log may have lost records, and one of its superblock the note of that: no
        start can tell what is missing there from damage (O16)."""
        fired = self.disk.fired
        return sum(fired[kind] for kind in fired if kind.startswith("sync lose")) > 1

    def local(self) -> list[bytes | None]:
        """What the first facet of each volume that is in service holds now; None: there is none."""
        volumes: Sequence[Volume] = self.node.volumes if self.node is not None else ()
        found: list[bytes | None] = []
        for index, volume in enumerate(self.config.volumes):
            path: str | None = self.sources[index]
            if volumes:
                path = next((facet.path for facet in volumes[index].in_service()), None)
            found.append(None if path is None else self.disk.content(path)[: volume.size])
        return found

    def images(self) -> list[bytes]:
        """The same, where each volume has one."""
        found = [image for image in self.local() if image is not None]
        if len(found) < len(self.config.volumes):
            raise Violation(f"{self.name} has a volume with no facet in service")
        return found
