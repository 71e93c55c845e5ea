"""The text of the metrics (X4)."""

from __future__ import annotations

from nbdmirror.codec import prometheus
from tests.unit.primary import Primary, primary


def test_a_path_that_is_not_utf8_is_shown_as_it_can_be() -> None:
    """Linux takes any bytes for a name; one of them must not end what is scraped,
    nor be an escape that the format does not have."""

    async def test(world: Primary) -> None:
        status = world.node.status()
        status["volumes"][0]["facets"][0]["path"] = "/srv/\udcff.img"
        assert b'"/srv/\\\\udcff.img"' in prometheus.render(status)

    primary(test)
