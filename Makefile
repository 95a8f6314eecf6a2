VENV := .venv
PYTHON := $(VENV)/bin/python
# Tests of a file share engines, so a file is not spread over processes.
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile

.PHONY: env demo test check wheel lint format

# Made once, and again when what it is made from changes.
env:
	@tests/env/make_env.sh $(VENV)

demo: env
	@$(PYTHON) -m benchmarks.demo

test: env lint wheel
	$(PYTEST)

# For every edit: no engine, under two minutes.
check: env lint
	$(PYTEST) tests/unit tests/kernels

# What a user installs, imported far from this checkout.
wheel: env
	tests/env/check_wheel.sh $(PYTHON)

lint: env
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: env
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
