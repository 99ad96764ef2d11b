# `make` alone lists the commands. Each of them does its own set-up.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
# An index of PyTorch builds, such as the CPU one that pytorch.org names; empty takes pip's own.
TORCH_INDEX_URL ?=
# For `make demo`: your own rows, your own pair.
DATA ?=
PAIR ?=
# For `make test`: further arguments to pytest.
ARGS ?=
# For `make soak`: how long, over its four settings.
MINUTES ?= 10

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# More than there are cores: many tests wait for services that they have started.
TESTS := $(BIN)/python -m pytest -n 3 --dist loadgroup

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

.PHONY: setup
setup: $(READY) ## Make the virtual environment with everything in it

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "Python 3.11 or newer is needed; found: $$($(PYTHON) --version 2>&1). Name another one with PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "Python's venv module is missing. Install it with: sudo apt-get install -y python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH_INDEX_URL)" ]; then \
	  $(BIN)/pip install --quiet --index-url "$(TORCH_INDEX_URL)" "$$(grep '^torch==' requirements.lock)"; fi
	$(BIN)/pip install --quiet -c requirements.lock -e '.[worker,dev]'
	$(BIN)/python -c 'from worker.weights.kernels import compile_all; compile_all()'
	@touch $@

.PHONY: demo
demo: setup ## Run the main job from end to end (DATA=rows.jsonl, PAIR=Qwen/Qwen3-0.6B)
	@$(BIN)/shadowft demo $(if $(DATA),--data "$(DATA)") $(if $(PAIR),--pair "$(PAIR)")

.PHONY: serve
serve: setup ## Run the service until stopped: API, a worker for jobs, one for light work
	@$(BIN)/shadowft serve

.PHONY: migrate
migrate: setup ## Bring the database to this version's schema
	@$(BIN)/shadowft migrate

.PHONY: test
test: setup test-servers ## Run the tests, but for those of `make check` and the long ones
	$(TESTS) -m 'not slow' --ignore tests/test_architecture.py $(ARGS)

.PHONY: test-all
test-all: setup test-servers ## Run every test, the long ones too
	$(TESTS) $(ARGS)

.PHONY: test-servers
test-servers:
	@command -v redis-server >/dev/null && command -v strace >/dev/null && ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && \
	  ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 && exit 0; \
	  install='apt-get install -y --no-install-recommends redis-server postgresql strace libfaketime'; \
	  if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo='sudo -n'; \
	  else echo "The tests start Redis and PostgreSQL of their own, and make disks and clocks fail. Install what that takes with: sudo $$install"; exit 1; fi; \
	  echo "Installing redis-server, postgresql, strace and libfaketime for the tests"; \
	  $$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive $$install -qq >/dev/null

.PHONY: check
check: setup ## Check format, lint, types and the arrows between the rooms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

.PHONY: bench
bench: setup test-servers ## Run every benchmark; each prints JSON with a ratio against a yardstick of the same run
	@for program in bench/*.py; do $(BIN)/python $$program || exit 1; done

bench-%: setup
	@$(BIN)/python bench/$*.py

# Of a name of its own: beside the other programs a `queue.py` would be taken for the standard library's.
.PHONY: bench-queue
bench-queue: setup test-servers
	@$(BIN)/python bench/job_queue.py

.PHONY: soak
soak: setup test-servers ## Run toy jobs while something dies every few seconds (MINUTES=10), on every database and broker
	@$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

.PHONY: up
up: ## Start the containers: migrate, api, worker, redis, postgres
	docker compose up --build --detach --wait
