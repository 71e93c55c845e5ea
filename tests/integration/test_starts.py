"""Starts that meet something in their way."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from tests.integration.cluster import Cluster, nbdmirror
from tests.integration.process import free_port

MakeCluster = Callable[..., Cluster]


@pytest.mark.parametrize("frontend", ["native", "nbdkit"])
def test_a_port_that_is_taken_leaves_nothing_behind(
    make_cluster: MakeCluster, frontend: str
) -> None:
    """The next start has nothing to recover, and nobody finds a socket without a daemon."""
    cluster = make_cluster(remotes=(), frontend=frontend)
    node = cluster.primary
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        node.keys["admin"] = [f'metrics = "tcp:127.0.0.1:{taken.getsockname()[1]}"']
        node.write_config()
        cluster.create()
        result = nbdmirror("serve", str(node.config))
    assert result.code == 1 and "in use" in result.err, result
    assert not node.admin_socket.exists()
    node.start()
    (started,) = (event for event in node.events() if event["kind"] == "started")
    assert started["clean"] is True
