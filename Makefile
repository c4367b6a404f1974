# `make demo` and `make test` are all that a fresh clone needs: they make the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-long lint check bench gpu-check clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: any other range may bring several GB of CUDA packages
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# outside of what processes import: beside a torch without CUDA its operators do not load, and tests define them
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/torchvision torchvision
	touch $@

demo: $(VENV)/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo/run.sh demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(WORKERS)

# Further cases of what `make test` covers: every family, dtype and target beside every other.
test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) -m long

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test test-long

# Minutes each; see benchmarks/README.md. They print ratios of two things measured in one run.
bench: $(VENV)/.ready
	for each in benchmarks/bench_*.py; do $(BIN)/python $$each || exit 1; done

# On a GPU machine: its own Python and packages, nothing installed. With DRY=1: rehearsed on the CPU, nothing measured.
gpu-check: $(if $(DRY),$(VENV)/.ready)
	$(if $(DRY),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(if $(DRY),--dry)

clean:
	rm -rf $(VENV) demo build dist *.egg-info
