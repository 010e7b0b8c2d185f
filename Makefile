# Each target sets up all it needs: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench bench-setup

demo: $(READY)
	$(BIN)/tricorn demo

test: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The systems that we are compared with, in an environment of their own.
bench-setup:
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet tensorflow-cpu==2.21.* ray==2.* torch==2.13.0 'numpy<3'

bench: $(READY)
	$(BIN)/python benchmarks/all.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tricorn needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[examples,test,lint]'
	touch $@
