# How many transactions a second a database commits on an ext4 on each server that the host starts,
# one after the other, over one connection. TREE: the project. SECONDS_EACH: of a measurement.
# The host answers: next (starts a server, and prints its port; nothing if all had their turns),
# committed COUNT (in that time; ends it).
# shellcheck shell=bash

modprobe nbd nbds_max=1 max_part=0 || fail "no nbd module"
modprobe -q ext4
mkdir -p /tmp/mount
cd "$TREE" || fail "no tree"
bank() { exec "$PYTHON" -B -m tests.faults.bank "$@"; }
count() { tail -n 1 /tmp/work; }

while port=$(host next) && [ -n "$port" ]; do
    nbd-client -N data 10.0.2.2 "$port" /dev/nbd0 || fail "nbd-client"
    mkfs.ext4 -qF -J size=4 /dev/nbd0 || fail "mkfs"
    mount /dev/nbd0 /tmp/mount || fail "mount"
    (bank create /tmp/mount/bank) || fail "create"
    : > /tmp/work
    (bank work /tmp/mount/bank >> /tmp/work) &
    load=$!
    until [ -s /tmp/work ]; do
        kill -0 $load || fail "nothing is committed"
        sleep 0.1
    done
    before=$(count)
    sleep "$SECONDS_EACH"
    after=$(count)
    kill -KILL $load
    wait $load
    umount /tmp/mount || fail "umount"
    nbd-client -d /dev/nbd0 || fail "nbd-client -d"
    no_io_error
    host committed $((after - before)) || fail "the host"
done
