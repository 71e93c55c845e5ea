# The main job (issue point "real input"): /dev/nbd0 over TCP with 4 connections through nbd-client;
# a filesystem on it; real files, fio with verify, sqlite with its journal, while the host cuts the
# link to the secondary until the log overflows into the DCM, and heals it. Afterwards /dev/vda, the
# secondary's facet, must hold the same files. FS: ext4, xfs or btrfs. PORT, EXPORT: the primary's.
# The host answers: cut, tracking (waits until the remote is in DCM logging), heal, in-sync
# (waits for it, and compares the facets), each true or the test fails.
# shellcheck shell=bash

modprobe nbd nbds_max=1 max_part=0 || fail "no nbd module"
modprobe -q "$FS"
nbd-client -N "$EXPORT" -C 4 10.0.2.2 "$PORT" /dev/nbd0 || fail "nbd-client"
say "$FS: attached, $(blockdev --getsize64 /dev/nbd0) bytes"

case $FS in
    ext4) mkfs.ext4 -qF /dev/nbd0 ;;
    xfs) mkfs.xfs -qf /dev/nbd0 ;;
    btrfs) mkfs.btrfs -qf /dev/nbd0 ;;
esac || fail "mkfs.$FS"
mkdir -p /tmp/mount
mount -t "$FS" /dev/nbd0 /tmp/mount || fail "mount"
cd /tmp/mount || fail "cd"
say "mounted"

# A tree of real files, half of it before the cut.
mkdir tree
tar -C /usr/share/zoneinfo -cf - . | tar -C tree -xf - || fail "tar"
mkdir again
sync -f .
say "$(find tree | wc -l) files"
host cut || fail "cut"

tar -C /usr/lib/python3.11 --exclude=__pycache__ -cf - . | tar -C again -xf - || fail "tar"
say "$(find again | wc -l) files more"
fio --name=verified --directory=/tmp/mount --size=16m --rw=randwrite --bs=4k-64k --ioengine=psync \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --end_fsync=1 --output=/tmp/fio || fail "fio: $(cat /tmp/fio)"
say "fio verified"
host tracking || fail "no overflow"
sqlite3 base.db "CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT)" || fail "sqlite create"
fill() {
    for n in $(seq "$1" "$2"); do
        echo "PRAGMA synchronous=EXTRA; BEGIN;"
        echo "INSERT INTO t SELECT $n * 100 + value, hex(randomblob(100)) FROM generate_series(1, 100);"
        echo "COMMIT;"
    done | sqlite3 base.db > /dev/null || fail "sqlite insert"
}
fill 1 10
rm -r tree/[A-E]*
# Writes go on while the remote is brought back.
fill 11 30 &
filler=$!
host heal || fail "heal"
wait $filler || fail "sqlite during the resync"
[ "$(sqlite3 base.db 'PRAGMA integrity_check; SELECT count(*) FROM t')" = $'ok\n3000' ] ||
    fail "sqlite: $(sqlite3 base.db 'PRAGMA integrity_check; SELECT count(*) FROM t')"
say "sqlite is whole"
find . -type f -print0 | sort -z | xargs -0 sha1sum > /tmp/sums
cd /
sync -f /tmp/mount
umount /tmp/mount || fail "umount"

check() {
    case $FS in
        ext4) e2fsck -fn "$1" ;;
        xfs) xfs_repair -n "$1" ;;
        btrfs) btrfs check "$1" ;;
    esac > /tmp/fsck 2>&1 || fail "fsck of $1: $(tail -20 /tmp/fsck)"
}
check /dev/nbd0
blockdev --flushbufs /dev/nbd0
nbd-client -d /dev/nbd0 || fail "nbd-client -d"
say "detached, $(wc -l < /tmp/sums) files in the list"
host in-sync || fail "the facets differ"

# The disk was shown to the guest before it had its content.
blockdev --flushbufs /dev/vda
check /dev/vda
options=ro
[ "$FS" != xfs ] || options=ro,norecovery,nouuid
mount -t "$FS" -o $options /dev/vda /tmp/mount || fail "the secondary's facet does not mount"
cd /tmp/mount || fail "cd"
sha1sum --quiet -c /tmp/sums || fail "the secondary's files differ"
[ "$(find . -type f | wc -l)" = "$(wc -l < /tmp/sums)" ] || fail "the secondary has other files"
cd /
umount /tmp/mount
say "$FS: the secondary has the same files"
no_io_error
