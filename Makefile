# Python 3.11 or later, make and git are all that is needed: `make demo`, `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

DEMO := src/example_project/experiments/00_mnist_demo/hparams.py
SOURCES := src tests docs/conf.py $(wildcard benchmarks)

# One thread for each process: on few cores, many threads of many processes only wait for each other.
test sweep coverage: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help env demo test sweep check lint types layers dead-code dependencies docs format coverage bench bench-million constraints clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-14s%s\n", $$1, $$2 }'

env: $(VENV)/.complete ## Build .venv with everything in it, in locked versions

$(VENV)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; name it with PYTHON=...")'
	@echo "Building $(VENV): about a minute, more when PyTorch has to be downloaded"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,example]'
	@touch $@

demo: env ## Train the demo offline, then read held-out digits with it
	$(BIN)/train $(DEMO) --offline
	$(BIN)/infer $(DEMO) 00_mnist_demo-hparams data/predictions.csv

test: env ## Run the tests, without the long sweeps (ARGS="-k layers" for some)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not real_clearml" $(ARGS)

sweep: env ## Run the long sweeps: hundreds of kills and signals, about half an hour
	$(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

coverage: env ## Run the same tests, and demand 95 % of the lines and branches of torch_lab
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(JOBS) -m "not slow and not real_clearml" $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(VENV)/.peers ## Measure all costs, each against a peer, and write docs/performance.md (ARGS=--short prints a few)
	$(BIN)/python benchmarks/report.py $(ARGS)

bench-million: env ## Train a million steps, and write that part of docs/performance.md
	$(BIN)/python benchmarks/report.py --million $(ARGS)

# What the benchmarks compare with, and nothing else needs.
$(VENV)/.peers: $(VENV)/.complete
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]' \
		|| { echo "error: what make bench compares with (the extra \"bench\" of pyproject.toml) cannot be installed" >&2; exit 1; }
	@touch $@

check: lint types layers dead-code dependencies docs ## All that can be checked without a test

lint: env ## Format and lint
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: env ## Types, strictly
	$(BIN)/mypy

layers: env ## Imports point down only
	$(BIN)/lint-imports

dead-code: env ## Code that nothing uses
	$(BIN)/vulture

dependencies: env ## Imports and declared dependencies agree
	$(BIN)/deptry src

docs: env ## Build the documentation; a warning is an error
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

format: env ## Format, and mend what can be mended
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

constraints: ## Renew constraints.txt from a fresh environment (TORCH=2.13.0 to choose torch's version)
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet '.[dev,example,bench]' $(if $(TORCH),torch==$(TORCH))
	sed '/^$$/q' constraints.txt > .venv-lock/constraints.txt
	.venv-lock/bin/python -m pip freeze --all | sed -e '/^torch-lab /d' -e '/^pip==/d' -e 's/+[a-z0-9.]*$$//' >> .venv-lock/constraints.txt
	mv .venv-lock/constraints.txt constraints.txt
	rm -rf .venv-lock

clean: ## Remove the environment and everything built; data/ stays
	rm -rf $(VENV) .venv-lock docs/_build dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find src tests docs -name __pycache__ -type d -exec rm -rf {} +
