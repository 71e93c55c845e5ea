# Row X7: `nbdmirror attach` carries a mounted, busy ext4 over SIGKILL and restart of the server,
# without one I/O error. SIZE_MB: how much is written. URI: reached from the guest.
# At last the server is gone for good, and the device given up.
# The host answers: kill (the server, SIGKILL), start (it again), freeze, thaw.
# shellcheck shell=bash

cd "$TREE" || fail "no tree"
nbdmirror() { "$PYTHON" -m nbdmirror "$@"; }
# Waits until the watcher has said $1 in file $2.
await_watcher() {
    until grep -q "$1" "$2"; do
        kill -0 $watcher || fail "$2: $(cat "$2")"
        sleep 0.1
    done
}

! nbdmirror attach "$URI" 2> /tmp/error || fail "attached without the driver"
grep -q "modprobe nbd" /tmp/error || fail "what to do is not said: $(cat /tmp/error)"
modprobe nbd nbds_max=2 || fail "no nbd module"

nbdmirror attach "$URI" --connections 4 --dead-timeout 120 --timeout 8 > /tmp/attach 2>&1 &
watcher=$!
await_watcher "is attached" /tmp/attach
device=$(cut -d' ' -f1 /tmp/attach)
say "$(cat /tmp/attach), $(blockdev --getsize64 "$device") bytes"
[ "$(cat "/sys/block/${device#/dev/}/backend")" = "$URI" ] || fail "sysfs does not say the URI"
! nbdmirror attach "${URI}x" "$device" 2> /tmp/error || fail "attached twice"
say "refused: $(cat /tmp/error)"

mkfs.ext4 -qF "$device" || fail "mkfs"
mkdir -p /tmp/mount
mount "$device" /tmp/mount || fail "mount"
! nbdmirror detach "$device" 2> /tmp/error || fail "detached while mounted"
say "refused: $(cat /tmp/error)"

# Busy the whole time: every write is synced, and one that fails ends the loop.
busy() {
    local n=0
    while [ ! -e /tmp/stop ]; do
        dd if=/dev/urandom of=/tmp/mount/busy bs=64k count=4 seek=$((n % 64)) conv=notrunc,fsync \
            2> /tmp/busy.err || { cat /tmp/busy.err; return 1; }
        n=$((n + 1))
        echo $n > /tmp/rounds
    done
}
busy &
worker=$!

for round in 1 2 3; do
    before=$(now)
    dd if=/dev/urandom of=/tmp/mount/file$round bs=1M count="${SIZE_MB:-4}" 2> /dev/null || fail dd
    sha1sum /tmp/mount/file$round >> /tmp/sums
    host kill || fail "the host could not kill the server"
    sync -f /tmp/mount &
    syncer=$!
    sleep 2
    kill -0 $syncer || fail "a sync ended while the server was down"
    host start || fail "the host could not start the server"
    wait $syncer || fail "a sync over the restart failed"
    kill -0 $worker || fail "the busy writer saw an error"
    say "round $round: synced over a restart, $before to $(now)"
done
# A watcher can be restarted too: another one takes the device over.
kill -9 $watcher
nbdmirror attach "$URI" "$device" --connections 4 --json > /tmp/attach2 2>&1 &
watcher=$!
await_watcher '"adopted":true,"state":"attached"' /tmp/attach2
host kill
host start
sync -f /tmp/mount || fail "a sync under the second watcher failed"

touch /tmp/stop
wait $worker || fail "the busy writer saw an error"
say "$(cat /tmp/rounds) synced rounds"
umount /tmp/mount || fail "umount"
e2fsck -fn "$device" > /tmp/fsck 2>&1 || fail "e2fsck: $(cat /tmp/fsck)"
echo 3 > /proc/sys/vm/drop_caches
mount "$device" /tmp/mount || fail "second mount"
sha1sum --quiet -c /tmp/sums || fail "the data differs"
umount /tmp/mount || fail "second umount"
nbdmirror detach "$device" --json > /tmp/detach || fail "detach"
[ "$(cat /tmp/detach)" = "{\"device\":\"$device\",\"state\":\"detached\"}" ] || fail "$(cat /tmp/detach)"
wait $watcher || fail "the watcher's exit code is $?"
say "$(cat /tmp/attach2)"
! nbdmirror detach "$device" 2> /tmp/error || fail "detached twice"
say "refused: $(cat /tmp/error)"
no_io_error

# The server does not come back.
nbdmirror attach "$URI" "$device" --dead-timeout 3 > /tmp/attach3 2>&1 &
watcher=$!
await_watcher "is attached" /tmp/attach3
host kill
dd if=/dev/urandom of="$device" bs=4k count=1 2> /dev/null
! nbdmirror detach "$device" 2> /tmp/error || fail "detached, with what was written lost"
grep -q "detach --force $device" /tmp/error || fail "what to do is not said: $(cat /tmp/error)"
nbdmirror detach --force "$device" || fail "detach --force"
wait $watcher || fail "the last watcher's exit code is $?"
grep -q "$device: detached" /tmp/attach3 || fail "the watcher: $(cat /tmp/attach3)"
host start
