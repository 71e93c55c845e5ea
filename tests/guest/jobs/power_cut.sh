# Writes to /dev/vda, half of it synced, and has the host cut the power.
# shellcheck shell=bash
# The last close of a block device writes everything out: this one keeps it open.
exec 8<> /dev/vda || fail "no disk"
fill() {
    head -c 65536 /dev/zero | tr '\0' "$1" | dd of=/dev/vda bs=64k seek="$2" iflag=fullblock conv="$3"
}
fill s 0 notrunc,fsync || fail "dd"
fill u 1 notrunc
host power-cut
fail "still alive"
