# Everything from a bare Python 3.11 with pip, git and make. `make` lists the targets.
PYTHON ?= python3
UV = PYTHONPATH=.uv $(PYTHON) -m uv
ACCEL ?=
LOCK = requirements$(ACCEL:%=-%).lock
READY = .venv/.ready$(ACCEL:%=-%)
RUN = .venv/bin/python

# Without bytecode on the disk every process compiles a hundred megabytes of libraries anew.
unexport PYTHONDONTWRITEBYTECODE
# Another environment of the caller's is not ours.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench bench-loop bench-data bench-gpu kills chaos points damages chaos-uploads lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.uv/.ready:
	@echo "· fetching uv"
	@$(PYTHON) -m pip install -q --disable-pip-version-check --root-user-action=ignore --target .uv uv && touch $@

$(READY): .uv/.ready $(LOCK) pyproject.toml
	@echo "· installing the locked packages into .venv (about 1.2 GB, a minute or two the first time)"
	@[ -x .venv/bin/python ] || $(UV) venv -q --python $(PYTHON) .venv
	@$(UV) pip sync -q --python .venv/bin/python --require-hashes $(LOCK)
	@$(UV) pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
	@rm -f .venv/.ready* && touch $@

demo: $(READY) ## train a small model on bundled text, through the whole pipeline, and show it (a few minutes)
	@.venv/bin/everstep demo

test: lint ## lint, then all tests
	@$(RUN) -m pytest -n 2

lint: $(READY) ## style, format and types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check -q .
	@.venv/bin/mypy

format: $(READY) ## rewrite the sources in the house's format
	@.venv/bin/ruff check -q --fix .
	@.venv/bin/ruff format -q .

bench: bench-loop ## what the trainer and the whole pipeline cost over a bare jitted loop, as tables
	@$(RUN) -m tests.benchmarks.overhead

bench-loop: $(READY) ## the trainer's part of it
	@$(RUN) -m tests.benchmarks.loop

bench-data: $(READY) ## what preparing 50 MB costs over the bare tokenizer, and what the loader gives
	@$(RUN) -m tests.benchmarks.preparation
	@$(RUN) -m tests.benchmarks.loader

bench-gpu: $(READY) ## on an accelerator: speed, utilisation, memory, a trace and equal bits, in minutes
	@$(RUN) -m tests.benchmarks.gpu

kills: $(READY) ## kill a preparation 20 times at random and compare its shards (`make test` does it three times)
	@EVERSTEP_KILLS=20 $(RUN) -m pytest --timeout 3000 tests/flows/test_prepare.py -k kill

chaos: $(READY) ## kill trainers 1,000 times (KILLS=n) at random moments, compare the ends of their runs, print a score card (an hour or two)
	@$(RUN) -m tests.faults.chaos --kills $(or $(KILLS),1000) --seed $(or $(SEED),0) 2>/dev/null

points: $(READY) ## stop a run at 200 drawn system calls that change its directory, and compare its end (POINTS=all: at each, hours)
	@$(RUN) -m tests.faults.points --points $(or $(POINTS),200) 2>/dev/null

damages: $(READY) ## damage the files of a checkpoint 10,000 times at random: none may pass unseen (`make test` does it 300 times)
	@JAX_PLATFORMS=cpu $(RUN) -m tests.faults.damages --trials $(or $(TRIALS),10000) --seed $(or $(SEED),0)

chaos-uploads: $(READY) ## publish 1,000 times to a bucket that fails 30 % of the time (`make test` does it 8 times)
	@EVERSTEP_UPLOADS=1000 $(RUN) -m pytest --timeout 3000 tests/tasks/test_gcs.py -k hostile

lock: .uv/.ready ## resolve requirements.lock anew
	@$(UV) pip compile -q pyproject.toml --group dev --universal --generate-hashes --no-annotate --no-header --no-emit-index-url --python-version 3.11 -o requirements.lock

clean: ## remove the environment and all caches of the tools
	@rm -rf .venv .uv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
