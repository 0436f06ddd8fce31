# Two commands do all: `make quickstart` trains on real images, `make test` proves that it works.
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart check format test test-faults test-docs test-landing test-kubernetes test-all fault-table golden bench gpu-check docs lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv with the locked dependencies

$(INSTALLED): requirements.lock requirements-uv.lock pyproject.toml $(wildcard orchestrator/data/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "error: PYTHON = $(PYTHON): Python 3.11 is needed. Way out: make PYTHON=/path/to/python3.11 ..."; exit 42; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	UV_HTTP_TIMEOUT=180 VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip sync --compile-bytecode --require-hashes requirements.lock
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --no-deps --editable .
	@touch $@

quickstart: install  ## pack real digits, train a ResNet-18 on two processes, evaluate, report
	$(BIN)/orchestrator shards make digits data/digits
	$(BIN)/orchestrator train experiment=quickstart

check: install  ## lint, format, types, import directions, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/codespell

format: install  ## rewrite the sources in the project's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install  ## the default suite
	$(BIN)/pytest

test-faults: install  ## a dozen cells of the fault matrix
	$(BIN)/pytest -m faults tests/faults

test-docs: install  ## every command of README and docs/reliability.md
	$(BIN)/pytest -m docs tests/test_docs.py

test-landing: install  ## a Job and a JobSet on a live cluster: sent, cancelled, resumed, killed
	$(BIN)/pytest -m landing tests/kube

test-kubernetes: install  ## runs on a live cluster: KUBECONFIG's, or that of a rig which is up
	$(BIN)/pytest -m cluster tests/kube

fault-table: install  ## every fault on every rank in every phase, and the table of docs/reliability.md
	$(BIN)/python tests/faults/table.py

test-all: install  ## the slow tests too
	$(BIN)/pytest -m "not gpu"

golden: install  ## write the golden manifests anew; read the difference before you commit it
	REWRITE_GOLDEN=1 $(BIN)/pytest -q tests/cluster/kubernetes/test_golden.py

bench: install  ## the figures of the README, paired, medians
	$(BIN)/python -m tests.bench

gpu-check: install  ## on a machine with one GPU: each GPU feature, ok or failed, with figures
	$(BIN)/python -m jobs.gpu_check

docs: install  ## draw the pictures of the README from the newest quick-start run (needs chromium)
	$(BIN)/python docs/draw.py

lock: install  ## resolve the dependencies anew
	$(BIN)/uv pip compile --quiet --upgrade --generate-hashes --extra dev --python-version 3.11 \
		--no-emit-package orchestrator -o requirements.lock pyproject.toml

clean:  ## remove what the quick start made, but not .venv
	rm -rf data runs
