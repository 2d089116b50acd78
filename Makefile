# `make run`   installs into .venv and runs the demo        `make check`      before a commit
# `make test`  installs and runs the whole suite            `make test-fast`  the quick part of it
# `make api`   writes docs/api from the docstrings
#
# PYTHON=python3.12 picks the interpreter, VENV=... the place, PYTEST_ARGS=... adds to pytest.

PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/demo
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
# Absolute: pip reads a relative constraint from whatever folder it happens to be in.
export PIP_CONSTRAINT := $(CURDIR)/constraints/cpu.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(PY) -m pip install --quiet
TORCH := $(shell grep '^torch==' constraints/cpu.txt)
# CI has the CPU build of torch; on a user's machine the build that fits it is right.
CHECK_ENV := $(PY) tools/check_env.py $(if $(CI),--expect-cpu)

.PHONY: run test test-fast check lint format api env clean

run: $(VENV)/.installed-run
	$(PY) -m vlbeit demo --run-dir $(RUN_DIR)

test: env
	$(PY) -m pytest -m "not gpu" $(PYTEST_ARGS)

test-fast: env
	$(PY) -m pytest -m "not slow and not fault and not gpu and not browser" $(PYTEST_ARGS)

check: lint test-fast

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c "from importlinter.cli import lint_imports_command as run; run()"

format: env
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

api: env
	$(PY) tools/api_pages.py

env: $(VENV)/.installed-dev

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlbeit needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone, so that no other package decides which torch it is.
$(VENV)/.installed-run: pyproject.toml constraints/cpu.txt | $(VENV)/.python
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[serve,fast]"
	$(CHECK_ENV)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints/cpu.txt | $(VENV)/.python
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[dev]"
	$(CHECK_ENV)
	@touch $@
