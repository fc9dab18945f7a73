# Two commands matter: `make demo` runs the main job, `make test` checks everything.
# Both set up what they need first; `make help` lists the rest.

SHELL := /bin/sh
BIN := .venv/bin
CODE := ipc fs hypervisor guests tools tests

TIME ?= 60
N ?= 500
SEEDS ?= 1000
STEPS ?= 1000000
STATES ?= 1000000
# What pytest runs: `make test T=tests/t0_ipc` for one layer.
T ?= tests
# Each worker may hold a cluster's worth of the kernel's 256 message queues, so their number is bounded.
WORKERS ?= auto --maxprocesses=4

# The tests start well over a thousand Pythons; none needs to compile the modules again, whatever the caller's are told.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench fuzz sim model crash-restart coherence races scenarios campaigns crash-cluster vm-check lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup:  ## Make .venv with all that development needs, and Debian's packages where possible
	@tools/setup.sh dev

demo:  ## Run the main job: one hypervisor, four guests, with and without transcendent memory
	@tools/setup.sh demo
	@$(BIN)/tmem up

test: setup lint  ## Run every gate and every test (T=tests/t0_ipc for one layer)
	$(BIN)/python -m pytest -n $(WORKERS) $(T)

lint: setup  ## Run the gates before the tests: format, lint, import contracts, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --cache-dir .cache/import_linter
	$(BIN)/mypy --strict

format: setup  ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: setup  ## Measure everything: peers in C, Redis, memcached, lmdb; options, policies, bounds, the demo
	$(BIN)/python -m tools.bench
	@for part in options "options --demo --repetitions 1" pages clients eviction scheduling giveback; do \
	    echo; echo "tools.bench.$$part"; $(BIN)/python -m tools.bench.$$part || exit; \
	done

fuzz: setup  ## Feed arbitrary bytes to all that reads what others write for TIME=60 seconds
	$(BIN)/python -m tests.fuzz --seconds $(TIME)

model: setup  ## Run random histories against the oracle for STEPS=1000000 steps (SEED=n)
	$(BIN)/python -m tests.support.longrun --steps $(STEPS) $(if $(SEED),--seed $(SEED))

sim: setup  ## Simulate SEEDS=1000 clusters with faults, each in one process (SEED=first)
	@$(BIN)/tmem sim $(or $(SEED),1) --seeds $(SEEDS)

crash-restart: setup  ## Kill and restart the hypervisor under load N=500 times, with each of two evictions
	@for eviction in clock fifo; do \
	    $(BIN)/python -m tools.crash_restart --restarts $(N) --eviction $$eviction || exit; \
	done

coherence: SEEDS = 20
coherence: setup  ## Run the coherence test with every nemesis over SEEDS=20 seeds (SEED=first)
	@for seed in $$(seq $(or $(SEED),1) $$(($(or $(SEED),1) + $(SEEDS) - 1))); do \
	    echo "seed $$seed"; \
	    $(BIN)/tmem up --topo shared,n=3,tree=2M --test coherence --nemesis all --seconds 20 \
	        --seed $$seed -q || exit; \
	done

races: SEEDS = 20
races: setup  ## Let real nodes race for names, files, inodes and locks over SEEDS=20 seeds (SEED=first)
	TMEM_RACES=$(SEEDS) TMEM_RACES_FIRST=$(or $(SEED),1) $(BIN)/python -m pytest -q -n $(WORKERS) \
	    tests/t5_cluster/test_shared_races*.py tests/t5_cluster/test_shared_values.py

scenarios: setup  ## Play every attack with its defence on, and once with it off to see it work (SEED=n)
	@$(BIN)/tmem scenario run all --defence on --seed $(or $(SEED),1)
	@$(BIN)/tmem scenario run all --defence off --seed $(or $(SEED),1); test $$? -le 1

campaigns: setup  ## Long campaigns of journal, lock manager, membership and swap: SEEDS=1000, STATES=1000000
	$(BIN)/python -m tests.t3_fs.jbd2.campaign --seeds $(SEEDS)
	$(BIN)/python -m tests.t3_fs.dlm.campaign --seeds $(SEEDS)
	$(BIN)/python -m tests.t3_fs.dlm.explorations --states $(STATES)
	TMEM_CLUSTER_RUNS=$(SEEDS) $(BIN)/python -m pytest -q --timeout=0 tests/t3_fs/cluster
	TMEM_PROCESS_SEEDS=$(SEEDS) $(BIN)/python -m pytest -q --timeout=0 tests/t4_guest/test_processes.py

crash-cluster: SEEDS = 2
crash-cluster: setup  ## Cut the power at every disk write, kill nodes at every step (SEED=first, SEEDS=2)
	$(BIN)/python -m tests.t5_cluster.ocfs2.campaign --seed $(or $(SEED),1) --seeds $(SEEDS)
	CRASH_CLUSTER=1 $(BIN)/python -m pytest -q -n $(WORKERS) --timeout=0 tests/t3_fs/ocfs2

vm-check: setup  ## Let real Linux in a virtual machine judge our volumes (ONLY='killed chain', SEED=n)
	@tools/setup.sh vm
	@$(BIN)/python -m tools.vm $(addprefix --only ,$(ONLY)) $(if $(SEED),--seed $(SEED))

lock: setup  ## Rewrite the hash-locked requirements (UPGRADE=1 takes newer versions)
	@for group in build dev; do \
	    out=requirements$$(test $$group = build || echo -$$group).txt; \
	    $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	        --no-emit-index-url --no-header --no-annotate $(if $(UPGRADE),--upgrade) \
	        --group build --group $$group pyproject.toml -o $$out || exit; \
	done

clean:  ## Remove .venv, caches and results
	rm -rf .venv .cache .hypothesis runs dist build
	find $(CODE) -type d -name __pycache__ -prune -exec rm -rf {} +
