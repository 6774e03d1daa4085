# mars: everything a newcomer needs is `make demo` and `make test`.

PYTHON ?= python3
SEED ?= 0
DATA ?= digits
FAULTS ?= 50
PORT ?= 8100

# MARS_STACK=cpu or cuda chooses the stack.
.PHONY: help setup tools demo test chaos verify bench-weights screenshots warm-start clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: ## create .venv and install everything (CUDA stack if an NVIDIA GPU is there, else CPU); seconds when done
	@$(PYTHON) deploy/setup_env.py

tools: ## install what some tests need besides: Chromium and Prometheus (as root on Debian; elsewhere it says what)
	@$(PYTHON) deploy/setup_tools.py

demo: setup ## train the tiny policy through all services: make demo [SEED=n] [DATA=digits|scene] [PORT=n]
	@.venv/bin/mars demo --data $(DATA) --seed $(SEED) --port $(PORT)

test: setup ## lint, types, import rules and all tests
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/pytest

chaos: setup ## kill, freeze and damage a run, compare it with an undisturbed one: make chaos [FAULTS=n] [SEED=s]
	@.venv/bin/python benchmarks/verify_chaos.py --faults $(FAULTS) --seed $(SEED)

verify: setup ## long checks, hours: the demo's promises; every fault point; one replica against three; 50 faults; every algorithm learns on both tasks
	@.venv/bin/python benchmarks/verify_demo.py
	@.venv/bin/python benchmarks/verify_faults.py
	@.venv/bin/python benchmarks/verify_chaos.py --faults 0 --dir runs/determinism
	@.venv/bin/python benchmarks/verify_chaos.py --faults 50
	@.venv/bin/python benchmarks/commit_cost.py
	@.venv/bin/python benchmarks/verify_algorithms.py

bench-weights: setup ## what it takes to send changed weights, against other ways; writes benchmarks/results/weights.json (about ten minutes)
	@.venv/bin/python benchmarks/bench_weights.py $(if $(QUICK),--quick)

screenshots: setup ## take the pictures of docs/pictures from a demo run of the scene task (minutes)
	@.venv/bin/mars demo --data scene --port $(PORT)
	@.venv/bin/python docs/make_screenshots.py runs/demo

warm-start: setup ## make models/tiny again from nothing (about 13 minutes on two cores)
	@.venv/bin/mars sft --out models/tiny

clean: ## remove the environment and all runs
	rm -rf .venv runs
