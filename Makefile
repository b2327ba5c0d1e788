# `make help` lists the targets. Everything but `gpu` sets up its own virtual environment below this folder.
#
#   PYTHON=python3.12       Python that makes the environments (3.10 or newer)
#   TORCH=2.13.0            torch of .venv. pip's default on Linux x86 is a CUDA build, which also runs without a GPU;
#   PIP_ARGS=...            more arguments of pip, such as an index that has the smaller CPU build of torch
#   CUDA_HOME=...           CUDA toolkit; else the first one that scripts/find_cuda.sh finds
PYTHON ?= python3
TORCH ?= 2.13.0
TORCH_CUDA ?= 2.11.0
CUDA_ARCHS ?= 8.0;9.0
PIP_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
VENV_CUDA := .venv-cuda
BIN := $(VENV)/bin
PIP_INSTALL = install -qq --disable-pip-version-check $(PIP_ARGS)
# ninja prints whole command lines; the name of the file is enough to follow.
SHORTEN := sed -E 's/^(\[[0-9]+\/[0-9]+\]) .* -c ([^ ]+) .*/\1 \2/'
CSRC := $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests/cpp bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

SHELL := bash
.SHELLFLAGS := -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test build lint format sanitize reference docs wheels cuda-build gpu bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

# ---- Environment and in-place build ----
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip $(PIP_INSTALL) --upgrade pip
	$(BIN)/python -m pip $(PIP_INSTALL) "torch==$(TORCH)" setuptools wheel
	@# Editable and without the extension: the rule below builds that in place, and again only what changed.
	NMSPARSE_REFERENCE=1 $(BIN)/python -m pip $(PIP_INSTALL) --no-build-isolation --editable ".[dev]"
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py sources.py $(CSRC)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -W ignore setup.py --quiet build_ext --inplace | $(SHORTEN)
	$(BIN)/python -c 'import nmsparse_ext; print(nmsparse_ext.build_info())'
	@touch $@

build: $(VENV)/.built  ## set up .venv and build the extension in place

# ---- What a newcomer runs ----
demo: build  ## the whole job once, on real data: train 2:4, verify, pack, save, load, time, report
	$(BIN)/nmsparse demo

test: build  ## all tests that this machine can run
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# ---- Checks ----
reference: build  ## the tests in pure PyTorch, as on a machine without a compiler
	NMSPARSE_REFERENCE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed  ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed  ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

sanitize: $(VENV)/.installed  ## the torch-free C++ tests under the address and undefined-behaviour sanitizers
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja \
	    -DNMSPARSE_SANITIZE=address,undefined -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

docs: $(VENV)/.installed  ## the documentation site, into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mkdocs build --strict --quiet
	@echo "file://$(CURDIR)/build/site/index.html"

wheels: $(VENV)/.installed  ## a wheel for this Python: built, checked, installed and tried in an environment of its own
	PYTHON=$(BIN)/python scripts/build_wheels.sh

# ---- CUDA ----
$(VENV_CUDA)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_CUDA)
	$(VENV_CUDA)/bin/python -m pip $(PIP_INSTALL) --upgrade pip
	$(VENV_CUDA)/bin/python -m pip $(PIP_INSTALL) "torch==$(TORCH_CUDA)" setuptools wheel ninja nvidia-cuda-cuobjdump
	NMSPARSE_REFERENCE=1 $(VENV_CUDA)/bin/python -m pip $(PIP_INSTALL) --no-build-isolation ".[test]"
	@touch $@

cuda-build:  ## a wheel with CUDA kernels; needs a CUDA toolkit but no GPU: build, install, test on CPU, list what is in it
	@scripts/find_cuda.sh >/dev/null
	@$(MAKE) --no-print-directory $(VENV_CUDA)/.installed
	VENV=$(VENV_CUDA) TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" PYTEST_ARGS="$(PYTEST_ARGS)" scripts/cuda_build.sh

gpu:  ## on a machine with an NVIDIA GPU, no network needed: build for it, GPU tests, GPU benchmarks, JSON
	PYTHON=$(PYTHON) scripts/gpu.sh

# ---- Measurements ----
bench: build  ## the CPU benchmarks, on a quiet machine; results go to bench/results
	@for file in $$(ls bench/bench_*.py | grep -v bench_gpu_); do \
	    echo "$(BIN)/python $$file"; $(BIN)/python $$file || exit 1; \
	done

clean:  ## remove builds and environments
	rm -rf build dist *.egg-info nmsparse_ext/_C*.so $(VENV) $(VENV_CUDA)
