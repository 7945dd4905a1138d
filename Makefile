# From a fresh clone, `make demo`, `make test` and `make bench` need Python >= 3.10, g++ and make; `make help` lists all.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PY ?= $(VENV)/bin/python
RESULTS ?= benchmarks/results
JOBS ?= 2
MINUTES ?= 20

PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --constraint requirements/constraints.txt
SOURCES = $(shell find csrc python_bindings -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')
CPP_FILES = $(shell find csrc python_bindings tests -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' \
	-o -name '*.cuh')

.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format bench digits fuzz gpu clean

help:
	@echo "make demo    train a small DSNO on real digits, compare layers, write demo_output/"
	@echo "make test    linters, type check and the tests"
	@echo "make bench   benchmarks on this machine, in at most $(MINUTES) minutes, and the tables of README.md"
	@echo "make digits  teacher, trajectories, student and evaluation on real digits, from nothing, in about 40 minutes"
	@echo "make fuzz    10,000 random cases against the reference"
	@echo "make gpu     build, tests and benchmarks that need a GPU, in 9 minutes; GPU_OPTIONS=--help lists its options"
	@echo "make lint    linters and type check alone;  make format: rewrite the files in style"
	@echo "make clean   remove builds and caches (the environment $(VENV) stays)"
	@echo "Settings: PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) MINUTES=$(MINUTES)"

# Each step of the set-up leaves a stamp when it is complete; an interrupted step runs again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dsno_kernels needs Python >= 3.10, but $(PYTHON) is " \
		+ sys.version.split()[0] + "; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and alone, so that no other package chooses its version.
$(VENV)/.torch: $(VENV)/.created
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.packages: $(VENV)/.torch requirements/constraints.txt
	$(PIP) triton setuptools pybind11 ninja
	$(PIP) cupy-cuda13x nvidia-cuda-nvrtc || echo "CuPy is not available here: the tests that need NVRTC will be skipped"
	@touch $@

$(VENV)/.extension: $(VENV)/.packages pyproject.toml setup.py $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[demo,train,test,bench,dev]"
	@touch $@

setup: $(VENV)/.extension

demo: setup
	$(PY) -m dsno_kernels demo

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

# One thread a process: waiting threads would keep the cores from the other processes.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(JOBS) --dist loadfile

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

bench: setup
	mkdir -p $(RESULTS)
	$(PY) -m pytest benchmarks --benchmark-only --minutes $(MINUTES)
	$(PY) benchmarks/report.py

digits: setup
	$(PY) benchmarks/digits.py --results $(RESULTS)
	$(PY) benchmarks/report.py

fuzz: setup
	OMP_NUM_THREADS=1 DSNO_KERNELS_FUZZ=10000 $(PY) -m pytest tests/test_properties.py

# Builds in this checkout and installs nothing. PY is a Python that has torch with CUDA; without it and without $(VENV) it
# is $(PYTHON). COMMIT names the source where it has travelled without its history.
gpu: PY := $(if $(shell command -v $(PY)),$(PY),$(PYTHON))
gpu:
	$(PY) benchmarks/gpu.py --out $(RESULTS) $(if $(COMMIT),--commit $(COMMIT)) $(GPU_OPTIONS)

clean:
	rm -rf build dist *.egg-info dsno_kernels/_C.*.so $(VENV)/.extension
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
