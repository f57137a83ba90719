# Everything a newcomer needs: `make demo` and `make test`. `make help` lists the rest.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := .ci/requirements.lock
SECONDS := 60
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: pyproject.toml $(LOCK) cffi_build/hatch_build.py
	@$(PYTHON) cffi_build/build.py --tools
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --require-hashes --requirement $(LOCK)
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

setup: build ## virtual environment in .venv, with pyvmm on its path

build: $(VENV)/.ready ## compile what has changed: the C extension and the guests
	@$(BIN)/python cffi_build/build.py

demo: build ## run guests, look at them, save and restore one
	@BIN=$(BIN) sh .ci/demo

test: build ## run the tests
	@BIN=$(BIN) sh .ci/test

fuzz: build ## fuzz what reads hostile input: SECONDS=60 for each of TARGETS="frames stream ..." (all)
	@$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) $(TARGETS)

bench: build ## measure all, and what each technique brings: data, plots and a page in out/bench
	@mkdir -p out/bench
	@$(BIN)/pyvmm bench all --output out/bench/results.json --report out/bench

bench-quick: build ## run each benchmark small and short: does it run, and yield what it promises?
	@mkdir -p out/bench-quick && rm -f out/bench-quick/results.json
	@$(BIN)/pyvmm bench all --quick --check --output out/bench-quick/results.json > out/bench-quick/tables.txt

check: build ## ruff, mypy strict, C warnings as errors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python cffi_build/build.py --check

lock: $(VENV)/.ready ## pin the newest versions that pyproject.toml allows
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--upgrade --extra dev --output-file $(LOCK) pyproject.toml

clean: ## remove what was built
	rm -rf $(VENV) build out dist cffi_build/generated pyvmm/guests/*.elf pyvmm/_native.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup build demo test fuzz bench bench-quick check lock clean
