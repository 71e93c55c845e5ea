# What a person or a machine does with this tree. `make run` and `make test` set everything up
# themselves on a fresh Debian 12; all else needs one of them, or `make setup`, first.
#
#   make run               a mirrored volume here, both nodes on loopback, state under run/
#   make check             format, lint, types, fast tests: before every commit, under 2 minutes
#   make test              all that CI runs
#   make sim SEEDS=N       the simulation over N seeds; SEED=N replays one with a trace; MUTANTS=1
#   make guest             the tests in a QEMU guest; CUTS=N: so many power cuts a side
#   make bench             the measurements
#   make fuzz SECONDS=N    every parser and whole nodes, N seconds each (3600), guided by coverage;
#                          JOBS=N of them at a time
#   make clean             removes what any of these made

SHELL := /bin/bash
PYTHON := /usr/bin/python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Two processes, and what tests/conftest.py says of groups and order.
PARALLEL := -n 2 --dist loadscope --no-loadscope-reorder
FAST := $(wildcard tests/unit tests/property tests/contract tests/golden tests/fuzz \
	tests/sim/test_*.py) \
	tests/test_architecture.py
SLOW := $(wildcard tests/faults) tests/integration tests/guest
SEEDS ?= 1000
CHECK_SEEDS ?= 50
# What CI simulates.
TEST_SEEDS ?= 300
CUTS ?= 2
SECONDS ?= 3600
# What CI has of it: with two at a time a minute for all.
TEST_SECONDS ?= 3
ATHERIS = $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[fuzz]'
JOBS ?= 1

RUN_PACKAGES := python3 python3-venv python3-libnbd gcc libc6-dev python3-dev libxxhash-dev
TEST_PACKAGES := $(RUN_PACKAGES) nbdkit nbdkit-plugin-python libnbd-bin nbd-client nbd-server \
	file openssl systemd qemu-system-x86 qemu-system-common qemu-utils qemu-block-extra busybox-static kmod \
	fio sqlite3 strace iproute2 e2fsprogs xfsprogs btrfs-progs

.PHONY: run test check lint sim sim-if-any guest bench fuzz setup setup-run clean
.DELETE_ON_ERROR:

run: setup-run
	$(BIN)/python -m nbdmirror.cli.demo --state run

# One pytest run for all, so that its last line counts all. The units under a real systemd in a
# guest take four minutes of their own, and so would more power cuts; what `attach` does with a
# server that is not ours takes two: `make guest` has them.
test: setup lint
	$(MAKE) --no-print-directory sim-if-any SEEDS=$(TEST_SEEDS)
	if $(ATHERIS); then $(BIN)/python -m tests.fuzz --seconds $(TEST_SECONDS) --jobs 2; \
		else echo "there is no atheris for this machine: no fuzzing by coverage"; fi
	POWER_CUTS=1 $(PYTEST) $(PARALLEL) $(FAST) $(SLOW) --ignore=tests/guest/test_service.py \
		--deselect tests/guest/test_power_cuts.py::test_a_disk_that_ignores_flushes_is_seen \
		--deselect tests/guest/test_attach.py::test_nbdkit_restart

check: lint
	$(PYTEST) -q $(PARALLEL) $(FAST)
	$(MAKE) --no-print-directory sim-if-any SEEDS=$(CHECK_SEEDS)

lint: .venv/stamp
	$(BIN)/ruff format --check nbdmirror tests
	$(BIN)/ruff check nbdmirror tests
	$(BIN)/mypy

sim: .venv/stamp
	$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED) --trace,--seeds $(SEEDS)) \
		$(if $(MUTANTS),--mutants)

sim-if-any: .venv/stamp
	$(if $(wildcard tests/sim/__main__.py),$(BIN)/python -m tests.sim --seeds $(SEEDS))

guest: setup
	POWER_CUTS=$(CUTS) POSTGRESQL=1 $(PYTEST) tests/guest

# Long, and for an idle machine; each part can be run by itself, and says in its docstring what it is.
BENCHES := resync snapshots remotes tails recovery tls hostile scale facets commits ways
bench: setup
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m tests.bench --all
	for part in $(BENCHES); do $(BIN)/python -m tests.bench.$$part || exit 1; done

fuzz: setup
	$(ATHERIS)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --jobs $(JOBS)

setup: packages-test .venv/stamp
setup-run: packages-run .venv/stamp

# Only what is missing is installed, and apt is asked for news only then.
packages-run packages-test: PACKAGES = $(if $(filter packages-run,$@),$(RUN_PACKAGES),$(TEST_PACKAGES))
packages-run packages-test:
	@missing=(); for package in $(PACKAGES); do \
		[[ $$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null) == installed ]] \
			|| missing+=($$package); \
	done; \
	if (($${#missing[@]})); then \
		echo "installing: $${missing[*]}"; \
		root=(); ((EUID == 0)) || root=(sudo); \
		"$${root[@]}" apt-get -q update && \
		"$${root[@]}" env DEBIAN_FRONTEND=noninteractive \
			apt-get -q install -y --no-install-recommends "$${missing[@]}"; \
	fi
.PHONY: packages-run packages-test

# The system's Python, because its bindings of nbdkit and libnbd are for that one.
.venv/stamp: pyproject.toml $(wildcard nbdmirror/*/*.c)
	$(PYTHON) -m venv --system-site-packages .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf .venv .cache run build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find nbdmirror tests -name __pycache__ -type d -prune -exec rm -rf {} +
