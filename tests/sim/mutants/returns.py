"""Mutants of a local facet's way back (M12, O16, I2, I5)."""

from __future__ import annotations

from nbdmirror.engine.facet import LocalFacet
from nbdmirror.engine.facetmember import Member
from nbdmirror.engine.facets import Facets
from nbdmirror.errors import DiskFailed, FormatError, NbdmirrorError
from tests.sim.mutation import Assign, mutant
from tests.sim.plays.returns import (
    OWED_AND_KILLED,
    READ_WHILE_OUT,
    ROT_IN_WHAT_IT_LACKS,
    WRITTEN_IN_THE_LAST_SYNC,
    WRITTEN_IN_THE_SYNC_OF_REDO,
)


def _synced_though_failed(assign: Assign) -> None:
    original = LocalFacet.sync

    async def sync(self: LocalFacet) -> None:
        before, failures = self.failed, self.failures
        try:
            await original(self)
        except DiskFailed:
            if before is not None or self.failures == failures or "sync" in str(self.failed):
                raise

    assign(LocalFacet, "sync", sync)


mutant("M12 a facet that failed beside a sync is trusted for it", run=WRITTEN_IN_THE_LAST_SYNC)(
    _synced_though_failed
)
mutant(
    "M12 a last facet that failed beside a sync is trusted for it", run=WRITTEN_IN_THE_SYNC_OF_REDO
)(_synced_though_failed)


@mutant("M12 what has left the log is looked for in its active map", run=OWED_AND_KILLED)
def _(assign: Assign) -> None:
    original = Facets.recover

    async def recover(self: Facets, clean: bool, *args: object, **how: object) -> None:
        filled = Member.fill

        def fill(member: Member) -> None:
            if member.saved["since"] is None or not member.owed:
                filled(member)

        setattr(Member, "fill", fill)  # noqa: B010
        try:
            await original(self, clean, *args, **how)  # type: ignore[arg-type]
        finally:
            setattr(Member, "fill", filled)  # noqa: B010

    assign(Facets, "recover", recover)


@mutant("I2 a rotten record keeps a facet out", run=ROT_IN_WHAT_IT_LACKS)
def _(assign: Assign) -> None:
    original = Facets._redo

    async def redo(self: Facets, member: Member) -> bool:
        try:
            return await original(self, member)
        except FormatError as error:
            raise NbdmirrorError(error.message) from None

    assign(Facets, "_redo", redo)


@mutant("O16 who has come back is taken for one that never left", run=READ_WHILE_OUT)
def _(assign: Assign) -> None:
    assign(LocalFacet, "stint", property(lambda self: (None, 0)))
