# Issue C's bar: a mounted ext4 on a volume with two local facets and two remotes, busy all the
# time, notices nothing while the host takes away one of each, and then the other of each.
# PORT, EXPORT: the primary's. TREE: the project.
# The host answers: lose-first (a remote is killed, a facet's disk is full), mend (both are back),
# lose-second (the other remote, the other facet), in-sync (everything is back, and is compared).
# shellcheck shell=bash

modprobe nbd nbds_max=1 max_part=0 || fail "no nbd module"
modprobe -q ext4
nbd-client -N "$EXPORT" -C 4 10.0.2.2 "$PORT" /dev/nbd0 || fail "nbd-client"
mkfs.ext4 -qF /dev/nbd0 || fail "mkfs"
mkdir -p /tmp/mount
mount -o discard /dev/nbd0 /tmp/mount || fail "mount"

exercise() {
    "$PYTHON" -B "$TREE/tests/guest/exerciser.py" "/tmp/mount/exercised$1" /tmp/stop "$1" > "/tmp/exercised$1" 2>&1
}
exercise 1 &
first=$!
exercise 2 &
second=$!
verify() {
    fio --name="verified$1" --directory=/tmp/mount --size=12m --rw=randwrite --bs=4k-64k \
        --ioengine=psync --verify=crc32c --verify_fatal=1 --do_verify=1 --end_fsync=1 \
        --output=/tmp/fio || fail "fio: $(cat /tmp/fio)"
    say "fio verified, time $1"
}
verify 1
host lose-first &
losing=$!
verify 2
wait $losing || fail "lose-first"
verify 3
host mend || fail "mend"
verify 4
host lose-second || fail "lose-second"
verify 5
touch /tmp/stop
wait $first || fail "$(cat /tmp/exercised1)"
wait $second || fail "$(cat /tmp/exercised2)"
say "$(cat /tmp/exercised1) and $(cat /tmp/exercised2) operations"
umount /tmp/mount || fail "umount"
e2fsck -fn /dev/nbd0 > /tmp/fsck 2>&1 || fail "fsck: $(tail -20 /tmp/fsck)"
blockdev --flushbufs /dev/nbd0
nbd-client -d /dev/nbd0 || fail "nbd-client -d"
host in-sync || fail "the copies differ"
no_io_error
