# make omni   make the environment if need be, and run the main job
# make test   make the environment if need be, and run the whole suite, in JOBS (2) processes
# make test-exhaustive   every mesh of up to 16 ranks, of which the suite takes some
# make lint   ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed-data
TEST_STAMP := $(VENV)/.installed-test
ARGS ?=
JOBS ?= 2

.PHONY: omni test test-exhaustive lint clean
.DELETE_ON_ERROR:

omni: $(RUN_STAMP)
	$(BIN)/python experiments/omni_moe.py $(ARGS)

test: $(TEST_STAMP)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-exhaustive: $(TEST_STAMP)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m exhaustive $(ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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

$(TEST_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[data,hf,test,lint]"
	touch $@ $(RUN_STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
