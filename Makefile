# Creates the CPU environment and runs everything in it. `make help` lists the targets.

PYTHON = python3
VENV = .venv
TORCH_INDEX =

BIN = $(VENV)/bin
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CREATED = $(VENV)/.created-with-python-$(PYTHON_VERSION)
TORCH = $(VENV)/.torch-installed
INSTALLED = $(VENV)/.installed
TRITON = $(VENV)/.triton-installed
# The engine is installed without its CUDA packages on purpose (requirements/engine.txt): no warnings about that.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-warn-conflicts --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-unit test-distributed test-e2e lint format typecheck clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12    use another interpreter (a $(VENV) made with a different version is replaced)"
	@echo "  TORCH_INDEX=URL      take the torch wheel from this package index, e.g. one with CPU-only wheels"
	@echo "  VENV=DIR             put the environment there instead of $(VENV)"

install: $(INSTALLED) ## Create the environment

quickstart: $(INSTALLED) ## Train a tiny Qwen2 with CE-GPPO on this machine's CPU, from nothing to a result
	@$(BIN)/python -m examples.quickstart.run

test test-unit test-distributed test-e2e: export OMP_NUM_THREADS = 1

test: $(INSTALLED) $(TRITON) ## Run all tests
	@$(BIN)/python -m pytest --durations 20 tests

test-unit: $(INSTALLED) $(TRITON) ## Run the tests that need one process and seconds
	@$(BIN)/python -m pytest tests/unit

test-distributed: $(INSTALLED) ## Run the tests with several ranks over gloo
	@$(BIN)/python -m pytest tests/distributed

test-e2e: $(INSTALLED) ## Run the tests with real SGLang servers
	@$(BIN)/python -m pytest tests/e2e

lint: $(INSTALLED) ## Check formatting and code with ruff
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

format: $(INSTALLED) ## Format the code and apply ruff's safe fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

typecheck: $(INSTALLED) ## Check types with mypy
	@$(BIN)/mypy

clean: ## Remove the environment, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written when its step has succeeded, so an interrupted installation is taken up again.
# Each is a real prerequisite of the next: whatever replaces the environment makes all later steps run again.

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is $(PYTHON_VERSION). Fix: make PYTHON=python3.12")'
	@echo "Creating $(VENV) with Python $(PYTHON_VERSION)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(TORCH): $(CREATED) requirements/torch.txt
	@echo "Installing PyTorch"
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --requirement requirements/torch.txt
	@touch $@

$(INSTALLED): $(TORCH) requirements/engine.txt requirements/engine-imports.txt requirements/constraints.txt pyproject.toml
	@echo "Installing SGLang for the CPU, Megatron-Core and megatron-gppo (one to a few minutes)"
	@$(PIP_INSTALL) --no-deps --requirement requirements/engine.txt
	@$(PIP_INSTALL) --constraint requirements/torch.txt --constraint requirements/constraints.txt \
		--requirement requirements/engine-imports.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# Where only tests/unit/test_tile_kernels.py finds it: in the environment itself, Megatron and torch would act as on a GPU.
$(TRITON): $(CREATED) requirements/triton.txt
	@echo "Installing Triton, for tests of the GPU's kernels on the CPU"
	@$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/triton --requirement requirements/triton.txt
	@touch $@
