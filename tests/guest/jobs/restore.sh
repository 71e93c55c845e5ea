# A damaged filesystem is restored from a snapshot, while it is attached here and the snapshot is
# mounted (V9, V11, V12). PORT: the primary's; PORT2: the secondary's. /dev/vda: its facet.
# The host answers: snapshot (takes one), restore (first refused, then done while attached),
# copied (waits until the copy behind has ended), in-sync (waits for it, compares the facets).
# shellcheck shell=bash

modprobe nbd nbds_max=3 max_part=0 || fail "no nbd module"
modprobe -q ext4
attach() {
    nbd-client -N "$1" "$2" 10.0.2.2 "$3" "$4" > /tmp/attach 2>&1 ||
        fail "nbd-client $1: $(cat /tmp/attach)"
}
attach data -persist "$PORT" /dev/nbd0
mkfs.ext4 -qF /dev/nbd0 || fail "mkfs"
mkdir -p /tmp/volume /tmp/snapshot /tmp/remote
mount /dev/nbd0 /tmp/volume || fail "mount"
tar -C /usr/share/zoneinfo -cf - Europe | tar -C /tmp/volume -xf - || fail "tar"
cd /tmp/volume || fail "cd"
find . -type f -print0 | sort -z | xargs -0 sha1sum > /tmp/sums
cd /
sync -f /tmp/volume
host snapshot || fail "no snapshot"
say "$(wc -l < /tmp/sums) files, a snapshot of them"

# The snapshot, mounted from both nodes: it was taken of a mounted filesystem, so its journal is
# replayed where it may be written into, and left alone where not.
attach data@1 -persist "$PORT" /dev/nbd1
mount /dev/nbd1 /tmp/snapshot || fail "the snapshot does not mount"
touch /tmp/snapshot/written || fail "the snapshot is not writable"
sync -f /tmp/snapshot
attach data@1 -persist "$PORT2" /dev/nbd2
mount -o ro,noload /dev/nbd2 /tmp/remote || fail "the secondary's snapshot does not mount"
same() {
    (cd "$1" && sha1sum --quiet -c /tmp/sums) || fail "the files in $1 differ"
}
same /tmp/snapshot
same /tmp/remote
umount /tmp/snapshot || fail "umount of the snapshot"
nbd-client -d /dev/nbd1 > /tmp/attach 2>&1 || fail "detach"
say "the snapshot is mounted from the secondary, was from the primary"

# Damage by hand: files first, then whole block groups, under the mounted filesystem.
rm -r /tmp/volume/Europe/[A-L]*
dd if=/dev/urandom of=/tmp/volume/garbage bs=1M count=8 conv=fsync 2> /dev/null || fail "dd"
umount /tmp/volume || fail "umount"
dd if=/dev/urandom of=/dev/nbd0 bs=64k count=160 conv=fsync 2> /dev/null || fail "damage"
! mount /dev/nbd0 /tmp/volume 2> /dev/null || fail "what was damaged still mounts"
say "damaged: it does not mount"

host restore || fail "no restore"
blockdev --flushbufs /dev/nbd0
mount /dev/nbd0 /tmp/volume || fail "what was restored does not mount"
same /tmp/volume
[ -e /tmp/volume/written ] || fail "what was written into the snapshot is not restored"
[ ! -e /tmp/volume/garbage ] || fail "the garbage is back"
say "restored, mounted, whole, while the copy runs behind"
echo after > /tmp/volume/after
sync -f /tmp/volume
host copied || fail "the copy does not end"
same /tmp/volume
umount /tmp/volume || fail "umount"
e2fsck -fn /dev/nbd0 > /tmp/fsck 2>&1 || fail "fsck: $(tail -20 /tmp/fsck)"
nbd-client -d /dev/nbd0 > /tmp/attach 2>&1 || fail "detach"
echo 3 > /proc/sys/vm/drop_caches
same /tmp/remote
umount /tmp/remote || fail "umount of the secondary's snapshot"
nbd-client -d /dev/nbd2 > /tmp/attach 2>&1 || fail "detach"
host in-sync || fail "the facets differ"

blockdev --flushbufs /dev/vda
e2fsck -fn /dev/vda > /tmp/fsck 2>&1 || fail "fsck of the secondary: $(tail -20 /tmp/fsck)"
mount -o ro /dev/vda /tmp/volume || fail "the secondary's facet does not mount"
same /tmp/volume
[ "$(cat /tmp/volume/after)" = after ] || fail "the secondary lacks what was written afterwards"
umount /tmp/volume
say "the secondary followed"
no_io_error
