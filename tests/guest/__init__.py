"""A real kernel's NBD client, real filesystems, a real power cut: tests in a throw-away QEMU guest.

``kernel`` fetches Debian's kernel package, ``initrd`` packs the start, ``init.sh`` brings the guest
up, ``guest`` runs a script of ``jobs/`` in it. By hand: ``python -m tests.guest jobs/hello.sh``.
"""
