# deploy/ under a real systemd: the units start what they say, locked down; a crash and a hang are
# followed by a restart, a failed disk (O16) is not; a mounted volume stays over all of it (X7).
# Two daemons on this machine: alpha, the primary, and beta. UNITS: the directory of the units.
# shellcheck shell=bash

cd "$TREE" || fail "no tree"
mount -t cgroup2 cgroup /sys/fs/cgroup || fail "no cgroups"

# What the daemon sees of the file system is what the unit leaves: the program goes where an
# installation would put it.
"$PYTHON" - <<'END' || fail "copy"
import importlib, pathlib, shutil
for name in ("nbdmirror", "uvloop", "bitarray", "lz4", "xxhash"):
    source = pathlib.Path(importlib.import_module(name).__file__).parent
    shutil.copytree(source, f"/opt/nbdmirror/{name}", ignore=shutil.ignore_patterns("tests"))
    libraries = source.with_name(f"{name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, f"/opt/nbdmirror/{libraries.name}")
END
cat > /usr/local/bin/nbdmirror <<'END'
#!/bin/sh
PYTHONPATH=/opt/nbdmirror exec /usr/bin/python3 -m nbdmirror "$@"
END
chmod 755 /usr/local/bin/nbdmirror
export PATH=/usr/local/bin:$PATH
export SYSTEMD_IGNORE_CHROOT=1

# Our units, and of systemd's own only what they need.
units=/run/units
mkdir -p $units /var/log
cp deploy/*.service deploy/*.socket $units/
for name in sysinit basic shutdown network-online remote-fs-pre multi-user; do
    printf '[Unit]\nDefaultDependencies=no\n' > $units/$name.target
done
cp /lib/systemd/system/modprobe@.service $units/
for name in nbdmirror@ nbdmirror-attach@ nbd-client@; do
    mkdir -p $units/$name.service.d
    printf '[Service]\nStandardOutput=append:/var/log/units\nStandardError=append:/var/log/units\n' \
        > $units/$name.service.d/output.conf
done
# What a unit runs of systemctl must not take the guest for a chroot.
printf '[Service]\nEnvironment=SYSTEMD_IGNORE_CHROOT=1\n' > $units/nbdmirror@.service.d/guest.conf
# The guest is slow; a hang is noticed after this time.
printf '[Service]\nWatchdogSec=15\n' > $units/nbdmirror@.service.d/watchdog.conf
systemd-sysusers "$TREE/deploy/nbdmirror.sysusers" || fail sysusers
systemd-tmpfiles --create "$TREE/deploy/nbdmirror.tmpfiles" || fail tmpfiles
# Beta's disk will be full one day.
mkdir /srv/nbdmirror/beta /srv/nbdmirror/alpha
mount -t tmpfs -o size=24m facets /srv/nbdmirror/beta || fail tmpfs
chown nbdmirror: /srv/nbdmirror/*
SYSTEMD_UNIT_PATH=$units SYSTEMD_LOG_TARGET=console container=guest \
    unshare --pid --fork --mount --mount-proc /lib/systemd/systemd --unit=basic.target \
    > /var/log/systemd 2>&1 &
outer=$!
# It answers only those whose process id it can see.
inside() {
    local manager
    manager=$(cat /proc/$outer/task/$outer/children)
    nsenter --target "${manager% }" --pid --mount --root --wd "$@"
}
systemctl() {
    inside systemctl "$@"
}
deadline=30
until systemctl is-active -q basic.target 2> /tmp/error; do
    deadline=$((deadline - 1))
    [ $deadline -gt 0 ] || fail "systemd: $(cat /tmp/error /var/log/systemd)"
    sleep 1
done
say "$(systemctl --version | head -1) runs"

property() {
    systemctl show --value -p "$2" "$1"
}
# started UNIT: a start that works, and locks the daemon in.
started() {
    systemctl start "$1" || fail "$1: $(cat /var/log/units; tail /var/log/systemd)"
    [ "$(property "$1" StatusText)" != "" ] || fail "$1 says nothing"
}
# until_value UNIT PROPERTY VALUE: waits for it, for a minute.
until_value() {
    local n=60
    until [ "$(property "$1" "$2")" = "$3" ]; do
        n=$((n - 1))
        [ $n -gt 0 ] || fail "$1: $2 is $(property "$1" "$2"), not $3: $(tail -20 /var/log/units /var/log/systemd)"
        sleep 1
    done
}
in_sync() {
    nbdmirror -s /run/nbdmirror/alpha.sock wait --until in-sync --timeout 120 > /tmp/wait 2>&1 ||
        fail "not in sync: $(cat /tmp/wait)"
}
config() {
    cat > "/etc/nbdmirror/$1.toml"
    cat >> "/etc/nbdmirror/$1.toml" <<END
[admin]
socket = "/run/nbdmirror/$1.sock"
[log]
size = "16MiB"
[[volume]]
name = "data"
size = "64MiB"
facets = ["/srv/nbdmirror/$1/data.img"]
END
}
config beta <<'END'
group = "db"
node = "beta"
state_dir = "/var/lib/nbdmirror/beta"
[replication]
listen = "tcp:127.0.0.1:10810"
END
config alpha <<'END'
group = "db"
node = "alpha"
state_dir = "/var/lib/nbdmirror/alpha"
[nbd]
listen = ["unix:/run/nbdmirror/alpha.nbd", "tcp:127.0.0.1:10809"]
[nbd.tls]
cert = "/etc/nbdmirror/tls/alpha/cert.pem"
key = "/etc/nbdmirror/tls/alpha/key.pem"
client_ca = "/etc/nbdmirror/tls/alpha/ca.pem"
[[remote]]
name = "beta"
address = "tcp:127.0.0.1:10810"
END
ca=/etc/nbdmirror/tls
deploy/nbdmirror-ca init $ca && deploy/nbdmirror-ca node $ca db alpha 127.0.0.1 &&
    deploy/nbdmirror-ca client $ca laptop || fail "the CA"
chmod 755 $ca && chown -R nbdmirror: $ca/alpha || fail "keys"
for node in beta alpha; do
    role=$([ $node = alpha ] && echo primary || echo secondary)
    runuser -u nbdmirror -- nbdmirror create /etc/nbdmirror/$node.toml --role "$role" || fail create
    systemctl start nbdmirror@$node.socket || fail "the sockets: $(tail /var/log/systemd)"
    [ "$(property nbdmirror@$node ActiveState)" = inactive ] || fail "$node runs unasked"
    [ "$(stat -c %a%U%G /run/nbdmirror/$node.sock)" = 660nbdmirrornbdmirror ] || fail "$(stat /run/nbdmirror/*)"
    # In a slow guest it has not the patience for the whole of the start.
    nbdmirror -s /run/nbdmirror/$node.sock status > /tmp/status 2>&1 || say "$(cat /tmp/status)"
    until_value nbdmirror@$node ActiveState active
    nbdmirror -s /run/nbdmirror/$node.sock status > /tmp/status || fail "no status of $node"
done
say "the first client of each started it"
in_sync
inside cat "/proc/$(property nbdmirror@alpha MainPID)/status" > /tmp/status
grep -Eq '^Uid:\s+[1-9]' /tmp/status || fail "runs as root"
grep -Eq '^Seccomp:\s+2' /tmp/status || fail "no seccomp filter"
grep -Eq '^CapBnd:\s+0+$' /tmp/status || fail "capabilities"
[ "$(stat -c %a%U /run/nbdmirror)" = 750nbdmirror ] || fail "$(stat /run/nbdmirror)"
say "both run, locked in, in sync"

printf 'URI=nbd+unix:///data?socket=/run/nbdmirror/alpha.nbd\nOPTIONS=--dead-timeout 120 --timeout 8\n' \
    > /etc/nbdmirror/attach-nbd0.conf
started nbdmirror-attach@nbd0
mkfs.ext4 -qF /dev/nbd0 || fail mkfs
mkdir -p /tmp/mount
mount /dev/nbd0 /tmp/mount || fail mount
echo one > /tmp/mount/file
sync -f /tmp/mount || fail sync

systemctl kill -s KILL nbdmirror@alpha
echo two >> /tmp/mount/file
sync -f /tmp/mount || fail "a sync over a crash"
until_value nbdmirror@alpha NRestarts 1
until_value nbdmirror@alpha ActiveState active
say "a crash: started again"

systemctl kill -s STOP nbdmirror@alpha
echo three >> /tmp/mount/file
sync -f /tmp/mount || fail "a sync over a hang"
until_value nbdmirror@alpha NRestarts 2
until_value nbdmirror@alpha ActiveState active
say "a hang: the watchdog had it started again"

systemctl restart nbdmirror-attach@nbd0 || fail "restart of the watcher: $(tail /var/log/units)"
systemctl restart nbdmirror@alpha || fail "restart of alpha"
echo four >> /tmp/mount/file
sync -f /tmp/mount || fail "a sync over restarts"
say "daemon and watcher restarted under a mounted file system"

in_sync
dd if=/dev/urandom of=/tmp/mount/big bs=1M count=32 conv=fsync 2> /tmp/error || fail "dd"
until_value nbdmirror@beta ActiveState failed
[ "$(property nbdmirror@beta ExecMainStatus)" = 1 ] || fail "beta: $(tail /var/log/units)"
sleep 5
[ "$(property nbdmirror@beta NRestarts) $(property nbdmirror@beta ActiveState)" = "0 failed" ] ||
    fail "a failed disk is asked again"
grep -i "no space" /var/log/units | tail -1
until_value nbdmirror@beta.socket ActiveState inactive
nbdmirror -s /run/nbdmirror/beta.sock status > /tmp/status 2>&1
code=$?
[ $code = 5 ] || fail "beta's socket: $code, $(cat /tmp/status)"
[ "$(property nbdmirror@beta ActiveState)" = failed ] || fail "a client had a failed disk asked again"
say "a failed disk: beta stays down, alpha goes on"

[ "$(wc -l < /tmp/mount/file)" = 4 ] || fail "the file: $(cat /tmp/mount/file)"
umount /tmp/mount || fail umount
systemctl stop nbdmirror-attach@nbd0 || fail "stop of the watcher"
[ ! -e /sys/block/nbd0/backend ] || fail "still attached"

printf 'HOST=127.0.0.1\nPORT=10809\nEXPORT=data\nTLS=/etc/nbdmirror/tls/laptop\nTLS_NAME=127.0.0.1\n' \
    > /etc/nbdmirror/nbd-client-nbd1.conf
systemctl start nbd-client@nbd1 || fail "nbd-client@nbd1: $(cat /var/log/units)"
deadline=60
until [ "$(cat /sys/block/nbd1/size)" != 0 ]; do
    deadline=$((deadline - 1))
    [ $deadline -gt 0 ] || fail "nbd-client@nbd1 attaches nothing: $(tail /var/log/units)"
    sleep 1
done
mount /dev/nbd1 /tmp/mount || fail "mount over TLS"
echo five >> /tmp/mount/file
sync -f /tmp/mount || fail "a sync over TLS"
[ "$(wc -l < /tmp/mount/file)" = 5 ] || fail "the file over TLS: $(cat /tmp/mount/file)"
umount /tmp/mount || fail "umount over TLS"
systemctl stop nbd-client@nbd1 || fail "stop of nbd-client"
[ "$(cat /sys/block/nbd1/size)" = 0 ] || fail "nbd1 is still attached"
say "nbd-client attached it over TLS, locked in"

systemctl stop nbdmirror@alpha.socket nbdmirror@alpha || fail "stop of alpha"
[ ! -e /run/nbdmirror/alpha.sock ] || fail "the sockets are still there"
[ "$(property nbdmirror@alpha Result)" = success ] || fail "alpha: $(tail /var/log/units)"
[ -d /run/nbdmirror ] || fail "a stop took the directory of the others away"
no_io_error
say "stopped"
