# Every target runs in the virtual environment .venv, which it makes first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.setup-stamp
PYTEST := $(BIN)/python -m pytest
# Processes that run the fast tests: make test TEST_WORKERS=0 runs them in one.
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-sglang lint format docs bench constraints clean

help:  ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv with all dependencies (needs Python >= 3.11 and a C++ compiler)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "setup: needs Python 3.11 or newer, and '$(PYTHON)' is older or missing; install one and name it: make setup PYTHON=/path/to/python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "setup: '$(PYTHON)' has no venv module: on Debian or Ubuntu run 'apt-get install python3-venv'"; exit 2; }
	@command -v $${CXX:-c++} >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || { \
	  echo "setup: hnswlib is compiled and needs a C++ compiler, but none was found; install one:"; \
	  echo "  Debian or Ubuntu: apt-get install g++ python3-dev     Fedora: dnf install gcc-c++ python3-devel     macOS: xcode-select --install"; exit 2; }
	@echo "setup: making $(VENV) (one or two minutes; torch is the largest download)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,encoders]'
	@touch $@

demo: setup  ## Run the whole system on this machine and see the reward rise (about four minutes)
	@$(BIN)/palimpsest demo

test: setup  ## Run the fast tests (under five minutes)
	@$(BIN)/lint-imports --no-logo >/dev/null || $(BIN)/lint-imports
	@$(PYTEST) -q -n $(TEST_WORKERS)

test-all: setup  ## Run all tests except those that need a real SGLang server
	@$(PYTEST) -q -m 'not sglang'

# To use another Python that has sglang, for example on a GPU machine: PALIMPSEST_SGLANG_PYTHON=/path/to/python make test-sglang
test-sglang: setup $(if $(PALIMPSEST_SGLANG_PYTHON),,$(SGLANG_STAMP))  ## Run the tests against a real SGLang server on a CPU (makes .venv-sglang, 2.5 GB)
	@$(PYTEST) -q -m sglang tests/sglang

# --no-deps: sglang declares dependencies that a CPU does not need; see tests/sglang/requirements-nodeps.txt.
$(SGLANG_STAMP): tests/sglang/requirements.txt tests/sglang/requirements-nodeps.txt
	@echo "test-sglang: making $(SGLANG_VENV) (a few minutes; torch is the largest download)"
	@test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	@$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/sglang/requirements.txt
	@$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/sglang/requirements-nodeps.txt
	@touch $@

lint: setup  ## Check format, lint, import contracts and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/pyright

format: setup  ## Format and apply automatic lint fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup  ## Write the generated documents: docs/config.md, docs/api.md, docs/metrics.md
	@$(BIN)/python docs/generate.py

bench: setup  ## Run every benchmark with --quick; each prints a JSON object as its last line
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python -P $$file --quick || exit 1; done

constraints: setup  ## Rewrite constraints.txt from the packages in .venv
	@{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/^torch==.*/torch==2.13.0/'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove .venv, .venv-sglang and caches, but not runs/
	rm -rf $(VENV) $(SGLANG_VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
