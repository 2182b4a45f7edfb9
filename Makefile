# Two commands for users: `make train` and `make test`. Both need Python >= 3.11 and make, nothing else.
# The newest Python that constraints.txt has versions for, on PATH or among pyenv's: newer Pythons get a newer, faster jax.
# A name that pyenv knows and does not run is passed over.
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
PYTHONS := $(foreach name,3.13 3.12 3.11,python$(name) $(wildcard $(PYENV)/$(name).*/bin/python3)) python3
first_of = $(shell for python in $(1); do $$python -c "import venv" 2>/dev/null && echo $$python && break; done || true)
PYTHON ?= $(call first_of,$(PYTHONS))
OLDEST ?= $(call first_of,python3.11 $(wildcard $(PYENV)/3.11.*/bin/python3))
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= digits
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2
DIST ?= dist

.PHONY: train test test-oldest test-torch test-notebooks test-slow test-clean lint notebooks docs wheel clean

train: $(VENV)/.installed
	$(BIN)/pspinal-jax train $(RECIPE) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not torch" $(ARGS)

# What differs between Pythons and versions of JAX first: heads, their interop, files of earlier versions, the command line.
test-oldest:
	$(MAKE) test VENV=.venv-oldest PYTHON=$(OLDEST) \
	  ARGS="tests/heads tests/interop tests/compatibility tests/commands $(ARGS)"

test-torch: $(VENV)/.installed-torch
	$(BIN)/python -m pytest -m torch $(ARGS)

# The notebooks run from their committed source; test-slow has them too.
test-notebooks: $(VENV)/.installed-torch
	$(BIN)/python -m pytest -n $(WORKERS) -m slow tests/notebooks $(ARGS)

test-slow: $(VENV)/.installed-slow
	$(BIN)/python -m pytest -m slow $(ARGS)

# Every example in a new environment with its own extra only; 17 minutes on two busy cores.
test-clean: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/packaging/test_clean_environments.py $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs the notebooks and saves them, outputs and all, in place.
notebooks: $(VENV)/.installed-test
	$(BIN)/python notebooks/execute.py $(ARGS)

# The documentation site, offline; a warning fails. It begins at build/docs/index.html.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -b html -q -E -W --keep-going -c docs . build/docs

wheel: $(VENV)/.installed
	$(PIP_INSTALL) build
	$(BIN)/python -m build --wheel --outdir $(DIST)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pspinal_jax needs Python >= 3.11; try make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-torch: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[test,torch]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

$(VENV)/.installed-slow: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[test,torch,examples,docs,ray]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-torch $(VENV)/.installed-docs

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@ $(VENV)/.installed
