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
# A CUDA build of torch brings the Triton that it needs. On a CPU tests run the kernels in this one's interpreter.
TRITON := triton==3.9.0
# A name of its own, because `call` would split it at the comma.
TEST_EXTRAS := .[bench,test]

BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help serve bench bench-peers test test-long test-clients lint types format models vendor clean
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables of serve: HOST=$(HOST) PORT=$(PORT) MODEL=$(MODEL) DTYPE=$(DTYPE) INTERVENTIONS=$(INTERVENTIONS);"
	@echo "ARGS holds further options of 'reft serve'. PYTHON=$(PYTHON) makes the environment in VENV=$(VENV)."

serve: $(VENV)/.installed ## Serve MODEL with the interventions of a folder, on HOST:PORT
	@exec $(BIN)/reft serve --model $(MODEL) --interventions $(INTERVENTIONS) --host $(HOST) --port $(PORT) --dtype $(DTYPE) $(ARGS)

bench: $(VENV)/.installed ## Measure whole runs: base, tasks, HTTP, transformers, the floor
	@$(BIN)/python -m benchmarks.throughput $(ARGS)

bench-peers: $(VENV)/.installed-bench $(VENV)-vllm/.installed $(VENV)-peers/.installed ## The same beside vLLM, PEFT and pyreft, with plots in build/; over an hour
	@$(BIN)/python -m benchmarks.throughput --vllm $(VENV)-vllm/bin/python --peers $(VENV)-peers/bin/python \
		--out build/bench-peers.json $(ARGS)
	@$(BIN)/python -m benchmarks.throughput_plots build/bench-peers.json build

test: export PYTHONDONTWRITEBYTECODE :=
test: lint types ## Check everything: lint, types, import directions, all tests
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(VENV)/.installed-test ## Run the documents' trainings as they are written, and what tests try many of: random schedules, forms
	$(BIN)/python -m pytest -m long $(ARGS)

test-clients: $(VENV)/.installed $(VENV)-clients/.installed ## Run openai, LangChain and other clients against a server of the demo model
	REFT_SERVER_PYTHON=$(abspath $(BIN)/python) $(VENV)-clients/bin/python -m pytest -m clients tests/clients $(ARGS)

lint: $(VENV)/.installed-test ## Check style and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed-test ## Check the types
	$(BIN)/mypy

format: $(VENV)/.installed-test ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

models: $(VENV)/.installed ## Try a tiny model of every decoder family of transformers, and write the table of docs/models.md; minutes
	@$(BIN)/python -m tools.models $(ARGS)

vendor: ## Fetch the page's libraries anew with npm, at the versions that tools/vendor.py names
	$(PYTHON) -m tools.vendor

clean: ## Remove the environments and every cache in the working tree (not the demo model)
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-peers $(VENV)-clients build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

CONSTRAINT = --constraint constraints.txt

# pip install with the pinned versions, its progress shown: this takes minutes. One retry, because
# registries do have hiccups.
define install
	@pip="$(BIN)/python -m pip install $(CONSTRAINT)"; \
	$$pip $(1) || { echo "The installation failed; trying once more." >&2; sleep 3; $$pip $(1); }
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and PYTHON=$(PYTHON) is not. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (the first time takes some minutes)" >&2
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade $(CONSTRAINT) pip  # older ones are silent while they unpack
	$(call install,--editable .)

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing the test tools into $(VENV)" >&2
	$(call install,--editable '$(TEST_EXTRAS)')
	$(call install,$(PYREFT_NEEDS))
	$(call install,--no-deps pyreft pyvene)
	@if [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -c 'import triton' 2>/dev/null; then \
		$(BIN)/python -m pip install -qq --no-deps $(TRITON); fi

$(VENV)/.installed-bench: $(VENV)/.installed
	$(call install,--editable '.[bench]')

# What only measurements need has environments of its own.
$(VENV)-vllm/.installed: BIN = $(VENV)-vllm/bin
$(VENV)-vllm/.installed: CONSTRAINT = --no-deps
$(VENV)-vllm/.installed: benchmarks/peers/requirements-vllm.txt
	@$(PYTHON) -m venv --clear $(VENV)-vllm
	@echo "Installing vLLM into $(VENV)-vllm (3.4 GB)" >&2
	$(call install,--requirement benchmarks/peers/requirements-vllm.txt)

$(VENV)-peers/.installed: BIN = $(VENV)-peers/bin
$(VENV)-peers/.installed: constraints.txt
	@$(PYTHON) -m venv --clear $(VENV)-peers
	@echo "Installing PEFT and pyreft into $(VENV)-peers" >&2
	$(call install,torch transformers accelerate peft $(PYREFT_NEEDS))
	$(call install,--no-deps pyreft pyvene)

# What other projects' clients need has one, too: a server is tested from outside, without torch.
$(VENV)-clients/.installed: BIN = $(VENV)-clients/bin
$(VENV)-clients/.installed: CONSTRAINT = --no-deps
$(VENV)-clients/.installed: tests/clients/requirements.txt
	@$(PYTHON) -m venv --clear $(VENV)-clients
	@echo "Installing the clients into $(VENV)-clients (1.2 GB)" >&2
	$(call install,--requirement tests/clients/requirements.txt)
