#!/bin/busybox sh
# The guest's first process: loads what reaches the host's files, puts them under a layer of memory,
# runs /job/job.sh there, tells the host the exit code over the second serial line, switches off.
# Kernel parameters: share=virtiofs|9p, tree=DIR (the project), modules=DIR (on the host).

/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o size=75% memory /run
stty -F /dev/ttyS1 raw -echo

finish() {
    echo "guest: ends with $1${2:+: $2}"
    echo "exit $1" > /dev/ttyS1
    poweroff -f
}

parameter() {
    sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" /proc/cmdline
}

# A device may be there a moment later than its driver.
soon() {
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        "$@" && return
        sleep 1
    done
    return 1
}

while read -r module; do
    insmod "$module" || finish 99 "no module $module"
done < /lib/order
ip link set lo up
soon ip link set eth0 up || finish 96 "no network"
ip addr add 10.0.2.15/24 dev eth0

case $(parameter share) in
    9p) soon mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=524288,cache=loose host /host ;;
    virtiofs) soon mount -t virtiofs -o ro host /host ;;
esac || finish 98 "the host's files cannot be mounted"
mkdir /run/upper /run/work
mount -t overlay -o lowerdir=/host,upperdir=/run/upper,workdir=/run/work host /root ||
    finish 97 "no layer over the host's files"
for directory in proc sys dev dev/pts dev/shm; do
    mount --bind /$directory /root/$directory
done
mount -t tmpfs run /root/run
mkdir -p /root/job
mount -t tmpfs -o size=50% job /root/job
cp -a /job/. /root/job/
modules=/root/usr/lib/modules/$(uname -r)
mkdir -p "$modules"
mount --bind "/host$(parameter modules)" "$modules"
tree=$(parameter tree)
mkdir -p "/root$tree"
mount --bind "/host$tree" "/root$tree"

echo "guest: $(uname -r) is up after $(cut -d' ' -f1 /proc/uptime) s"
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
chroot /root /bin/bash -c 'cd /job && . ./prelude.sh && . ./job.sh'
finish $?
