VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: env demo test lint

# Made once, and again when what it is made from changes.
env:
	@tests/env/make_env.sh $(VENV)

demo: env
	@$(PYTHON) -m benchmarks.demo

test: env
	$(PYTHON) -m pytest

lint: env
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
