# Everything from a bare Python 3.11 with pip, git and make. `make` lists the targets.
PYTHON ?= python3
UV = PYTHONPATH=.uv $(PYTHON) -m uv
READY = .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help test lint format lock clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.uv/.ready:
	@echo "· fetching uv"
	@$(PYTHON) -m pip install -q --target .uv uv && touch $@

$(READY): .uv/.ready requirements.lock pyproject.toml
	@echo "· installing the locked packages into .venv"
	@[ -x .venv/bin/python ] || $(UV) venv -q --python $(PYTHON) .venv
	@$(UV) pip sync -q --python .venv/bin/python --require-hashes requirements.lock
	@$(UV) pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
	@touch $@

lint: $(READY) ## style, format and types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check -q .
	@.venv/bin/mypy

test: lint ## lint, then all tests
	@.venv/bin/python -m pytest -n 2

format: $(READY) ## rewrite the sources in the house's format
	@.venv/bin/ruff check -q --fix .
	@.venv/bin/ruff format -q .

lock: .uv/.ready ## resolve requirements.lock anew
	@$(UV) pip compile -q pyproject.toml --group dev --universal --generate-hashes --no-annotate --no-header --no-emit-index-url --python-version 3.11 -o requirements.lock

clean: ## remove the environment and all caches of the tools
	@rm -rf .venv .uv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
