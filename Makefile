# make demo   a tiny mixture-of-experts model served by vLLM on this machine, with its routing live in the terminal
# make test   all checks and tests, as CI runs them
# make audit  known vulnerabilities in what moe-monitor depends on; needs the network
# demo and test set up what they need in .venv and skip what is done. Set VENV to use another folder.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export VENV

.PHONY: help demo test lint audit clean setup-demo setup-test
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup-demo ## serve a tiny MoE model and watch its routing live; options: make demo ARGS="--duration 60"
	@$(BIN)/moe-monitor demo $(ARGS)

test: lint ## all checks and tests; some of them: make test ARGS="-m 'not vllm'"
	@$(BIN)/python -m pytest $(ARGS)

lint: setup-test ## ruff, mypy, import contracts; all of them, whichever fails
	@code=0; \
	for check in "ruff check ." "ruff format --check ." "mypy" "lint-imports"; do \
		echo "-- $$check"; $(BIN)/$$check || code=1; \
	done; exit $$code

audit: ## look up what moe-monitor depends on in a database of vulnerabilities
	@$(PYTHON) scripts/audit.py $(ARGS)

setup-demo:
	@$(PYTHON) scripts/setup

setup-test:
	@$(PYTHON) scripts/setup --test

clean: ## remove the environment and all caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
