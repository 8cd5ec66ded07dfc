# Every command of the project. What runs here is what CI runs (.ci/run). `make` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Demo and tests start hundreds of processes, none of which needs to compile again what the one before has compiled.
unexport PYTHONDONTWRITEBYTECODE

STACK ?= sqlite
QUICK ?=
ARGS ?=
# Tests wait more than they compute, so there are more workers than cores, for those that count seconds one less; with
# WORKERS=0 all run in one process.
WORKERS ?=

BIN := .venv/bin
PY := $(BIN)/python
READY := .venv/.saga-ready
CORE := .venv/.saga-core
# A name of a Python 3.11 or newer; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	command -v $$name >/dev/null && $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$name; break; }; done)
UV := $(shell command -v uv)
CHECKED := $(wildcard saga examples benchmarks devservices tests docs/conf.py)
# pyright finds an installed package only outside the project's folder, with the environment's python first on PATH; it
# fails below 100 %.
VERIFY_TYPES = cd / && PATH="$(CURDIR)/$(BIN):$$PATH" PYRIGHT_PYTHON_IGNORE_WARNINGS=1 pyright --verifytypes saga --ignoreexternal

# The demo on servers needs their programs; on SQLite it needs Python packages only.
SERVICES_sqlite :=
SERVICES_sqlite-shared :=
SERVICES_postgres := postgres
SERVICES_postgres-rabbitmq := postgres rabbitmq
SERVICES_postgres-kafka := postgres kafka
SERVICES_mariadb := mariadb
SERVICES_mariadb-rabbitmq := mariadb rabbitmq
SERVICES_mariadb-kafka := mariadb kafka
SERVICES_all := postgres mariadb rabbitmq kafka
# The demo on SQLite waits for no more than it needs, unless the full environment is there anyway.
DEMO_READY := $(if $(SERVICES_$(STACK))$(wildcard $(READY)),$(READY),$(CORE))
# Workers take whole files: those of slow tests first (tests/conftest.py), and the servers are shared.
PYTEST = $(PY) -m pytest -n $(or $(WORKERS),$(1)) --dist loadfile --no-loadscope-reorder
WITH_SERVICES = $(if $(SERVICES_$(STACK)),$(PY) -m devservices run $(SERVICES_$(STACK)) --)

.PHONY: help
help: ## list the targets
	@echo "make TARGET [STACK=sqlite|sqlite-shared|postgres|mariadb|postgres-rabbitmq|postgres-kafka|mariadb-rabbitmq|mariadb-kafka|all] [QUICK=1] [WORKERS=4] [ARGS='...']"
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# uv where there is one, else pip: both install what the lock says, hash by hash.
ifneq ($(UV),)
INSTALL = $(UV) pip install --quiet --compile-bytecode --python $(PY)
MAKE_ENVIRONMENT = $(UV) venv --quiet --python $(PYTHON) .venv
else
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check
MAKE_ENVIRONMENT = $(PYTHON) -m venv .venv
endif

$(PY):
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install one or say PYTHON=/path/to/python"; exit 1; }
	@echo "set-up: virtual environment with $(or $(UV),pip) ($(PYTHON))"
	@$(MAKE_ENVIRONMENT) || { \
		echo "set-up: this Python cannot make virtual environments; trying Debian's package for it"; \
		rm -rf .venv; test "$$(id -u)" = 0 && apt-get update -qq </dev/null \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv </dev/null \
		&& $(MAKE_ENVIRONMENT); }

# What the library itself needs: enough for the demo on SQLite, and an eighth of the time.
$(CORE): requirements-core.lock | $(PY)
	@$(INSTALL) --require-hashes -r requirements-core.lock
	@touch $@

# Everything, and the library itself as a package that is this folder.
$(READY): requirements.lock pyproject.toml | $(PY)
	@echo "set-up: every package that development needs; with pip the first time takes a minute or two"
	@$(INSTALL) --require-hashes -r requirements.lock
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: setup
setup: $(READY) ## make the virtual environment from the lock file (other targets do it by themselves)

# On servers that are there already; what the command line says is in the environment of the recipe, and not shown by ps.
ifeq ($(origin DATABASE),command line)
.PHONY: demo
demo: $(READY)
	@DEMO_ON_DATABASE="$$DATABASE" DEMO_ON_BROKER="$${BROKER-}" $(PY) -m examples.money_transfer demo $(ARGS)
else
.PHONY: demo
demo: $(DEMO_READY) ## run the money transfer's scenarios: make demo, make demo STACK=postgres, STACK=all, or DATABASE=<url> BROKER=<url>
	$(if $(SERVICES_$(STACK)),@$(PY) -m devservices ensure $(SERVICES_$(STACK)))
	@$(WITH_SERVICES) $(PY) -m examples.money_transfer demo --stack $(STACK) $(ARGS)
endif

.PHONY: test test-slow test-again test-servers
test: $(READY) ## provide all servers if possible and run the tests: make test ARGS='-k outbox'
	@$(PY) -m devservices ensure postgres mariadb mysql rabbitmq kafka $(if $(CI),,|| true)
	@$(call PYTEST,4) -m "not slow" $(ARGS)

test-slow: $(READY) ## the same for those of more than ten seconds each: kills under load, demos, other programs
	@$(PY) -m devservices ensure postgres mariadb mysql rabbitmq kafka $(if $(CI),,|| true)
	@$(call PYTEST,3) -m slow $(ARGS)

test-servers: $(READY) ## what MariaDB and MySQL would show once more after PostgreSQL, and MySQL after MariaDB
	@$(PY) -m devservices ensure postgres mariadb mysql rabbitmq kafka
	@SAGA_TEST_EVERY_SERVER=1 $(call PYTEST,3) -k "mysql or mariadb" $(ARGS)

test-again: $(READY) ## what failed last, once more and one at a time
	@failed=$$($(PY) -c 'import json; print(len(json.load(open(".pytest_cache/v/cache/lastfailed"))))'); \
		test "$$failed" -le 5 || { echo "test-again: $$failed tests failed; more than five are no accident"; exit 1; }
	@$(call PYTEST,0) --last-failed --last-failed-no-failures=none $(ARGS)

.PHONY: features
features: $(READY) ## run all tests, write build/features.json and list which rows of features.md are open
	@$(PY) -m devservices ensure postgres mariadb mysql rabbitmq kafka || true
	@mkdir -p build
	@SAGA_TEST_EVERY_SERVER=1 $(call PYTEST,4) -q --features-json=build/features.json $(ARGS) || echo "features: some tests failed, see above"
	@$(PY) -m tests.plugins.features build/features.json

.PHONY: lint
lint: $(READY) ## ruff, mypy --strict, pyright on the public API, import contracts, our own source rules
	@echo "lint: ruff"; $(BIN)/ruff check $(CHECKED)
	@echo "lint: ruff format"; $(BIN)/ruff format --check $(CHECKED)
	@echo "lint: mypy"; $(BIN)/mypy $(CHECKED)
	@echo "lint: pyright --verifytypes saga"; $(VERIFY_TYPES)
	@echo "lint: import contracts"; $(BIN)/lint-imports
	@echo "lint: source rules"; $(PY) -m devservices.lint

.PHONY: format
format: $(READY) ## sort imports and format the code
	@$(BIN)/ruff check --select I --fix $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)

.PHONY: docs
docs: $(READY) ## build the pages of docs/ as a site, build/docs/index.html; a warning is an error
	@$(PY) -m sphinx --fail-on-warning --keep-going --quiet --doctree-dir build/doctrees docs build/docs $(ARGS)
	@echo "docs: build/docs/index.html"

.PHONY: chaos
chaos: $(READY) ## kill processes under load: make chaos STACK=postgres-rabbitmq MINUTES=20 ARGS='--kill-broker 5'
	$(if $(SERVICES_$(STACK)),@$(PY) -m devservices ensure $(SERVICES_$(STACK)))
	@$(PY) -m tests.chaos --stack $(STACK) --minutes $(or $(MINUTES),20) $(ARGS)

.PHONY: bench
bench: $(READY) ## measure against the naive form: make bench QUICK=1 STACK=postgres-rabbitmq, postgres or sqlite
	$(if $(SERVICES_$(STACK)),@$(PY) -m devservices ensure $(SERVICES_$(STACK)))
	@$(WITH_SERVICES) $(PY) -m benchmarks $(if $(QUICK),--quick) --stack $(STACK) $(ARGS)

COMPILE = $(or $(UV),$(BIN)/uv) pip compile pyproject.toml --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-annotate --custom-compile-command 'make lock' --quiet

.PHONY: lock
lock: $(READY) ## re-make both lock files from pyproject.toml: make lock ARGS=--upgrade
	@$(COMPILE) --all-extras --group dev --output-file requirements.lock $(ARGS)
	@$(COMPILE) --constraints requirements.lock --output-file requirements-core.lock $(ARGS)
	@! grep -nE '^(--|[^#].*://)' requirements*.lock || { echo "lock: an index address got into a lock file"; exit 1; }
	@grep -c == requirements*.lock | sed 's/^/lock: packages in /'

.PHONY: clean
clean: ## remove everything that these targets made
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find saga examples benchmarks devservices tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
