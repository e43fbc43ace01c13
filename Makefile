# One entry for people and machines. Everything runs from .venv, which `setup` makes when it is needed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready
SOURCES := sisa tests benchmarks scripts docs
BENCHMARKS ?= routing checkpoints object_storage training ingest large deletion orchestration scheduling serving serving_http streaming tables

.PHONY: help setup demo test test-all check lint types contracts text examples docs fix bench clean

help: ## List the targets (this is the default).
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## Make .venv with everything in it, so that .venv/bin/sisa works.

# Made again only when what it is made of changes.
$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@bash scripts/setup.sh "$(PYTHON)"
	@touch $@

demo: $(READY) ## Train on handwritten digits, delete some people, prove that they are gone.
	@$(BIN)/python scripts/demo.py

test: $(READY) ## Run the test suite.
	$(BIN)/python -m pytest

test-all: $(READY) ## Run the test suite and what takes longer: large soaks, every kill point.
	$(BIN)/python -m pytest -m ""

check: lint types contracts text examples docs ## Run every check but the tests, as CI does.

lint: $(READY) # Style, and what a linter can know of bugs.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) # Strict types.
	$(BIN)/mypy

contracts: $(READY) # The layers: an import the wrong way fails.
	$(BIN)/lint-imports --no-logo

text: $(READY) # No path of one machine and no registry's address in a tracked file.
	$(BIN)/python scripts/check_text.py

examples: $(READY) # Each example in a docstring or a page does what it says.
	$(BIN)/python scripts/check_examples.py

docs: $(READY) # The pages, with warnings as errors.
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

fix: $(READY) ## Mend what a tool can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Run the benchmarks (minutes); BENCHMARKS="routing training" picks some.
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python "benchmarks/$$name.py"; done

clean: ## Remove .venv and everything else that was built here.
	rm -rf .venv docs/_build dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
