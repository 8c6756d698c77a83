# make demo | test | bench | info: each sets up .venv and builds the extension first, if that is not done yet.
# make gpu: on a machine with an NVIDIA GPU, with the Python, torch and nvcc that are there; needs no network.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint bench info gpu registers clean

demo: $(VENV)/built
	$(RUN) -m benchmarks.demo

test: lint
	$(RUN) -m pytest

lint: $(VENV)/built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(VENV)/bin/mypy

bench: $(VENV)/built
	$(RUN) -m pytest benchmarks --benchmark-json=benchmarks/results/cpu.json
	$(RUN) -m benchmarks.report benchmarks/results/cpu.json

info: $(VENV)/built
	$(RUN) -m tcm_fused info

gpu:
	$(PYTHON) -m benchmarks.gpu

registers: $(VENV)/built
	PYTHONPATH=tests $(RUN) tests/kernels/test_ptxas.py

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(shell find csrc -type f)
	$(VENV)/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info tcm_fused/*.so
