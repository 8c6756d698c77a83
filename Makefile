# make demo | test | docs | bench | info: each sets up .venv and builds what it needs first, if that is not done yet.
# make gpu: on a machine with an NVIDIA GPU, with the Python, torch and nvcc that are there; needs no network.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# A process for each core, eight at most; files stay whole, as their fixtures compile and start processes. In the order
# of their names, so that small files come last and no process waits long for another.
PYTEST := $(RUN) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

TORCH ?= 2.13.0 2.11.0

.PHONY: demo test quick lint docs bench info gpu registers wheel clean

demo: $(VENV)/built
	$(RUN) -m benchmarks.demo

test: lint
	$(PYTEST)

# Under a minute: definition, loss on each backend, errors, and something of each folder of tests.
quick: $(VENV)/built
	$(PYTEST) --quick $(addprefix tests/, loss/test_oracle.py loss/test_loss.py loss/test_groups.py \
		loss/test_inputs.py loss/test_module.py loss/test_errors.py \
		kernels/test_triton.py::test_every_kind_of_tile kernels/test_triton_edges.py::test_no_pairs kernels/test_ptxas.py \
		thresholds/test_opis.py thresholds/test_calibration.py thresholds/test_opis_errors.py \
		integrations/test_pytorch_metric_learning.py benchmarks/test_report.py build/test_build.py build/test_info.py)

lint: $(VENV)/built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(VENV)/bin/mypy

# Every page in build/pages by a link to it, so that links between pages are the same there as in the repository. Not
# --quiet: warnings that are not shown do not count as errors.
docs: $(VENV)/documents
	mkdir -p build/pages/benchmarks
	for page in README.md CONTRIBUTING.md CHANGELOG.md LICENSE docs; do ln -sfn ../../$$page build/pages/$$page; done
	ln -sfn ../../../benchmarks/results build/pages/benchmarks/results
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build
	@echo "open build/site/index.html"

bench: $(VENV)/built
	$(RUN) -m pytest benchmarks/speed --benchmark-json=benchmarks/results/cpu.json
	$(RUN) -m benchmarks.speed.report benchmarks/results/cpu.json

info: $(VENV)/built
	$(RUN) -m tcm_fused info

gpu:
	$(PYTHON) -m benchmarks.speed.gpu

registers: $(VENV)/built
	$(RUN) -m benchmarks.speed.ptxas
	$(RUN) -m benchmarks.speed.cycles

# Into dist/, with the CUDA kernels inside; tried in a new environment with each torch of TORCH (2.11.0: gigabytes).
wheel: $(VENV)/built
	rm -rf dist
	TCM_FUSED_CUDA=1 $(VENV)/bin/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(RUN) tests/build/smoke.py dist/*.whl $(TORCH)

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/documents: docs/requirements.txt $(VENV)/installed
	$(VENV)/bin/pip install --quiet --requirement docs/requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(shell find csrc -type f)
	$(VENV)/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info tcm_fused/*.so
