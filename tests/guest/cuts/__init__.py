"""Power cuts for real: both nodes in QEMU guests, one of them killed at random moments, again and
again (faults 2, 3, 4, 6, 7; I1, I2, I3).

What runs: in the primary's guest the daemon, and through /dev/nbd0 on it an ext4 with a database
and fio; in the secondary's guest the daemon. What is lost when a guest's power is cut: its memory,
so every page that its kernel had not written to the virtio disk, every message not sent, and what
its processes knew. What the virtio disk had taken depends on the fate drawn (``disk.Fate``):

- ``kept``: QEMU is killed and nothing else. Writes that the disk had taken stay, flushed or not,
  because they are in the page cache of the host, which lives on: the disk of this machine has no
  cache of its own to lose, and a write under way may be torn between two pages.
- ``lost`` and ``mixed``: a disk with a volatile cache. Of the writes behind its last flush none is
  left, or of each the whole, some of its sectors, or nothing, in any combination.

What is known outside the guests: the rows whose COMMIT had returned and the files whose fsync had
(the promise). After each cut:

- the primary boots, recovers, its ext4 passes e2fsck, the database its integrity check, the rows
  are 1, 2, 3, ... without a gap, and all that was promised is there;
- a secondary that lost its primary (it lives on, or was cut itself and comes back alone) holds an
  ext4 of its own that passes the same, its rows are a prefix, and it has every record that it had
  acknowledged as durable;
- once they are connected again both facets become equal bit for bit.

``python -m tests.guest.cuts --cuts 30 --side primary``: see ``__main__``. The modules: ``disk``,
``machine`` (a guest and its disks), ``agent`` and ``load`` (inside the guest), ``image`` (a facet
judged on the host), ``pair`` (two machines and what is promised), ``campaign`` (what is drawn).
"""
