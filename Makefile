# Two commands on a fresh machine: `make probe` and `make test`. Each sets up what it needs first, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
SPEC ?= examples/gpt2.yaml
# GPU type to plan for. Empty: the planner takes this machine's GPU where there is one, else a virtual h200, and says so.
GPU ?=
# Processes that run tests at the same time, and further arguments for pytest: make test ARGS="-k search".
JOBS ?= 2
ARGS ?=

# Another release of torch to test predictions under: make test-torch TORCH=2.10.0.
TORCH ?= 2.11.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup probe test test-gpu test-torch lint typecheck check format serve browser lock wheel clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv and install the pinned versions into it
	@echo "$(VENV) is ready."

probe: $(READY) ## Plan examples/gpt2.yaml (SPEC=... GPU=...), print the plans and store them
	@$(BIN)/planner probe "$(SPEC)" $(if $(GPU),--gpu "$(GPU)")

test: $(READY) browser ## Run every test that needs no GPU (ARGS=... for pytest)
	@echo "Running the tests on $(JOBS) processes ..."
	@$(BIN)/python -m pytest -m "not gpu" -n $(JOBS) $(ARGS)

test-gpu: $(READY) ## Run the tests that need a CUDA GPU, one at a time
	@$(BIN)/python -m pytest -m gpu $(ARGS)

test-torch: $(READY) ## Test predictions under another torch (TORCH=..., some GiB), beside the other packages of .venv
	@$(BIN)/python -m venv $(VENV)-torch-$(TORCH)
	@$(VENV)-torch-$(TORCH)/bin/python -m pip install -q "torch==$(TORCH)" numpy
	@other=$$($(VENV)-torch-$(TORCH)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	   $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$other/planner.pth"
	@$(VENV)-torch-$(TORCH)/bin/python -m pytest tests/test_virtual_*.py $(ARGS)

lint: $(READY) ## Check style and formatting with ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

typecheck: $(READY) ## Check types with mypy, strictly
	@$(BIN)/mypy

check: lint typecheck test ## All that must pass before a change lands

format: $(READY) ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

serve: $(READY) ## Start the service and its pages on http://127.0.0.1:8000
	@$(BIN)/planner serve

browser: $(READY) # The page tests drive a real Chromium
	@.ci/chromium "$(BIN)/python"

lock: $(READY) ## Write the installed versions to requirements.lock
	@{ grep '^#' requirements.lock; \
	   $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude planner \
	   | sed -E 's/^([^=]+==[^+]+)\+.*$$/\1/' | grep -vE '^(#|nvidia-|triton==)' | sort -f; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

wheel: $(READY) ## Build the wheel into dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: planner needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1);" \
	       "name another one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' lacks the venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)

$(READY): requirements.lock pyproject.toml | $(BIN)/python
	@echo "Installing the versions pinned in requirements.lock (the first time takes minutes: torch is large) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@echo "Installing planner itself ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)
