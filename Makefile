VENV := .venv
PYTHON := $(VENV)/bin/python
# Tests of a file share engines, so a file is not spread over processes. Files come as they are
# collected, engines first: otherwise those with the most tests would, and the slowest last.
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# The newest vLLM that works, and the part of the tests that every `make test` runs on it.
NEWEST := 0.33.0
# Tables, plots and the slow reference are the same on any vLLM.
ON_NEWEST := tests/engine/test_admission.py tests/engine/test_decoding.py tests/unit \
	--ignore tests/unit/test_explain_page.py --ignore-glob '*/test_quality*' \
	--ignore tests/unit/test_benchmarks.py --ignore tests/unit/test_shared_cases.py \
	--ignore tests/unit/test_ranks_report.py --ignore tests/unit/test_reference.py
VLLM ?= $(NEWEST)

.PHONY: env demo test test-slow fuzz check wheel check-vllm lint format

# Made once, and again when what it is made from changes.
env:
	@tests/env/make_env.sh $(VENV)

demo: env
	@$(PYTHON) -m benchmarks.demo

test: env lint wheel
	$(PYTEST)
	tests/env/check_vllm.sh $(PYTHON) $(NEWEST) $(ON_NEWEST)

# What starts so many processes that CI leaves it out: replicas, four and eight ranks, servers that
# are to die.
test-slow: env
	$(PYTHON) -m pytest -m slow tests/engine

# For every edit: no engine, about two minutes on two idle cores.
check: env lint
	$(PYTEST) tests/unit tests/kernels

# Random lives of requests, over real engines, for FUZZ_MINUTES (5). What fails says how to see it
# again, with FUZZ_ENGINE and FUZZ_SEED.
fuzz: env
	PYTHONPATH=tests:. $(PYTHON) -m fuzz

# What a user installs, imported far from this checkout.
wheel: env
	tests/env/check_wheel.sh $(PYTHON)

# All tests on another vLLM:  make check-vllm VLLM=0.33.0
check-vllm: env
	tests/env/check_vllm.sh $(PYTHON) $(VLLM)

lint: env
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: env
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
