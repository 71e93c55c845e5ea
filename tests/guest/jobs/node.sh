# One node of a group whose state outlives the guest, on /dev/vda; then what the host asks for.
# STATE: where the disk is mounted. SETTINGS: for the agent. EAGER: hundredths of a second after
# which the kernel writes pages out by itself (empty: only when asked).
# shellcheck shell=bash

modprobe ext4 || fail "no ext4"
mkdir -p "$STATE"
mount -t ext4 /dev/vda "$STATE" || fail "the disk with the state does not mount"
if [ -n "$EAGER" ]; then
    echo "$EAGER" > /proc/sys/vm/dirty_expire_centisecs
    echo "$EAGER" > /proc/sys/vm/dirty_writeback_centisecs
fi
cd "$TREE" || fail "no tree"
"$PYTHON" -m tests.guest.cuts.agent
