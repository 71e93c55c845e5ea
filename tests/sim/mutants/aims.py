"""Aims that several mutants share: options under which their situation is frequent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.sim.faults import Timing
from tests.sim.mutation import Aim, aimed
from tests.sim.options import KIB, Options, storm


def bounded(aim: Aim, **bounds: Any) -> Aim:
    """The same with other bounds of the engine, as ``module__NAME=value``."""
    values = {f"engine.{name.replace('__', '.')}": value for name, value in bounds.items()}

    def bound(options: Options) -> Options:
        options = aim(options)
        return replace(options, constants={**options.constants, **values})

    return bound


DEATHS = aimed(
    faults={"kill a": 1.0, "power a": 3.0, "power both": 1.0, "die starting": 1.0},
    fault_gap=0.5,
    timing=Timing(sync=(0.001, 0.03)),
    clients=4,
    operations=300,
    write_cells=1,
    hot_cells=16,
    pause=0.1,
    flush=0.02,
    last_facet=False,
)
"""One death of the primary after the other, and records of one size: what is left of a former
epoch lies where the next record would."""
RESYNCS = aimed(
    faults={"resync": 1.0, "full resync": 1.0},
    fault_gap=0.1,
    moments=0.5,
    moments_of=("consistent",),
    mode="async",
    clients=4,
    operations=200,
    hot_cells=16,
    pause=0.01,
    last_facet=False,
)
MARKERS = aimed(
    faults={"resync": 1.0, "full resync": 2.0},
    fault_gap=0.15,
    moments=0.7,
    moments_of=("handshake",),
    moments_do=("reset",),
    moments_delay=(0.02, 0.1, 0.2),
    timing=Timing(sync=(0.001, 0.05)),
    snapshot_gap=0.01,
    snapshots_max=64,
    snapshot_space=None,
    restores=0.0,
    clients=4,
    operations=200,
    pause=0.05,
    mode="async",
    last_facet=False,
)
"""Links that are lost while a secondary follows what its log holds of the stream before."""
RESTORES = bounded(
    aimed(
        faults={"facet offline": 2.0, "facet replace": 1.0},
        fault_gap=0.1,
        facets=2,
        timing=Timing(sync=(0.001, 0.02), read=(0.001, 0.02), write=(0.001, 0.05), miss=0.5),
        snapshot_gap=0.03,
        snapshots_max=64,
        snapshot_space=None,
        restores=0.8,
        clients=2,
        operations=150,
        pause=0.05,
        last_facet=False,
    ),
    restore__COPY_BYTES=4 * KIB,
    facetcopy__COPY_BYTES=4 * KIB,
)
"""Restores whose copy takes its time, and facets that come and go meanwhile."""
BESIDE = aimed(
    beside=0.5,
    snapshot_gap=0.1,
    snapshots_max=64,
    snapshot_space=None,
    faults={"power a": 1.0, "kill a": 0.5, "reset": 1.0, "facet offline": 1.0},
    fault_gap=0.5,
    clients=2,
    operations=150,
    pause=0.05,
    mode="async",
    last_facet=False,
)
"""Changes beside the write path, one after the other."""
INSCRIBED = bounded(
    aimed(
        inscribe=0.6,
        beside=0.0,
        restores=0.6,
        snapshot_gap=0.05,
        snapshots_max=64,
        snapshot_space=None,
        timing=Timing(sync=(0.001, 0.02), write=(0.001, 0.05)),
        faults={"power a": 2.0, "kill a": 0.3, "reset": 0.5},
        fault_gap=0.4,
        clients=1,
        operations=100,
        pause=0.05,
        mode="async",
        last_facet=False,
    ),
    restore__COPY_BYTES=4 * KIB,
)
"""Snapshots that are written into and restored, and power that goes while the copy runs."""
LEAVING = aimed(
    beside=0.5,
    facets=2,
    faults={"facet lost": 2.0, "facet error": 1.0, "kill a": 0.2},
    fault_gap=0.2,
    clients=1,
    operations=100,
    pause=0.05,
    mode="async",
    last_facet=False,
)
"""Changes beside the write path, and facets that leave in the middle of them."""
TWO_THERE = aimed(
    facets=2,
    faults={"sync error b": 2.0, "sync loss b": 1.0, "power b": 1.0, "cut": 1.0},
    fault_gap=0.2,
    replaces=0.0,
    operations=64,
    last_facet=False,
)
"""Secondaries with two facets, of which one fails, and may get another disk."""
NEW_DISKS = aimed(
    faults={"write error b": 2.0, "sync error b": 1.0, "cut": 1.0},
    fault_gap=1.0,
    replaces=1.0,
    timing=Timing(sync=(0.001, 0.05)),
    log_size=44 * KIB,
    on_full="dcm",
    mode="async",
    spill=0,
    clients=4,
    operations=300,
    pause=0.05,
    last_facet=False,
)
"""Secondaries that come back with nothing, to a primary whose map has been in use."""
INTERRUPTED = aimed(
    faults={"cut": 1.0, "reset": 2.0, "full resync": 1.0},
    fault_gap=0.2,
    timing=Timing(sync=(0.001, 0.05), write=(0.001, 0.05)),
    log_size=44 * KIB,
    on_full="dcm",
    mode="async",
    spill=0,
    clients=4,
    operations=300,
    pause=0.02,
    last_facet=False,
)
"""Resyncs of what really differs, and links that are lost in the middle of them."""
REWRITTEN = bounded(
    aimed(
        faults={"cut": 1.0, "full resync": 1.0},
        fault_gap=0.2,
        sizes=(256 * KIB,),
        cell=512,
        region=16 * KIB,
        extent=4 * KIB,
        log_size=1028 * KIB,
        remote_log_size=1028 * KIB,
        timing=Timing(read=(0.001, 0.05), miss=0.5),
        mode="async",
        spill=0,
        clients=4,
        operations=400,
        hot_cells=64,
        pause=0.005,
        last_facet=False,
    ),
    copier__COPY_BYTES=4 * KIB,
)
"""Resyncs in order, of regions that take several reads, and that clients write to all the time."""
ALONE = bounded(
    aimed(
        faults={"reset": 0.1},
        fault_gap=3.0,
        timing=Timing(sync=(0.001, 0.1)),
        snapshot_gap=0.02,
        snapshots_max=64,
        snapshot_space=None,
        restores=0.0,
        restores_alone=1.0,
        clients=2,
        operations=100,
        pause=0.1,
        mode="async",
        last_facet=False,
    ),
    restore__COPY_BYTES=4 * KIB,
)
"""Restores on a secondary that its primary has paused, and soon resumes."""
LEANING = bounded(
    aimed(
        faults={"facet error": 1.0},
        fault_gap=0.5,
        facets=1,
        timing=Timing(sync=(0.001, 0.05), miss=0.5),
        snapshot_gap=0.2,
        snapshots_max=64,
        snapshot_space=None,
        restores=0.8,
        clients=2,
        operations=60,
        pause=0.1,
        mode="async",
        spill=0,
        moments=0.0,
        last_facet=True,
    ),
    restore__COPY_BYTES=4 * KIB,
)
"""Restores, and local facets that are lost while they are copied."""
LOST = aimed(
    faults={"facet lost": 3.0, "power a": 2.0, "kill a": 1.0, "cut": 1.0},
    fault_gap=0.3,
    timing=Timing(sync=(0.001, 0.03)),
    sizes=(96 * KIB, 32 * KIB),
    facets=1,
    remotes=1,
    mode="async",
    clients=2,
    operations=100,
    pause=0.1,
    restores_alone=0.0,
    moments=0.0,
    last_facet=True,
)
"""Volumes without a local facet, and power that fails meanwhile."""


def lost_spilled(options: Options) -> Options:
    """The same of a log in memory, with much that is flushed."""
    return replace(LOST(options), spill=8 * KIB, flush=0.3, fua=0.3)


RESTARTS = aimed(
    faults={"kill a": 1.0, "die starting": 3.0},
    fault_gap=0.05,
    timing=Timing(sync=(0.001, 0.05)),
    facets=1,
    clients=2,
    operations=64,
    pause=0.02,
    snapshot_gap=0.0,
    last_facet=False,
)
"""Nodes that die while they save, and again while they start."""
TORN_SAVES = aimed(
    faults={"power a": 1.0, "power b": 1.0, "full resync": 1.0, "cut": 1.0},
    fault_gap=0.1,
    timing=Timing(sync=(0.001, 0.05)),
    log_size=44 * KIB,
    clients=4,
    operations=200,
    pause=0.02,
    mode="async",
    spill=0,
    last_facet=False,
)
"""Much that is saved, and power that fails."""


def unfinished(options: Options) -> Options:
    """Overflows that take their time, because what is pending is read back from the disk, and the
    death of the process in the middle."""
    return replace(
        storm(options),
        timing=Timing(sync=(0.0001, 0.004), read=(0.005, 0.05)),
        moments_do=("kill",),
        moments_delay=(0.1,),
        moments=0.8,
    )


UNFINISHED = bounded(unfinished, log__RECENT_BYTES_MAX=1, log__READ_BYTES=8 * KIB)
FOLLOWERS = bounded(
    aimed(
        faults={"power b": 1.0},
        fault_gap=0.7,
        timing=Timing(sync=(0.001, 0.1)),
        sizes=(64 * KIB,) * 3,
        log_size=44 * KIB,
        remote_log_size=68 * KIB,
        on_full="block",
        snapshot_gap=0.01,
        snapshots_max=64,
        snapshot_space=None,
        restores=0.0,
        restores_alone=0.0,
        beside=0.0,
        clients=4,
        operations=400,
        write_cells=4,
        pause=0.2,
        mode="async",
        remotes=1,
        spill=0,
        last_facet=False,
    ),
    housekeeper__INTERVAL_SECONDS=0.1,
)
"""Secondaries that die while they follow markers, and that save much."""
DELETIONS = aimed(
    faults={"cut": 1.0, "full resync": 1.0},
    fault_gap=1.0,
    timing=Timing(sync=(0.001, 0.05)),
    sizes=(32 * KIB,),
    region=4 * KIB,
    log_size=44 * KIB,
    remote_log_size=260 * KIB,
    on_full="dcm",
    snapshot_gap=0.01,
    snapshots_max=64,
    snapshot_space=None,
    restores=0.0,
    restores_alone=0.0,
    beside=0.0,
    clients=2,
    operations=200,
    write_cells=4,
    pause=0.1,
    mode="async",
    remotes=1,
    spill=0,
    last_facet=False,
)
"""Snapshots that are deleted everywhere while a remote does not read the log, or is behind."""


def waiting(options: Options) -> Options:
    """The same of a remote that is behind, and whose stream begins anew."""
    return replace(
        DELETIONS(options),
        faults={"net stall": 2.0, "reset": 2.0, "full resync": 2.0},
        fault_gap=0.5,
        log_size=1028 * KIB,
        remote_log_size=1028 * KIB,
    )
