# `make demo` and `make test` work alone on a fresh machine with Python >= 3.10 and g++.
VENV ?= .venv
PYTHON ?= python3
# What pip installs as torch: a pinned version, or with an NVIDIA GPU the newest. Options for pip may follow it.
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),'torch>=2.11',torch==2.13.0)
OUT ?= runs/demo
# For `make gpu`: a library built elsewhere, instead of building one, and the seconds after which no case is begun.
LIBRARY ?=
GPU_SECONDS ?= 240

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
READY := $(VENV)/.smart-kernels-ready

.PHONY: help demo test lint bench gpu results sanitize sanitize-gpu clean
.DEFAULT_GOAL := help

help:  ## Lists the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo "Variables: VENV=$(VENV) PYTHON=$(PYTHON) TORCH=$(TORCH) OUT=$(OUT) LIBRARY=$(LIBRARY)"

demo: $(READY)  ## Trains, swaps, verifies and measures a small network on real images, in a few minutes
	$(BIN)/smart demo --out $(OUT)

test: $(READY)  ## Runs all tests
	$(BIN)/python -m pytest

lint: $(READY)  ## Checks style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)

bench: $(READY)  ## Measures whole networks and single layers on this CPU
	$(BIN)/python -m benchmarks.run --suite cpu
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu: $(if $(LIBRARY),,$(READY))  ## Tests and measures on an NVIDIA GPU, within 8 minutes; goes on when called again
	$(if $(LIBRARY),cp $(LIBRARY) smart_kernels/_C.abi3.so)
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m benchmarks.run --suite gpu --append --limit $(GPU_SECONDS)

results: $(READY)  ## Rewrites the tables and pictures of README.md and docs from benchmarks/results
	$(BIN)/python -m benchmarks.report

sanitize: $(READY)  ## Tests the C++ kernels under the address and undefined-behaviour sanitizers
	SMART_SANITIZE=1 $(BIN)/python setup.py -q build_ext --inplace
	status=0; ASAN_OPTIONS=detect_leaks=0:new_delete_type_mismatch=0 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest tests/smart_kernels/test_convolution.py tests/smart_kernels/test_elementwise.py \
	  tests/smart_kernels/test_programs.py tests/smart_kernels/test_programmed_networks.py \
	  tests/smart_kernels/test_depthwise.py tests/smart_kernels/test_winograd.py || status=$$?; \
	  $(BIN)/python setup.py -q build_ext --inplace; exit $$status

sanitize-gpu: $(READY)  ## Tests the CUDA kernels under compute-sanitizer; needs a GPU
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest -p no:cacheprovider \
	    tests/gpu/test_sparse_tensor_cores.py tests/gpu/test_bitmaps.py tests/gpu/test_direct_convolution.py || exit 1; done

clean:  ## Removes builds, caches and runs; keeps $(VENV)
	rm -rf build *.egg-info smart_kernels/*.so runs .pytest_cache .ruff_cache .hypothesis .benchmarks $(READY)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# pip would take the registry's newest torch, with gigabytes of CUDA packages, if torch were not installed first.
$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "setuptools>=77" wheel
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[data,plot,eval,triton,test,lint]"
	@touch $@
