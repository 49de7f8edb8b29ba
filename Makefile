# Every target works on its own from a fresh clone: it needs Python 3.11 or later, make and pip.

PYTHON ?= python3
# The CPU build where the index has one; a device's own build goes into an environment of yours, not into this one.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help setup demo test lint format bench clean

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make .venv with the package in it, editable, and its console script

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install --editable '.[runtime,dev]'
	@touch $@

demo: $(READY) ## make a small DeepSeek-shaped checkpoint, split, verify and merge it, and show what happened
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: $(READY) ## run the tests; ARGS='-k plan' picks some
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put the code into the house's form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## speed and memory against copying and against the peers, as ratios; ARGS='--runs 3'
	$(BIN)/python -m benchmarks.split $(ARGS)

clean: ## remove what the targets made
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
