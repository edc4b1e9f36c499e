# Two commands do everything: `make demo` and `make test`. Each makes .venv first, and reuses it
# for as long as pyproject.toml and the choices below stay the same.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.10 python3,$(if $(shell $(p) -c 'import sys; (3,10) <= sys.version_info < (3,13) and print(1)' 2>/dev/null),$(p))))
# The pin keeps a machine without a GPU from fetching CUDA packages where a CPU build is offered.
# A GPU machine: make TORCH=torch==2.11.0, or the name of the build you want.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(TORCH) $(PYTHON)' | cat - pyproject.toml | cksum | cut -d' ' -f1)
OUT ?= demo

.PHONY: demo test lint format clean check-machine
.DEFAULT_GOAL := help

help:
	@echo 'make demo    the whole way on a small real model, into $(OUT)/'
	@echo 'make test    lint, types and tests'
	@echo 'make format  format the sources'
	@echo 'make clean   remove the virtual environment and the demo output'

check-machine:
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.10-3.12 found; install one (Debian: apt-get install python3 python3-venv) or pass PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo 'error: $(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)' >&2; exit 1; }
	@command -v g++ >/dev/null || { echo 'error: g++ is missing; the engines are compiled with it (Debian: apt-get install g++)' >&2; exit 1; }

$(STAMP): pyproject.toml | check-machine
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' 'numpy<2'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]' --group dev
	@touch $@

demo: $(STAMP)
	$(BIN)/ffn-fusion demo -o $(OUT)

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OUT)
