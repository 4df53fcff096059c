# Everything runs in .venv, made here from nothing but Python and pip.
# torch is pinned by constraints.txt. Where the package index serves CUDA builds of it, name a CPU index:
#   make demo PIP_FLAGS="--extra-index-url URL"
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
RUN := $(VENV)/bin/python -m
# Two test processes, one thread each: threads of two processes on one core slow each other tenfold.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint types study clean

demo: $(VENV)/installed
	OMP_NUM_THREADS=$$(nproc) $(RUN) foretoken.cli demo

test: $(VENV)/dev
	$(RUN) pytest -n auto -m "not slow"

test-all: $(VENV)/dev
	$(RUN) pytest -n auto

study: $(VENV)/dev
	$(VENV)/bin/python docs/study/regenerate.py

lint: $(VENV)/dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/dev
	$(RUN) pyright

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet $(PIP_FLAGS) -c constraints.txt torch
	$(RUN) pip install --quiet $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(RUN) pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
