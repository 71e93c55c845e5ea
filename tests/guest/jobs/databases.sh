# A database under load on an ext4 on a mirrored volume whose remote is synchronous: over an outage
# of the link, and then over the loss of the primary, with transactions in flight. /dev/vda becomes
# the secondary's copy: what was committed is there, whole. DATABASE: sqlite or postgresql.
# PORT, EXPORT: the primary's. TREE: the project.
# The host answers: cut, heal (waits until replies wait for the remote again), failover (the
# primary is dead, /dev/vda is what the secondary has).
# shellcheck shell=bash

modprobe nbd nbds_max=1 max_part=0 || fail "no nbd module"
modprobe -q ext4
nbd-client -N "$EXPORT" -C 4 10.0.2.2 "$PORT" /dev/nbd0 || fail "nbd-client"
mkfs.ext4 -qF -J size=4 /dev/nbd0 || fail "mkfs"
mkdir -p /tmp/mount
mount /dev/nbd0 /tmp/mount || fail "mount"
cd "$TREE" || fail "no tree"

# For each database: prepare, work (until an error; how many transactions were committed so far: a
# line each in /tmp/promised), check DIR (prints how many there are; fails unless all is whole).
bank() { "$PYTHON" -B -m tests.faults.bank "$@"; }
sqlite_prepare() { bank create /tmp/mount/bank; }
sqlite_work() { bank work /tmp/mount/bank >> /tmp/promised; }
sqlite_check() { bank check "$1/bank"; }

as_postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups "/usr/lib/postgresql/15/bin/$1" "${@:2}"; }
server() { as_postgres pg_ctl -D "$1/base" -l /tmp/postgresql -w -t 200 "${@:2}" > /tmp/pg_ctl 2>&1; }
query() { as_postgres psql -h /tmp -d postgres -At -c "$1"; }
postgresql_prepare() {
    install -d -m 700 -o postgres -g postgres /tmp/mount/base
    as_postgres initdb -D /tmp/mount/base -k -A trust --wal-segsize=1 --no-sync > /tmp/initdb 2>&1 ||
        { cat /tmp/initdb; return 1; }
    cat >> /tmp/mount/base/postgresql.conf <<END
listen_addresses = ''
unix_socket_directories = '/tmp'
shared_buffers = 16MB
min_wal_size = 4MB
max_wal_size = 8MB
jit = off
END
    sync -f /tmp/mount
    server /tmp/mount start && as_postgres pgbench -h /tmp -i -q postgres > /tmp/pgbench 2>&1
}
postgresql_work() {
    local count=0
    while as_postgres pgbench -h /tmp -n -c 2 -t 10 postgres > /tmp/pgbench 2>&1; do
        count=$((count + 20))
        echo $count >> /tmp/promised
    done
}
postgresql_check() {
    # What ran on the lost primary has seen its disk fail.
    pkill -KILL -u postgres
    rm -f /tmp/.s.PGSQL.* "$1/base/postmaster.pid"
    server "$1" start || { cat /tmp/pg_ctl; tail /tmp/postgresql; return 1; }
    # Heap and indices, each against the other.
    as_postgres pg_amcheck -h /tmp --install-missing --heapallindexed --parent-check postgres >&2 ||
        return 1
    # Each transaction adds one amount to an account, a teller and a branch, and notes it.
    [ "$(query "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = sum(delta)
        AND (SELECT sum(tbalance) FROM pgbench_tellers) = sum(delta)
        AND (SELECT sum(bbalance) FROM pgbench_branches) = sum(delta) FROM pgbench_history")" = t ] ||
        { echo "the sums differ" >&2; return 1; }
    query "SELECT count(*) FROM pgbench_history"
    server "$1" stop || return 1
    as_postgres pg_checksums --check -D "$1/base" >&2
}

promised() { tail -n 1 /tmp/promised; }
# goes_on: two more reports of committed transactions.
goes_on() {
    local lines=$(($(wc -l < /tmp/promised) + 2)) n=1200
    until [ "$(wc -l < /tmp/promised)" -ge $lines ]; do
        n=$((n - 1))
        [ $n -gt 0 ] && kill -0 $load 2> /dev/null || fail "nothing is committed: $(cat /tmp/load /tmp/pgbench)"
        sleep 0.1
    done
}

"${DATABASE}_prepare" || fail "prepare"
say "$DATABASE is there"
echo 0 > /tmp/promised
"${DATABASE}_work" 2> /tmp/load &
load=$!
goes_on
host cut || fail "cut"
goes_on
say "$(promised) committed, the last ones during the outage"
host heal || fail "heal"
goes_on
host failover || fail "failover"
wait $load
say "the primary is lost: $(tail -n 1 /tmp/load)"
count=$(promised)
umount -l /tmp/mount

blockdev --flushbufs /dev/vda
mkdir -p /tmp/copy
mount /dev/vda /tmp/copy || fail "the secondary's copy does not mount"
found=$("${DATABASE}_check" /tmp/copy) || fail "the secondary's database is not whole: $found"
say "$count were committed, the secondary has $found"
[ "$found" -ge "$count" ] && [ "$count" -gt 0 ] || fail "committed transactions are lost"
umount /tmp/copy || fail "umount"
e2fsck -fn /dev/vda > /tmp/fsck 2>&1 || fail "fsck: $(tail -20 /tmp/fsck)"
