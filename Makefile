# MoltBot's tasks. `make` alone lists them. Each sets up what it needs first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
# Marks of finished installations: a task whose marks are newer than the locks starts at once.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
GENERATOR := .venv-proto/.installed

QUESTION ?= Hello! What can you do?
RUN_ARGS ?=
TEST_ARGS ?=
# Each file of tests is run by one of so many processes; 0 runs all in this one.
TEST_PROCESSES ?= auto
# A test that fails is tried so many times more: beside others, on a machine that is short of time, a wait may be too short.
TEST_RERUNS ?= 2
BENCH_ARGS ?= --json
LOAD_ARGS ?=
KILLS ?= 100
FAULT_ARGS ?= --rigs 2
DELIVERY_ARGS ?= --store redis --nodes 2
SCHEDULES ?= 20000
BUGS ?=
TURNS ?= 20000
SOAK_ARGS ?=
ACCEPTS ?= 1000

export PATH := $(CURDIR)/$(BIN):$(CURDIR)/.tools/bin:$(PATH)

.PHONY: help install run test test-convert check fmt proto proto-check proto-accept docs bench load faults deliveries simulate seeded-bugs soak accepts lock clean

help: ## Lists the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(RUN) ## Sets up .venv with what MoltBot needs to run
	@echo "MoltBot is installed in $(VENV): type  make run  or  $(BIN)/moltbot --help"

run: $(RUN) ## Starts MoltBot and asks it a first question (RUN_ARGS="--port 3000" for more)
	@exec $(BIN)/moltbot start --first-question "$(QUESTION)" $(RUN_ARGS)

test: $(DEV) ## Runs every test (TEST_ARGS="-k sessions" for some)
	@scripts/tools chromium envoy ghz grpcurl nginx redis || echo "Tests that need a missing tool are skipped and say so."
	@exec $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile \
		--reruns $(TEST_RERUNS) --reruns-delay 2 $(TEST_ARGS)

check: $(DEV) $(GENERATOR) ## Checks style, types, floors, the contract and its generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p moltbot -p moltbot_server -p moltbot_adapters
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	scripts/breaking
	scripts/proto-check
	$(BIN)/python -m pytest -q tests/repo

fmt: $(DEV) ## Formats the code and the contract
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

proto: $(GENERATOR) ## Generates the Python code of proto/
	scripts/generate clients/python

proto-check: $(GENERATOR) ## Fails when the generated code is not that of proto/
	scripts/proto-check

proto-accept: $(DEV) ## Promises the contract as it stands: later ones may not break it
	$(BIN)/buf build --as-file-descriptor-set --exclude-source-info --output proto/accepted.binpb

test-convert: $(DEV) ## Proves conversions and embeddings against transformers (installs torch beside, gigabytes)
	@exec scripts/test-convert $(TEST_ARGS)

docs: $(RUN) ## Generates docs/errors.md from the tree of errors
	$(BIN)/python -c 'from moltbot_server.errors import markdown; print(markdown(), end="")' > docs/errors.md

bench: $(RUN) ## Measures the core on this machine
	@exec $(BIN)/moltbot bench core $(BENCH_ARGS)

load: $(DEV) ## Drives a core with ghz (ADDRESS=host:port for one that runs already)
	@scripts/tools ghz
	@exec $(BIN)/python tests/load/run.py $(if $(ADDRESS),--address $(ADDRESS)) $(LOAD_ARGS)

faults: $(DEV) ## Kills cores under load and checks what everybody was told (KILLS=1000 for more)
	@exec $(BIN)/python tests/faults/fault_run.py --kills $(KILLS) $(FAULT_ARGS)

deliveries: $(DEV) ## Kills cores and adapters, and checks what a platform was given (KILLS=1000 for more)
	@scripts/tools redis
	@exec $(BIN)/python tests/faults/delivery_run.py --kills $(KILLS) $(DELIVERY_ARGS)

simulate: $(DEV) ## Plays turns and faults in virtual time (SCHEDULES=1000000 for more)
	@exec $(BIN)/python tests/faults/simulation.py --schedules $(SCHEDULES)

seeded-bugs: $(DEV) ## Puts bugs into copies of the code and shows what catches them (BUGS="name ...")
	@exec $(BIN)/python tests/faults/seeded_bugs.py $(BUGS)

soak: $(DEV) ## Asks for very many turns, and tells what they leave behind (TURNS=1000000 for more)
	@scripts/tools redis || true
	@$(BIN)/python tests/faults/soak.py --turns $(TURNS) --store sqlite $(SOAK_ARGS)
	@exec $(BIN)/python tests/faults/soak.py --turns $(TURNS) --store redis $(SOAK_ARGS)

accepts: $(DEV) ## Traces acceptances: each is on the disk before it is told (ACCEPTS=1000)
	@exec $(BIN)/python tests/faults/accept_run.py --accepts $(ACCEPTS)

lock: $(DEV) ## Resolves the dependencies of pyproject.toml into requirements/
	scripts/lock

clean: ## Removes what the tasks made, environments and tools included
	rm -rf build dist .tools .venv-proto .venv-convert $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(RUN): requirements/run.txt pyproject.toml
	@scripts/venv $(VENV) requirements/run.txt --editable
	@touch $@

$(DEV): requirements/dev.txt pyproject.toml
	@scripts/venv $(VENV) requirements/dev.txt --editable
	@touch $(RUN) $@

$(GENERATOR): requirements/proto.txt
	@scripts/venv .venv-proto requirements/proto.txt
	@touch $@
