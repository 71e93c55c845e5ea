# The harness itself: the host's programs run, the line to the host works, modules load.
# shellcheck shell=bash
uname -a
"$PYTHON" -c 'import asyncio, sys; print(sys.version)' || fail "no python"
modprobe nbd || fail "no nbd module"
[ "$(host echo one two)" = "one two" ] || fail "the host does not answer"
say "tree: $(ls "$TREE")"
! touch "$TREE/x" 2> /dev/null || fail "the tree is writable"
say "hello"
