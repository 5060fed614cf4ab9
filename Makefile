# Everything a developer or a curious reader needs; `make` alone lists it.

SHELL := /bin/bash
.DEFAULT_GOAL := help
# nft, sshd and others live in sbin, which an ordinary user's PATH lacks on Debian.
export PATH := $(PATH):/usr/sbin:/sbin

RUNTIME := .venv/.installed
DEVELOPMENT := .venv/.installed-dev
COMPARED := .venv/.installed-bench
SHELL_SCRIPTS = $(shell grep -lE '^\#!.*\b(ba)?sh\b' scripts/* .ci/run)

.PHONY: help setup setup-dev demo test simulate chaos soak bench bench-quick bench-roam lint proto clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(RUNTIME) ## make .venv with apagent and apctl

setup-dev: $(DEVELOPMENT) ## the same, with everything that tests and lint need

demo: $(RUNTIME) ## a download while its client roams over three APs, without and with apagent
	scripts/in-userns .venv/bin/apagent demo $(DEMO_ARGS)

test: $(DEVELOPMENT) ## all tests: unit, sequences, contract, network namespaces
	scripts/in-userns .venv/bin/pytest $(PYTEST_ARGS)

simulate: $(DEVELOPMENT) ## thousands of simulated roam domains (SIMULATE_ARGS="--seeds 0-99 --aps 50")
	.venv/bin/python -m tests.simulation $(SIMULATE_ARGS)

chaos: $(DEVELOPMENT) ## power cuts, partitions, killed agents from a seed (CHAOS_ARGS="--seconds 120 --seed 7")
	scripts/in-userns .venv/bin/python -m tests.chaos $(CHAOS_ARGS)

soak: $(DEVELOPMENT) ## real applications at once, their clients roaming at random (SOAK_ARGS=--seconds=120)
	scripts/in-userns .venv/bin/python -m tests.soak $(SOAK_ARGS)

bench: $(COMPARED) ## all benchmarks, half an hour on a quiet machine (BENCH_ARGS=--resume)
	scripts/in-userns .venv/bin/python -m tests.bench $(BENCH_ARGS)

bench-quick: $(COMPARED) ## a quick look at the same, two minutes
	scripts/in-userns .venv/bin/python -m tests.bench --quick $(BENCH_ARGS)

bench-roam: $(DEVELOPMENT) ## what a roam costs a 1 kHz echo, with 1 and 10,000 flows (BENCH_ARGS=--runs=50)
	scripts/in-userns .venv/bin/python -m tests.bench.roam $(BENCH_ARGS)

lint: $(DEVELOPMENT) ## ruff, mypy, generated stubs, shellcheck
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python scripts/proto --check
	shellcheck $(SHELL_SCRIPTS)
	shellcheck --shell=dash deploy/openwrt/apagent.init deploy/openwrt/uci2toml

proto: $(DEVELOPMENT) ## generate apagent/v1 from the proto files
	.venv/bin/python scripts/proto

clean: ## remove what these targets made
	rm -rf .venv build dist apagent.egg-info demo-out soak-out bench-out chaos-out
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find apagent tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): pyproject.toml scripts/setup
	@scripts/setup
	@touch $@

$(DEVELOPMENT): pyproject.toml scripts/setup
	@scripts/setup --dev
	@touch $@ $(RUNTIME)

$(COMPARED): pyproject.toml scripts/setup
	@scripts/setup --bench
	@touch $@ $(DEVELOPMENT) $(RUNTIME)
