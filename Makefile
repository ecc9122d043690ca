# What people and CI run. Settings: PYTHON (3.11 or newer), VENV, ARGS (for test, docs and bench), WORKERS (processes of
# the tests), and TORCH_INDEX, from which torch alone is installed: https://download.pytorch.org/whl/cpu is a tenth of
# the default build.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install
PIP_DOWNLOAD := $(BIN)/python -m pip --disable-pip-version-check -q download
# Only files whose hashes requirements/ lists; nothing beside them, as each file is complete.
LOCKED := $(PIP) --no-deps --require-hashes
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
IN_PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.DELETE_ON_ERROR:
.PHONY: up test test-slow check fmt bench docs lock clean

up: $(VENV)/.installed-cpu
	@exec $(BIN)/polyhead up

test: $(VENV)/.installed-dev
	$(IN_PARALLEL) -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(IN_PARALLEL) -m slow $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml

fmt: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.installed-dev
	$(PYTEST) tests/docs $(ARGS)

lock:
	requirements/lock.sh

clean:
	rm -rf $(VENV) build dist polyhead.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment without pip, as it is left where ensurepip is missing, would look finished to the next run.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The stamps are newer than what was installed from; dev holds all that cpu does.
$(VENV)/.installed-cpu: pyproject.toml requirements/torch.txt requirements/cuda.txt requirements/up.txt | $(BIN)/python
	@echo "installing into $(VENV): this downloads some 0.5 GB, or several GB with CUDA, and takes minutes"
	@# The build that pip would take by itself, checked by its hash: among several pip prefers one whose index gives it.
	$(PIP_DOWNLOAD) -d $(VENV)/torch --no-deps -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(LOCKED) --no-index --find-links $(VENV)/torch -r requirements/torch.txt
	@rm -rf $(VENV)/torch
	@# PyPI's build for Linux needs the libraries of CUDA, that of the CPU index does not.
	if ! ls -d $(VENV)/lib/python3*/site-packages/torch-*+cpu.dist-info >/dev/null 2>&1; then $(LOCKED) -r requirements/cuda.txt; fi
	$(LOCKED) -r requirements/up.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-cpu requirements/dev.txt
	$(LOCKED) -r requirements/dev.txt
	@touch $@
