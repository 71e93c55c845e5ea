"""What a node exports, and to whom: the volumes of a primary, and the snapshots of any node.

Who takes a client in asks it: ``engine.export`` for our own front end, the bridge for nbdkit. It
holds nothing of a client.
"""

from __future__ import annotations

from collections.abc import Mapping

from nbdmirror.codec.nbd import ExportInfo
from nbdmirror.codec.nbdhandshake import Forbidden
from nbdmirror.engine.access import OPEN, Client, Rules
from nbdmirror.engine.blockstatus import ALLOCATION_CONTEXT, DIRTY_CONTEXT
from nbdmirror.engine.group import Group
from nbdmirror.engine.remote import Remote
from nbdmirror.engine.snapshotexport import SnapshotExports, SnapshotVolume, Writer
from nbdmirror.engine.volume import Volume


class Catalogue:
    """The exports of a node."""

    def __init__(
        self,
        group: Group | None,
        remotes: list[Remote],
        snapshots: SnapshotExports,
        rules: Mapping[str, Rules],
    ) -> None:
        """``rules`` by volume name."""
        self.group = group
        self.remotes = remotes
        self.snapshots = snapshots
        self.rules = rules

    def find_for(self, client: Client, name: str) -> ExportInfo | Forbidden | None:
        """The export of that name, as this client finds it."""
        if (volume := self.volume(name)) is None:
            return None
        why = self._refusal(client, volume)
        return self._info(volume) if why is None else Forbidden(why)

    def _refusal(self, client: Client, volume: Volume) -> str | None:
        """Who has departed keeps nobody out, however long its changes wait for a remote."""
        attached = volume.clients - volume.departed
        return volume.closed or self._rules(volume).refusal(client, attached)

    def _rules(self, volume: Volume) -> Rules:
        """What follows an @ names a state of the volume, which is for the same clients."""
        return self.rules.get(volume.name.partition("@")[0], OPEN)

    def exports_for(self, client: Client) -> list[ExportInfo]:
        """What this client may attach."""
        return [self._info(v) for v in self._volumes() if self._refusal(client, v) is None]

    def exports(self) -> list[ExportInfo]:
        """What a client may attach: every volume of a primary, and every snapshot."""
        return [self._info(volume) for volume in self._volumes()]

    def _volumes(self) -> list[Volume]:
        return [*(self.group.volumes if self.group else []), *self.snapshots.all()]

    def volume(self, name: str) -> Volume | None:
        """The volume, or snapshot of one, behind an export name."""
        if "@" in name:
            return self.snapshots.find(name)
        volumes = self.group.volumes if self.group else []
        if not name and volumes:
            return volumes[0]
        return next((v for v in volumes if v.name == name), None)

    def writer(self, volume: Volume) -> Writer | None:
        """What takes the changes of a volume's clients."""
        return volume if isinstance(volume, SnapshotVolume) else self.group

    def _info(self, volume: Volume) -> ExportInfo:
        if isinstance(volume, SnapshotVolume):
            return ExportInfo(
                name=volume.name,
                description=f"nbdmirror snapshot {volume.uuid}",
                size=volume.size,
                read_only=self._rules(volume).read_only or not volume.entry["writable"],
            )
        dirty = tuple(DIRTY_CONTEXT + remote.name for remote in self.remotes)
        return ExportInfo(
            name=volume.name,
            description=f"nbdmirror volume {volume.name}",
            size=volume.size,
            read_only=self._rules(volume).read_only,
            contexts=(ALLOCATION_CONTEXT, *dirty),
        )
