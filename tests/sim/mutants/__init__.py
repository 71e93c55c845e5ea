"""The product with one rule broken at a time: a campaign that lets a mutant live proves nothing.

The names begin with the rule (an O-number, V-row or invariant) that is dropped. Importing this
package registers them all with ``mutation``.

Not among them, because another rule makes them unobservable:

- each one of the two checks of a scan against records of an ended epoch (the two together are);
- O3 (only durable records are shipped) belongs to reliability.md's protocol W: here every record
  lies in an extent that is durably active, so a primary may ship what it has not synced;
- a secondary that is stopped in the middle of a record: a hole that is being punched is waited for
  by whoever is cancelled (``engine.facet``), and a snapshot that a marker asked for is in the list
  from the step on in which the marker counts as followed, so who applies next finds both;
- what ``Secondary.make_way`` keeps for several copies, ``place`` would keep for each;
- O20 is about roles; its part that there is, the new epoch, is here.
"""

from tests.sim.mutants import (  # noqa: F401
    astray,
    clients,
    facetcommands,
    facets,
    logloss,
    pagecache,
    primary,
    restores,
    resync,
    returns,
    secondary,
    sessions,
    snapshots,
    spill,
    state,
    verify,
)
