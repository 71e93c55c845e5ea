# What every job has: its variables, a clock, and the line to the host.
# shellcheck shell=bash

. /job/environment.sh
exec 9<> /dev/ttyS1

# host WORD...: has the test on the host do something; prints its answer, returns its verdict.
host() {
    local code text
    printf 'host %s\n' "$*" >&9
    read -r code text <&9
    [ -z "$text" ] || echo "$text"
    return "$code"
}

# now: seconds since boot.
now() {
    cut -d' ' -f1 /proc/uptime
}

# say WORD...: a line for the serial log.
say() {
    echo "[guest $(now)] $*"
}

# fail WORD...: the end of the job.
fail() {
    say "FAILED: $*"
    dmesg | tail -30
    exit 1
}

# no_io_error: fails if the kernel saw an I/O error on the NBD device.
no_io_error() {
    ! dmesg | grep -E 'I/O error' || fail "the kernel saw an I/O error"
}
