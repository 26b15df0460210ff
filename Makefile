# `make help` lists the targets. Every variable can be set on the command line: make serve PORT=9000 MODEL=/models/llama

PYTHON ?= python3
VENV ?= .venv

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= demo
DTYPE ?= auto
INTERVENTIONS ?= interventions
ARGS ?=

# pyreft, which tests compare with, pins packages that would replace ours: it is installed without its dependencies.
PYREFT_NEEDS := matplotlib evaluate datasets scikit-learn protobuf networkx

BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help serve bench test lint types format clean
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables of serve: HOST=$(HOST) PORT=$(PORT) MODEL=$(MODEL) DTYPE=$(DTYPE) INTERVENTIONS=$(INTERVENTIONS);"
	@echo "ARGS holds further options of 'reft serve'. PYTHON=$(PYTHON) makes the environment in VENV=$(VENV)."

serve: $(VENV)/.installed ## Serve MODEL with the interventions of a folder, on HOST:PORT
	@exec $(BIN)/reft serve --model $(MODEL) --interventions $(INTERVENTIONS) --host $(HOST) --port $(PORT) --dtype $(DTYPE) $(ARGS)

bench: $(VENV)/.installed ## Measure whole runs: base, base with tasks, model.generate, the floor
	@$(BIN)/python -m benchmarks.throughput $(ARGS)

test: lint types ## Check everything: lint, types, import directions, all tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test ## Check style and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed-test ## Check the types
	$(BIN)/mypy

format: $(VENV)/.installed-test ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and every cache in the working tree (not the demo model)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip install with the pinned versions; one retry, because registries do have hiccups.
define install
	@pip="$(BIN)/python -m pip install -qq --constraint constraints.txt"; \
	$$pip $(1) || { echo "The installation failed; trying once more." >&2; sleep 3; $$pip $(1); }
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and PYTHON=$(PYTHON) is not. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the pinned packages into $(VENV) (the first time takes some minutes)" >&2
	$(call install,--editable .)

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing the test tools into $(VENV)" >&2
	$(call install,--editable '.[test]')
	$(call install,$(PYREFT_NEEDS))
	$(call install,--no-deps pyreft pyvene)
