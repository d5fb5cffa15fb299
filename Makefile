# Every target makes its own environment in .venv (tools/venv.sh) and installs what it needs; nothing else is touched.
#
#   make quickstart      trains a small image tokenizer, then a transformer on its codes; scores and pictures of both
#   make tokenizer       the first half of it
#   make test            the quick tests; make test-slow: the rest
#   make PYTHON=python3.12 VENV=.venv-3.12 test     with another Python, in another folder

VENV ?= .venv
WORKDIR ?= runs/quickstart
ifeq ($(origin PYTHON),undefined)
PYTHON := python3
PYTHON_CHOSEN := 0
else
PYTHON_CHOSEN := 1
endif
INSTALL := PYTHON_CHOSEN=$(PYTHON_CHOSEN) tools/venv.sh
BIN := $(VENV)/bin
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest
# Each worker takes whole files, which prepare for all of their tests, and reads again what it has compiled.
WORKERS ?= 2
SHARED_OUT := -n $(WORKERS) --dist loadfile

# libtpu reads these when it is loaded; without them it looks for a TPU and complains that there is none.
TPU_ENV := JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-4

.DEFAULT_GOAL := help
.PHONY: help quickstart tokenizer test test-slow test-tpu test-transfusion test-newest lint format clean

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
	    printf '  make %-16s %s\n' "$$name" "$$text"; done

quickstart: tokenizer ## the whole way: tokenizer, codes, transformer, pictures of captions (about 15 minutes on 2 cores)
	@$(BIN)/ddt-jax tokenize --workdir $(WORKDIR)/tokenizer --to $(WORKDIR)/codes/train --records 160000
	@$(BIN)/ddt-jax tokenize --workdir $(WORKDIR)/tokenizer --to $(WORKDIR)/codes/heldout --source scenes:heldout \
	    --records 2048
	@$(BIN)/ddt-jax train --config configs/llama_scenes.py:$(WORKDIR) --workdir $(WORKDIR)/transformer
	@$(BIN)/ddt-jax evaluate --workdir $(WORKDIR)/transformer
	@$(BIN)/python tools/quickstart_results.py $(WORKDIR)

tokenizer: ## the first part of it alone: train the tokenizer, evaluate it, write pictures (about 4 minutes)
	@$(INSTALL) $(VENV) "" $(PYTHON)
	@$(BIN)/ddt-jax train --config configs/quickstart.py --workdir $(WORKDIR)/tokenizer
	@$(BIN)/ddt-jax evaluate --workdir $(WORKDIR)/tokenizer --config.evaluate.probe_images=0

test: ## quick tests (at most 15 minutes on 2 cores)
	@$(INSTALL) $(VENV) test $(PYTHON)
	DDT_JAX_KEEP_COMPILED=1 $(PYTEST) -m "not slow and not tpu_compile and not transfusion" $(SHARED_OUT)

test-slow: ## oracles, several processes, kills; then test-tpu
	@$(INSTALL) $(VENV) test,oracle $(PYTHON)
	DDT_JAX_KEEP_COMPILED=1 $(PYTEST) -m "slow and not tpu_compile" $(SHARED_OUT)
	@$(MAKE) --no-print-directory test-tpu

test-tpu: ## compile the small configs' train steps for a TPU, in .venv-tpu
	@$(INSTALL) $(VENV)-tpu test,tpu $(PYTHON)
	@$(VENV)-tpu/bin/python -c 'import libtpu' # without it the tests would be skipped, not fail
	$(TPU_ENV) $(VENV)-tpu/bin/python -m pytest -m tpu_compile tests/tpu

test-transfusion: ## masks, loss and cache against transfusion-pytorch, in .venv-transfusion
	@$(INSTALL) $(VENV)-transfusion test,transfusion $(PYTHON)
	@$(VENV)-transfusion/bin/python -c 'import transfusion_pytorch' # without it the tests would be skipped, not fail
	JAX_PLATFORMS=cpu $(VENV)-transfusion/bin/python -m pytest -m transfusion tests/multimodal

test-newest: ## smoke tests under the newest Python (3.12 or later) of this machine, in .venv-newest
	@newest=$$(tools/newest_python.sh) || { echo "test-newest: no Python 3.12 or later was found, so the newest JAX is not tested"; exit 0; }; \
	PYTHON_CHOSEN=1 tools/venv.sh $(VENV)-newest test "$$newest" && \
	$(VENV)-newest/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "with jax", jax.__version__)' && \
	JAX_PLATFORMS=cpu $(VENV)-newest/bin/python -m pytest -m smoke

lint: ## ruff: rules and format
	@$(INSTALL) $(VENV) test $(PYTHON)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: ## let ruff rewrite the files
	@$(INSTALL) $(VENV) test $(PYTHON)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove environments, caches and build outputs; runs/ stays
	rm -rf .venv .venv-tpu .venv-transfusion .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
