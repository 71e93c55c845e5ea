"""What a seed stands for: the sizes, rates and faults of one run, drawn before it begins.

A swarm: every run has some kinds of faults and lacks others, so that one kind does not always
hide what another would have shown.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from nbdmirror.codec import mappage
from tests.sim.faults import Timing

KIB = 1024

LINK_FAULTS = ("cut", "one-way cut", "reset", "net stall", "slow link")
NODE_FAULTS = (
    "power a",
    "power b",
    "power both",
    "kill a",
    "kill b",
    "stop a",
    "stop b",
    "suspend a",
    "suspend b",
    "die starting",
    "stop and power",
)
DISK_FAULTS = (
    "disk stall",
    "sync error a",
    "sync error b",
    "sync loss b",
    "write error b",
    "facet error",
    "facet error",
    "facet lost",
)
ADMIN_FAULTS = (
    "pause",
    "resync",
    "full resync",
    "verify",
    "clock jump",
    "facet offline",
    "facet replace",
    "log replace",
)
FAULTS = LINK_FAULTS + NODE_FAULTS + DISK_FAULTS + ADMIN_FAULTS
"""What is drawn; "sync loss and kill a", "log error" and "facet online" happen only where an aim
asks for them (``mutation.AIMS``)."""

MOMENTS = ("overflow", "handshake", "connected", "consistent", "synchronised", "started")
"""Events of a node that a fault may follow at once."""

SMALL = {"codec.slots.SLOT_SIZE": 64 * KIB}
"""Of what every start reads and every creation writes: less of it, for nothing depends on it."""


@dataclass(frozen=True, slots=True)
class Options:
    """One run, but for what happens by chance within it."""

    sizes: tuple[int, ...]
    cell: int
    region: int
    extent: int
    facets: int
    remotes: int
    log_size: int
    remote_log_size: int
    on_full: str
    compression: str
    window: int
    timing: Timing
    constants: dict[str, int | float]
    shuffle: bool
    clients: int
    operations: int
    write_cells: int
    hot_cells: int
    pause: float
    fua: float
    flush: float
    clear: float
    faults: dict[str, float]
    fault_gap: float
    mode: str = "async"
    """Of the remotes."""
    on_link_loss: str = "continue"
    last_facet: bool = False
    """The last facet of a volume may fail too: a remote stands in for it (M11)."""
    spill: int = 0
    """Bytes of the primary's log that are kept in memory; 0: all of it goes to the file."""
    mode_changes: bool = False
    """A person may change the log's mode before each start of the primary."""
    moments: float = 0.0
    """How likely a node that reports something loses its power soon after."""
    moments_of: tuple[str, ...] = MOMENTS
    moments_do: tuple[str, ...] = ("power", "power", "kill")
    """What happens to it: these, "stop", or "reset" of its link."""
    moments_delay: tuple[float, ...] = (0.0005, 0.005, 0.05)
    """... within so many seconds."""
    snapshot_gap: float = 0.0
    """Seconds between what people do with snapshots; 0: nothing."""
    snapshots_max: int = 64
    snapshot_space: int | None = None
    restores: float = 0.25
    """How likely what is done with a snapshot on the primary is to restore from it ..."""
    restores_alone: float = 0.4
    """... and on a secondary."""
    inscribe: float = 0.08
    """How likely what is done with a snapshot is to write into it (V9)."""
    beside: float = 0.04
    """How likely what people do is to change a facet by itself, and to say so (V13)."""
    rot: float = 0.1
    """How likely something rots at the end, for a verify to find and to repair."""
    hot_extents: int = mappage.SLOTS
    """As few as there may be, or two sectors of them."""
    astray: float = 0.6
    """How likely a disk then loses, or misplaces, a write that it said it had made."""
    held: float = 0.0
    """Seconds between what holds back secondaries, or lets go of them; 0: nothing does (V8)."""
    devices: bool = False
    """Facets are block devices: of fixed size, without holes, and nothing tells one from another.
    """
    replaces: float = 0.3
    """How likely a secondary whose disk failed gets a new one."""


def draw(seed: int) -> Options:
    """The options of a seed."""
    rng = random.Random(f"{seed}:options")
    odd = rng.random() < 0.12
    cell = 32 if odd else 512
    region = rng.choice([4, 4, 8, 16]) * KIB
    regions = rng.choice([4, 8, 8] if odd else [8, 16, 32])
    sizes = tuple(
        region * regions - (rng.randrange(4) * cell if rng.random() < 0.3 else 0)
        for _ in range(rng.choice([1, 1, 2, 3]))
    )
    log_size = rng.choice([44, 44, 44, 68, 68, 132, 260, 1028]) * KIB
    options = Options(
        sizes=sizes,
        cell=cell,
        region=region,
        # Many small extents: the active map has 61 slots at least and must be made to evict.
        extent=rng.choice([1, 2, 4, 16]) * KIB,
        facets=rng.choice([1, 1, 1, 2, 2, 3]),
        remotes=2 if rng.random() < 0.15 else 1,
        log_size=log_size,
        remote_log_size=max(log_size, rng.choice([68, 260]) * KIB),
        on_full=rng.choice(["dcm", "dcm", "dcm", "block"]),
        compression=rng.choice(["off", "off", "lz4"]),
        window=rng.choice([4, 64, 8192]) * KIB,
        timing=_timing(rng),
        constants=_constants(rng),
        shuffle=rng.random() < 0.1,
        clients=rng.choice([1, 2, 4]),
        operations=rng.choice([8, 16, 32, 64]),
        write_cells=rng.choice([1, 4, 16, 40]),
        hot_cells=rng.choice([16, 64, 1 << 30, 1 << 30]),
        pause=rng.choice([0.0, 0.002, 0.02, 0.2]),
        fua=rng.choice([0.0, 0.05, 0.3]),
        flush=rng.choice([0.02, 0.1, 0.3]),
        clear=rng.choice([0.0, 0.05, 0.2]),
        faults=_faults(rng),
        fault_gap=rng.choice([0.01, 0.05, 0.3, 3.0]),
        moments=rng.choice([0.0, 0.0, 0.0, 0.1, 0.3]),
        mode=rng.choice(["async", "async", "async", "sync"]),
        on_link_loss=rng.choice(["continue", "hold", "fail"]),
    )
    if rng.random() < 0.4:
        options = replace(options, last_facet=True)
    options = storm(options, rng) if rng.random() < 0.08 else options
    if random.Random(f"{seed}:sectors").random() < 0.15:
        options = replace(options, hot_extents=2 * mappage.SLOTS)
    if random.Random(f"{seed}:devices").random() < 0.15:
        options = replace(options, devices=True)
    holding = random.Random(f"{seed}:held")
    if holding.random() < 0.15:
        options = replace(options, held=holding.choice([0.02, 0.2, 1.0]))
    options = _spill(options, random.Random(f"{seed}:spill"))
    return _snapshots(options, random.Random(f"{seed}:snapshots"))


def _spill(options: Options, rng: random.Random) -> Options:
    if rng.random() < 0.7:
        return options
    threshold = rng.choice([4, 8, 16, 32, 64, 1024]) * KIB
    spill = min(threshold, options.log_size)
    return replace(options, spill=spill, mode_changes=rng.random() < 0.25)


def _snapshots(options: Options, rng: random.Random) -> Options:
    if rng.random() < 0.5:
        return options
    return replace(
        options,
        snapshot_gap=rng.choice([0.01, 0.05, 0.3, 2.0]),
        snapshots_max=rng.choice([2, 5, 64]),
        snapshot_space=rng.choice([None, None, 40 * KIB, 200 * KIB]),
    )


def storm(options: Options, rng: random.Random | None = None) -> Options:
    """Overflows, evictions from the active map and power losses close to each other: each alone
    is covered by the other two."""
    rng = rng or random.Random(0)
    return replace(
        options,
        sizes=(256 * KIB,),
        cell=512,
        region=4 * KIB,
        extent=KIB,
        facets=1,
        log_size=rng.choice([44, 68]) * KIB,
        remote_log_size=260 * KIB,
        on_full="dcm",
        clients=4,
        operations=200,
        write_cells=2,
        hot_cells=1 << 30,
        pause=rng.choice([0.002, 0.02]),
        clear=0.0,
        timing=Timing(sync=(0.0001, 0.004)),
        faults={"cut": 1.0, "slow link": 1.0},
        fault_gap=rng.choice([0.1, 0.3]),
        moments=0.5,
        moments_of=("overflow",),
        last_facet=False,
    )


def unchanged(options: Options) -> Options:
    """As drawn."""
    return options


def pairs(options: Options) -> Options:
    """Two local facets and two remotes, of which any may fail at any moment, and any local one
    together with any remote (M15); what else happens is as drawn."""
    fails = dict.fromkeys(("facet error", "facet offline", "cut", "kill b", "sync error b"), 2.0)
    return replace(options, facets=2, remotes=2, faults={**options.faults, **fails})


def _timing(rng: random.Random) -> Timing:
    sync = rng.choice([(0.0001, 0.001), (0.0001, 0.004), (0.001, 0.03), (0.00001, 0.2)])
    write = rng.choice([(0.00001, 0.0005), (0.00001, 0.0005), (0.001, 0.05)])
    return Timing(sync=sync, write=write, miss=rng.choice([0.0, 0.0, 0.2]))


def _constants(rng: random.Random) -> dict[str, int | float]:
    """Bounds of the engine that only large volumes would reach."""
    return {
        **SMALL,
        "engine.log.RECENT_BYTES_MAX": rng.choice([32 << 20, 16 * KIB, 1]),
        "engine.log.READ_BYTES": rng.choice([256 * KIB, 8 * KIB]),
        "engine.session.FRAME_BYTES": rng.choice([1, 4 * KIB, 16 * KIB]),
        "engine.session.LINGER_SECONDS": rng.choice([0.0, 0.002]),
        "engine.facetcopy.COPY_BYTES": rng.choice([4 * KIB, 16 * KIB, 1 << 20]),
        "engine.facetcopy.SYNC_BYTES": rng.choice([4 * KIB, 64 << 20]),
        "engine.rescue.READ_ERRORS_MAX": rng.choice([2, 32]),
        "engine.copier.COPY_BYTES": rng.choice([4 * KIB, 16 * KIB, 1 << 20]),
        "engine.copier.YIELDING_BYTES": rng.choice([4 * KIB, 128 * KIB]),
        "engine.copier.HASHED_COST": rng.choice([4, 1]),
        "engine.housekeeper.INTERVAL_SECONDS": rng.choice([0.1, 1.0, 5.0]),
    }


def _faults(rng: random.Random) -> dict[str, float]:
    count = rng.choice([0, 1, 2, 3, 4, 6, 8])
    return {kind: rng.choice([1.0, 1.0, 4.0]) for kind in rng.sample(FAULTS, count)}


@contextmanager
def constants(values: dict[str, int | float]) -> Iterator[None]:
    """Sets constants of the product (``layer.module.NAME``) for one run."""
    saved = []
    for name, value in values.items():
        module_name, _, attribute = name.rpartition(".")
        module = importlib.import_module(f"nbdmirror.{module_name}")
        saved.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, attribute, old in saved:
            setattr(module, attribute, old)
