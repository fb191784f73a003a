# moesim. `make` alone lists the targets. Needs Python 3.11 or newer: make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SETUP_FILES := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test scenarios check clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/.ready-torch ## set up, then answer the quickstart's three questions
	$(BIN)/moesim run scenarios/quickstart.yaml

test: $(VENV)/.ready-test ## set up, then run the tests
	$(BIN)/python -m pytest

scenarios: $(VENV)/.ready-torch ## run every scenario that ships and compare with scenarios/expected (some 7 minutes)
	$(BIN)/python scenarios/check.py

check: $(VENV)/.ready-dev ## style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/mypy moesim

clean: ## remove the virtual environment, caches and build files (results stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moesim needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11 ..." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-torch: $(SETUP_FILES) | $(BIN)/python
	$(INSTALL) -e '.[torch]'
	@touch $@

$(VENV)/.ready-test: $(SETUP_FILES) | $(BIN)/python
	$(INSTALL) -e '.[torch,hf,test]'
	@touch $@ $(VENV)/.ready-torch

$(VENV)/.ready-dev: $(SETUP_FILES) | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $@
