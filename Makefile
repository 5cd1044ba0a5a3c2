# Everything happens in a private environment, .venv; only Python 3.11 or later and make are needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/pip --disable-pip-version-check
# two processes, each with whole files, whose fixtures are then made once; see tests/conftest.py
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
export PATH := $(CURDIR)/$(BIN):$(PATH)

QSPHERE_TEST_DEVICE ?= cuda

.PHONY: help demo test quick gpu lint docs descriptors clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(INSTALLED)  ## a two-site phantom: maps, reports, a harmonizer; prints where they are
	$(BIN)/python tools/demo.py

test: lint docs  ## everything that CI checks
	$(PYTEST)

quick: $(INSTALLED)  ## the tests that take seconds
	$(PYTEST) -m 'not slow'

gpu: $(INSTALLED)  ## all that computes on a GPU beside the CPU, and timings; minutes on one card
	QSPHERE_TEST_DEVICE=$(QSPHERE_TEST_DEVICE) $(BIN)/pytest tests/test_devices.py
	$(BIN)/python benchmarks/gpu.py --device $(QSPHERE_TEST_DEVICE)

lint: $(INSTALLED)  ## style, types, the direction of imports, the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint Dockerfile

docs: $(INSTALLED)  ## the documentation, into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

descriptors: $(INSTALLED)  ## write descriptors/ anew from the command line's parser
	$(BIN)/python tools/descriptors.py

clean:  ## remove the environment, the demo and every cache
	rm -rf $(VENV) demo site build dist .*_cache .hypothesis
	find bidsapp tests tools -name __pycache__ -prune -exec rm -rf {} +

# torch first and at its pinned version: a looser request would bring another build
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[test,lint,docs]'
	$(PIP) check
	touch $@
