# The one door to the project: `make` lists the targets. Each makes what it needs and no more.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
NODE_SERVERS := requirements/servers.txt
SOURCES := esper_ray tests docs

# A stamp is touched last, so an interrupted step is done again and a finished one costs nothing.
VENV_STAMP := $(VENV)/.created
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
NODE_STAMP := $(VENV)/.installed-node

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1

.DEFAULT_GOAL := help
.PHONY: help setup servers run test soak chaos check bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

setup: $(DEV_STAMP) servers ## make .venv with everything that development needs

servers: $(NODE_STAMP) ## install the object stores of the tests that come by npm

run: $(RUN_STAMP) ## grow the example model through Ray actors
	@$(BIN)/esper-ray train examples/stdlib_lm.yaml --resume never

# Every object store must be there: a test whose server is absent fails instead of being skipped.
test soak chaos: export ESPER_REQUIRE_SERVERS = 1
# Two processes of one thread each, as threads that share one small operation wait for one another:
# ten times as long on a busy machine. The tests of a file share what it starts.
test soak chaos: export OMP_NUM_THREADS = 1
PARALLEL := -n 2 --dist loadfile

test: $(DEV_STAMP) $(NODE_STAMP) ## run the short tests with branch coverage
	@$(BIN)/python -m pytest $(PARALLEL) -m "not soak and not gpu" --cov --cov-report=term-missing:skip-covered

soak: $(DEV_STAMP) $(NODE_STAMP) ## run the long tests
	@$(BIN)/python -m pytest $(PARALLEL) -m "soak and not gpu and not chaos" --timeout=1800

chaos: $(DEV_STAMP) ## kill parts of runs, more than a hundred times; ESPER_CHAOS_SEED=N says when
	@$(BIN)/python -m pytest -s -m chaos

check: $(DEV_STAMP) ## format, lint, types, import walls
	@$(BIN)/ruff format --check --quiet $(SOURCES) || { \
		echo "error: the files above are not formatted: $(BIN)/ruff format $(SOURCES)" >&2; exit 1; }
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(RUN_STAMP) ## measure training steps, the state of seeds and their layers
	@$(BIN)/esper-ray bench step
	@$(BIN)/esper-ray bench state
	@$(BIN)/esper-ray bench layer

docs: $(RUN_STAMP) ## write the generated pages anew
	@$(BIN)/python -m docs.generate

clean: ## remove caches, builds and .venv; runs/ stays
	@rm -rf $(VENV) build dist htmlcov *.egg-info .coverage .coverage.* \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find esper_ray tests docs examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_STAMP):
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: $(PYTHON) not found: install Python 3.11 to 3.13, or make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "error: $$($(PYTHON) -V 2>&1) cannot be used, 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first and by its exact pin, so that the index's newest build is never picked up.
$(RUN_STAMP): pyproject.toml $(CONSTRAINTS) | $(VENV_STAMP)
	@echo "installing what a run needs into $(VENV) (minutes on the first time)"
	@$(BIN)/python -m pip install -qq "$$(grep '^torch==' $(CONSTRAINTS))"
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e .
	@touch $@

$(DEV_STAMP): pyproject.toml $(CONSTRAINTS) | $(VENV_STAMP)
	@echo "installing the development environment into $(VENV) (minutes on the first time)"
	@$(BIN)/python -m pip install -qq "$$(grep '^torch==' $(CONSTRAINTS))"
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[dev,demo]'
	@touch $(RUN_STAMP) $@

$(NODE_STAMP): $(NODE_SERVERS) | $(VENV_STAMP)
	@command -v npm >/dev/null || { \
		echo "error: npm not found: install Node.js 20 or newer (Debian: apt-get install nodejs npm)" >&2; exit 1; }
	@echo "installing the object stores of the tests into $(VENV)/node"
	@npm install --silent --no-audit --no-fund --no-save --prefix $(VENV)/node $$(cat $(NODE_SERVERS))
	@touch $@
