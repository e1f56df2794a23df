# The two commands of the README, and what developers use. Each makes .venv first when it is missing.
PYTHON ?= python3
PROMPT ?= Once upon a time
MODEL ?= pocket
export PROMPT MODEL

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INPUTS := pyproject.toml CMakeLists.txt $(wildcard metal_kernels/*.metal cpu_kernels/*)

.PHONY: generate test lint dist clean

generate: .venv/.installed  ## write text: make generate PROMPT="The little robot was"
	@$(BIN)/python -m mlx_edge.generate --model "$$MODEL" --prompt "$$PROMPT"

test: .venv/.installed-test  ## run all tests
	@$(BIN)/python -m pytest

lint: .venv/.installed-dev  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: .venv/.installed-dev  ## wheel and source archive in dist/
	@rm -rf dist && $(BIN)/python -m build --outdir dist .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "mlx_edge needs Python 3.11 or later as '$(PYTHON)'; name another one with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "mlx_edge needs Python's venv module: on Debian, apt install python3-venv"; exit 1; }
	@echo "Making .venv ..." && $(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python $(INPUTS)
	@echo "Installing mlx_edge into .venv (a minute the first time) ..."
	@$(PIP) --editable . && touch $@

.venv/.installed-test: .venv/bin/python $(INPUTS)
	@echo "Installing mlx_edge and what its tests need into .venv (two minutes the first time) ..."
	@$(PIP) --editable '.[test]' && touch .venv/.installed $@

.venv/.installed-dev: .venv/bin/python $(INPUTS)
	@echo "Installing mlx_edge, its tests' needs and the developers' tools into .venv ..."
	@$(PIP) --editable '.[test,dev]' && touch .venv/.installed .venv/.installed-test $@

clean:
	rm -rf .venv build dist
