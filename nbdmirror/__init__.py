"""nbdmirror: a userspace block device replicator.

Packages, in the direction of their imports (``tests/test_architecture.py`` holds it)::

    errors, config, ports     words, limits and the seams to the world
    codec                     every byte layout, on disk and on the wire; pure
    core                      decisions: maps, ring, ranges, identity, states; no await, no I/O
    engine                    effects in order: the data path, replication, resync; awaits on ports
    edge                      Linux: files, sockets, the daemon, nbdkit, netlink
    cli                       what people type; talks to a daemon through codec.admin

A write, from socket to disk: ``engine.export`` -> ``engine.group`` -> ``engine.log`` and
``engine.facet``; from there to a remote: ``engine.sender`` -> ``engine.receiver``.
"""

__version__ = "0.1.0"
