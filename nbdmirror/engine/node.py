"""A node: opens its state, recovers, takes its role, serves, stops. What the simulator boots too.

Holds the parts together and knows their order; what each does is theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from nbdmirror.config import Config
from nbdmirror.engine.activemap import ActiveMapFile
from nbdmirror.engine.agreement import agree
from nbdmirror.engine.control import PeerUid
from nbdmirror.engine.create import MARK, log_path, snapshot_directory
from nbdmirror.engine.doors import Doors
from nbdmirror.engine.doubt import mark_doubtful
from nbdmirror.engine.events import EventLog
from nbdmirror.engine.export import ExportServer
from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.facetcommands import FacetCommands
from nbdmirror.engine.facets import Facets
from nbdmirror.engine.follower import Follower
from nbdmirror.engine.group import Group
from nbdmirror.engine.housekeeper import Housekeeper
from nbdmirror.engine.logloss import LogKeeper, open_log
from nbdmirror.engine.opening import open_volumes
from nbdmirror.engine.primary import Primary
from nbdmirror.engine.recovery import Recovered, forget_oldest, note_end, redo
from nbdmirror.engine.rejoin import rejoin
from nbdmirror.engine.rescue import Rescue
from nbdmirror.engine.restorer import Restorer
from nbdmirror.engine.secondary import Secondary
from nbdmirror.engine.snapshotcommands import SnapshotCommands
from nbdmirror.engine.snapshotexport import SnapshotExports
from nbdmirror.engine.snapshots import Snapshots
from nbdmirror.engine.spill import may_spill
from nbdmirror.engine.status import facets_of, status_of
from nbdmirror.engine.store import Store
from nbdmirror.engine.volume import Volume
from nbdmirror.engine.waiting import wait_until
from nbdmirror.errors import DiskFailed, NbdmirrorError, Refused, StateError
from nbdmirror.ports import Env

STOP_SECONDS = 30.0
"""Requests in flight get so long to finish when the node stops."""


class Node:
    """One running node. ``start``, then ``stop``; ``failed`` tells the daemon to end."""

    def __init__(
        self,
        env: Env,
        config: Config,
        *,
        peer_uid: PeerUid = lambda t: None,
        owners: Sequence[int] | None = None,
    ) -> None:
        """``owners``: the users who may change something by the admin socket; None: everybody."""
        self.env = env
        self.config = config
        self.events = EventLog(env.clock, config.limits.events_max)
        self.failed: asyncio.Future[NbdmirrorError] | None = None
        self.doors = Doors(env, config, self.events, peer_uid, owners)
        self.primary: Primary | None = None
        self.secondary: Secondary | None = None
        self.restorer: Restorer | None = None
        self.facets: Facets | None = None
        self._facet_commands: FacetCommands | None = None
        self.started_at = 0.0

    # -- start -------------------------------------------------------------------------------

    async def start(self, *, nbd: bool = True) -> None:
        """Recovers, and serves from the return on. ``nbd``: with the native NBD listeners.

        StateError or DiskFailed say what keeps it from serving; OSError or ConfigError that it
        cannot listen, after which it has stopped cleanly."""
        loop = asyncio.get_running_loop()
        self.started_at = loop.time()
        self.failed = loop.create_future()
        disk, directory = self.env.disk, self.config.state_dir
        self._check_created()
        self.store = Store.open(disk, directory)
        agree(disk, self.store.state, self.config, copied=self.store.copied)
        self.volumes = open_volumes(disk, self.store)
        self.log = open_log(disk, self.config, self.store.state)
        self.snapshots = Snapshots(
            disk,
            snapshot_directory(self.config),
            self.volumes,
            self.store,
            self.events,
            self.env.random,
            self.config.snapshots,
        )
        self.snapshots.shortage = self.doors.room.shortage
        await self.store.settle()
        await disk.sync_directory(directory)  # its creation may not have come to that (O18)
        Restorer.prepare(self)
        await self.snapshots.open()
        self._follower = Follower(self.snapshots)
        boot_id, before = self.env.clock.boot_id(), self._follower.redo
        try:
            recovered = await redo(self.store, self.log, self.volumes, boot_id, before)
        except DiskFailed:
            await self._note_failed_log()
            raise
        self.snapshots.recovered(recovered.end_seq, redone=not recovered.memory_lost)
        self.housekeeper = Housekeeper(
            self.volumes, self.log, self.store, self.events, self._applied_seq
        )
        self.log.on_failed = self.store.on_failed = self.housekeeper.on_failed = self._fail
        self.housekeeper.facet_lost = self._facet_lost
        self.restorer = Restorer(self)
        await self.restorer.open()
        if self.role == "primary":
            await self._start_primary(recovered)
        else:
            await self._start_secondary(recovered)
        self.restorer.start()
        self.events.emit(
            "started",
            role=self.role,
            clean=recovered.clean,
            power_loss=recovered.power_loss,
            memory_lost=recovered.memory_lost,
            records=recovered.records,
            facets_healed=list(recovered.healed),
        )
        self._tell_damage(recovered)
        self.housekeeper.start()
        self.snapshots.start()
        served = SnapshotExports(self.snapshots)
        self.people = SnapshotCommands(self, served)
        try:
            await self.doors.open(self, self.primary, self.secondary, served, nbd=nbd)
        except (NbdmirrorError, OSError):
            await self.stop()
            raise

    def _check_created(self) -> None:
        directory = self.config.state_dir
        if self.env.disk.exists(f"{directory}/{MARK}"):
            raise StateError(
                f"the creation of {directory} was not finished",
                hint="run nbdmirror create CONFIG --force",
            )

    @property
    def exports(self) -> ExportServer | None:
        """What clients of NBD get; None before anybody may come in."""
        return self.doors.exports

    @property
    def role(self) -> str:
        """``primary`` or ``secondary``."""
        return str(self.store.state["role"])

    def _tell_damage(self, recovered: Recovered) -> None:
        if recovered.lost:
            self.events.emit(
                "log-damaged",
                log=log_path(self.config),
                damaged_seq=recovered.end_seq + 1,
                lost_records_min=recovered.lost,
            )
        if self.store.damaged is not None:
            self.events.emit("superblock-damaged", why=self.store.damaged)
        if self.primary is not None and self.primary.group.active.damaged is not None:
            self.events.emit("active-map-damaged", why=self.primary.group.active.damaged)

    def _applied_seq(self) -> int:
        return self.secondary.applied_seq if self.secondary else self.log.next_seq - 1

    async def _start_primary(self, recovered: Recovered) -> None:
        state, config = self.store.state, self.config
        self._begin_epoch(recovered)
        active = ActiveMapFile.open(
            self.env.disk, config.state_dir, config.log, state.get("active_sectors", 0)
        )
        group = Group(self.volumes, self.log, active, self.env.clock, state["epoch"])
        group.timeline = recovered.timeline
        self.primary = Primary(self.env, config, group, self.store, self.events, self.housekeeper)
        active.safe_seq = self._safe_seq
        active.make_safe = self._make_safe
        self.facets = Facets(group, self.store, self.events, self.env.disk, config.state_dir)
        self._facet_commands = FacetCommands(self.facets, self.env.disk)
        await mark_doubtful(self.store, self.primary.remotes, self.facets, recovered, active)
        await active.settle()
        # From here on a facet that fails goes out of service; who stands in for it goes on.
        self.rescue = Rescue(self.volumes, self.primary.remotes, self.events, self.facets.lost)
        group.goes_on, group.in_reach = self.rescue.goes_on, self.rescue.in_reach
        group.needed = self.rescue.needed
        group.facet_lost = self.housekeeper.facet_lost = self.facets.lost
        self.housekeeper.facets, self.housekeeper.rescue = self.facets, self.rescue
        self.store.begin(self.env.clock.boot_id())
        state["durable_seq"], state["active_sectors"] = self.log.durable_seq, active.map.sectors
        state["log_spill"] = await may_spill(config, self.housekeeper, self.volumes, state)
        # The new epoch is durable before the first append (O10).
        await self.store.save()
        group.need_space = self.housekeeper.need_space
        group.sync_facets = self.housekeeper.sync_facets
        keeper = self.logkeeper = LogKeeper(
            self.log,
            config.log.size,
            self.primary,
            self.facets,
            self.housekeeper,
            self.env.disk,
            config.log.spill_threshold,
        )
        keeper.on_failed = self._fail
        self.log.on_failed, group.log_back = keeper.lost, keeper.back
        group.on_failed = self._fail
        group.on_pressure = self.housekeeper.kick
        keeper.begin()
        self.housekeeper.on_full = config.log.on_full
        self.facets.start()
        self.primary.start()

    def _begin_epoch(self, recovered: Recovered) -> None:
        """A new epoch, and a random id for this run: a secondary that followed a run with another
        id shows that this state was restored from a copy (T6). The caller saves."""
        state = self.store.state
        runs = state.setdefault("runs", [])
        if self.store.damaged is not None:
            # What was lost with the newer slot may have been of the next epoch.
            state["epoch"] += 1
            runs.append([state["epoch"], ""])
        note_end(self.store, recovered)
        state["epoch"] += 1
        runs.append([state["epoch"], f"{self.env.random.getrandbits(64):016x}"])
        forget_oldest(state)

    async def _start_secondary(self, recovered: Recovered) -> None:
        config = self.config
        self.secondary = Secondary(
            config.group,
            config.node,
            self.volumes,
            self.log,
            self.store,
            self.events,
            config.replication,
            self._follower,
            self.env.clock,
        )
        self.secondary.on_failed, self.store.on_failed = self._fail, self.secondary.fail
        if paths := await rejoin(self.env.disk, self.store, self.volumes, self.log):
            self.store.state["rejoined"] = True
            self.events.emit("facets-rejoin", facets=paths)
        self.store.begin(self.env.clock.boot_id())
        self.store.state["log_spill"] = False
        if recovered.lost or self.store.damaged is not None:
            self.secondary.distrust()
        await self.store.save()
        self.secondary.need_space = self.housekeeper.need_space
        self.secondary.start()

    # -- what the parts ask for --------------------------------------------------------------

    def _safe_seq(self) -> int:
        """Writes up to here stand in the log, known to be durable there should it ever be damaged,
        and in every durable DCM."""
        assert self.primary is not None
        return min(self.log.durable_seq, self._safe)

    _safe = 0

    async def _make_safe(self) -> None:
        assert self.primary is not None
        upto = self.log.next_seq - 1
        await self.log.sync(upto)
        await self.log.keep()  # a spilling log: in the file too, for remotes
        await self.logkeeper.make_safe(upto)
        for remote in list(self.primary.remotes):
            await remote.sync_maps()
        assert self.facets is not None
        await self.facets.settle_owed()
        await self.facets.sync_maps()
        self.store.state["durable_seq"] = self.log.kept_seq
        await self.store.save()
        self._safe = upto

    async def _facet_lost(self, volume: Volume, facet: LocalFacet) -> None:
        """On a secondary: its facets are one, so the node ends (``engine.rejoin``)."""
        assert facet.failed is not None and self.secondary is not None
        self.events.emit(
            "facet-failed", volume=volume.name, facet=facet.path, why=facet.failed.message
        )
        self.secondary.fail(facet.failed)

    def _fail(self, error: NbdmirrorError) -> None:
        if self.failed is None or self.failed.done():
            return
        self.failed.set_result(error)
        self.events.emit("failed", why=error.message, hint=error.hint)
        self.housekeeper.fail(error)
        if self.primary is not None:
            self.primary.group.fail(error)

    async def _note_failed_log(self) -> None:
        """Durably: the next start takes it as after a power loss. No success was replied since."""
        if self.log.failed is not None:
            self.store.state["log_failed"] = True
            with contextlib.suppress(DiskFailed):
                await self.store.save()

    # -- stop --------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Stops cleanly: requests finish, everything is durable, and the superblock says so."""
        await self._note_failed_log()
        self.doors.close()
        if self.exports is not None:
            await self.exports.stop(STOP_SECONDS)
        if self.primary is not None:
            await self.primary.stop(for_good=True)
        if self.facets is not None:
            await self.rescue.stop()
            await self.facets.stop()
        await self.doors.end_upstreams()
        if self.secondary is not None:
            await self.secondary.stop()
        if self.restorer is not None:
            await self.restorer.stop()
        await self.snapshots.stop()
        await self.housekeeper.stop()
        await self.doors.end_control()
        if self.failed is None or not self.failed.done():
            try:
                await self._settle()
            finally:
                await self._note_failed_log()
        self._close()

    async def _settle(self) -> None:
        """Everything durable, the log released as far as remotes allow, marked clean."""
        await self.log.sync(self.log.next_seq - 1)
        # Also what was written beside the log: a sync may have lost it, and whoever waited for that
        # was cancelled (O16).
        await self.housekeeper.sync_facets(everything=True)
        if self.primary is not None:
            await self.logkeeper.stop()
        await self.housekeeper.cycle()
        if self.primary is not None:
            await self._make_safe()
            await self.primary.group.active.drop_safe()
        # A failed log may hold a record that nobody was told of: redo decides about it, and brings
        # what has outlived the patience for requests into all facets.
        landed = not any(f.dirty or f.unnoted for v in self.volumes for f in v.facets)
        if self.log.failed is None and landed and all(v.in_service() for v in self.volumes):
            self.store.state.update(clean=True, end_seq=self.log.next_seq - 1)
            await self.store.save()

    def _close(self) -> None:
        if self.primary is not None:
            self.primary.close()
            if self.facets is not None:
                self.facets.close()
            self.primary.group.active.close()
        for volume in self.volumes:
            for facet in volume.facets:
                facet.close()
        if self.restorer is not None:
            self.restorer.close()
        self.snapshots.close()
        self.log.close()
        self.store.close()

    # -- for people (NodeApi) ----------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The status document (``engine.status``)."""
        return status_of(self)

    def _need_primary(self) -> Primary:
        if self.primary is None:
            raise Refused(
                f"{self.config.node} is a secondary: it has no remotes",
                hint="run this on the primary",
            )
        return self.primary

    async def wait(
        self, until: str, remote: str | None, timeout: float | None, seq: int | None = None
    ) -> dict[str, Any]:
        """Returns when the remotes (or this secondary) are ``until``; TimedOut otherwise."""
        await wait_until(self, until, remote, timeout, seq)
        return self.status()

    async def resync(self, remote: str, full: bool) -> dict[str, Any]:
        """Begins a resync now."""
        return await self._need_primary().resync(remote, full)

    async def verify(self, remote: str, repair: bool) -> dict[str, Any]:
        """Begins a verify now, or as soon as the remote is consistent."""
        return await self._need_primary().verify(remote, repair)

    async def pause(self, remote: str) -> None:
        """Ends replication to a remote until ``resume``."""
        await self._need_primary().pause(remote)

    async def resume(self, remote: str) -> None:
        """Goes on with a paused remote."""
        await self._need_primary().resume(remote)

    def remote_list(self) -> list[dict[str, Any]]:
        """The remotes, as in the status; a secondary has none."""
        return self.primary.status() if self.primary is not None else []

    async def remote_add(self, name: str, address: str, mode: str, on_link_loss: str) -> None:
        """Adds a remote while the volumes are in use."""
        primary = self._need_primary()
        self.doors.check_link(address)
        self.doors.check_descriptors(1 + len(self.volumes))  # the link, and a map for each volume
        await primary.add(name, address, mode, on_link_loss)

    async def apply(self, frozen: bool, now: bool = False) -> dict[str, Any]:
        """Freezes or thaws the facets of a secondary (V8); see ``methods``."""
        if self.secondary is None:
            raise Refused(
                f"{self.config.node} is the primary: it has no log to apply",
                hint="run this on a secondary",
            )
        await self.secondary.applier.change(frozen=frozen, delay=0.0 if now else None)
        return self.secondary.applier.status()

    async def facet(self, action: str, path: str, other: str | None = None) -> list[dict[str, Any]]:
        """One of the commands on local facets; returns all facets as in the status."""
        facets = self._need_facets()
        if action in ("add", "replace"):
            self.doors.check_descriptors(2)  # its file and its map
        await facets.do(action, path, other)
        return self.facet_list()

    def facet_list(self) -> list[dict[str, Any]]:
        """The local facets, as in the status, each with its volume; on a secondary too."""
        return facets_of(self)

    async def log_replace(self, path: str) -> dict[str, Any]:
        """Moves the log to a new file, or brings it back to a disk."""
        self._need_primary()
        return await self.logkeeper.replace(path)

    def _need_facets(self) -> FacetCommands:
        if self._facet_commands is None:
            raise Refused(
                f"{self.config.node} is a secondary: its facets follow its log",
                hint="run this on the primary",
            )
        return self._facet_commands

    async def remote_remove(self, name: str) -> None:
        """Forgets a remote."""
        await self._need_primary().remove(name)
