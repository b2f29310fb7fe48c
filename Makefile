# Everything runs from a virtual environment in .venv, which any target makes when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.setup-stamp
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-sglang lint format docs bench constraints clean

help:  ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv with everything (needs Python >= 3.11 and a C++ compiler)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "setup: needs Python 3.11 or newer, and '$(PYTHON)' is not: install one, or give it: make setup PYTHON=/path/to/python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "setup: '$(PYTHON)' has no venv module: on Debian or Ubuntu run 'apt-get install python3-venv'"; exit 2; }
	@command -v $${CXX:-c++} >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || { \
	  echo "setup: hnswlib is compiled here and needs a C++ compiler, and none was found:"; \
	  echo "  Debian or Ubuntu: apt-get install g++ python3-dev     Fedora: dnf install gcc-c++ python3-devel     macOS: xcode-select --install"; exit 2; }
	@echo "setup: making $(VENV) (a minute or two; torch is the largest download)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,encoders]'
	@touch $@

demo: setup  ## The whole system on this machine: a reward that rises, in about four minutes
	@$(BIN)/palimpsest demo

test: setup  ## Fast tests (under five minutes)
	@$(BIN)/lint-imports --no-logo >/dev/null || $(BIN)/lint-imports
	@$(PYTEST) -q

test-all: setup  ## All tests but those that need a real SGLang server
	@$(PYTEST) -q -m 'not sglang'

# Another python that has sglang, say that of a machine with a GPU: PALIMPSEST_SGLANG_PYTHON=/path/to/python make test-sglang
test-sglang: setup $(if $(PALIMPSEST_SGLANG_PYTHON),,$(SGLANG_STAMP))  ## Tests against a real SGLang server, on a CPU (makes .venv-sglang, 2.5 GB)
	@$(PYTEST) -q -m sglang tests/sglang

# Quiet about what sglang says that it needs and a CPU does not: see tests/sglang/requirements-nodeps.txt.
$(SGLANG_STAMP): tests/sglang/requirements.txt tests/sglang/requirements-nodeps.txt
	@echo "test-sglang: making $(SGLANG_VENV) (a few minutes; torch is the largest download)"
	@test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	@$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/sglang/requirements.txt
	@$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/sglang/requirements-nodeps.txt
	@touch $@

lint: setup  ## Format, lint, import contracts, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/pyright

format: setup  ## Format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup  ## Write the generated documents: docs/metrics.md
	@$(BIN)/python -m learner.metrics.document docs/metrics.md

bench: setup  ## Every benchmark, quickly; each prints one JSON object as its last line
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python -P $$file --quick || exit 1; done

constraints: setup  ## Write constraints.txt anew from what .venv holds
	@{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/^torch==.*/torch==2.13.0/'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove .venv, .venv-sglang and caches (runs/ stays)
	rm -rf $(VENV) $(SGLANG_VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
