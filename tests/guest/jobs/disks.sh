# Whole disks as facets, whose names a boot changes (I5, fault 29). /dev/vda: holds what outlives
# the guest. BOOT: "first" makes a node with the facets /dev/vdb and /dev/vdc; "second" finds them
# under each other's name.
# shellcheck shell=bash

cd "$TREE" || fail "no tree"
nbdmirror() { "$PYTHON" -m nbdmirror "$@"; }
modprobe ext4 || fail "no ext4"
mkdir -p /srv/node
mount -t ext4 /dev/vda /srv/node || fail "the disk with the state does not mount"

# configure DISK DISK: of volumes a and b.
configure() {
    cat > /srv/node/config.toml <<END
group = "g"
node = "alpha"
state_dir = "/srv/node/state"
[nbd]
listen = ["unix:/run/nbd"]
[admin]
socket = "/run/admin"
[log]
size = "4MiB"
[[volume]]
name = "a"
size = "8MiB"
facets = ["$1"]
[[volume]]
name = "b"
size = "8MiB"
facets = ["$2"]
END
}
serve() {
    "$PYTHON" -m nbdmirror serve /srv/node/config.toml > /tmp/output 2>&1 &
    daemon=$!
    until [ -S /run/nbd ]; do
        kill -0 $daemon 2> /dev/null || fail "serve: $(cat /tmp/output)"
        sleep 0.2
    done
}
# client VOLUME COMMANDS: of nbdsh.
client() {
    nbdsh -u "nbd+unix:///$1?socket=/run/nbd" -c "$2" > /tmp/client 2>&1 ||
        fail "volume $1: $(cat /tmp/client)"
}
stop() {
    kill -TERM $daemon
    wait $daemon || fail "the daemon ended with $?: $(cat /tmp/output)"
}

if [ "$BOOT" = first ]; then
    configure /dev/vdb /dev/vdc
    nbdmirror create /srv/node/config.toml --role primary || fail "create"
    serve
    for volume in a b; do
        client $volume "h.pwrite(b'$volume' * 1048576, 4096); h.flush()"
    done
    stop
    say "written"
else
    ! nbdmirror serve /srv/node/config.toml > /tmp/output 2>&1 || fail "served the wrong disk"
    grep -q "what lies at /dev/vdb is the facet that was at /dev/vdc" /tmp/output ||
        fail "it does not say why: $(cat /tmp/output)"
    say "refused: $(cat /tmp/output)"
    # As udev does it.
    mkdir -p /dev/disk/by-id
    for disk in vdb vdc; do
        ln -s ../../$disk "/dev/disk/by-id/virtio-$(cat /sys/block/$disk/serial)"
    done
    configure /dev/disk/by-id/virtio-rack-1 /dev/disk/by-id/virtio-rack-2
    serve
    for volume in a b; do
        client $volume "assert h.pread(1048576, 4096) == b'$volume' * 1048576"
    done
    stop
    say "found again under a name that stays"
fi
umount /srv/node
