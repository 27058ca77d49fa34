# One command for each thing a developer or a user does; `make help` lists them.

# The first Python that is new enough; PYTHON=... names another. Everything runs in the environment that
# tools/setup_environment.py chooses: a given one with torch >= 2.11, else .venv.
FIND_PYTHON = for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
  then echo $$p; break; fi; done
ifdef PYTHON
export PYTHON
endif
BASE_PYTHON := $(or $(PYTHON),$(shell $(FIND_PYTHON)))
ifeq ($(BASE_PYTHON),)
$(error no Python 3.11 or newer was found; name one with PYTHON=...)
endif
# Said again: what $(shell) runs does not see exported variables before make 4.4.
PY := $(shell $(if $(PYTHON),PYTHON=$(PYTHON)) $(BASE_PYTHON) tools/setup_environment.py --print-python)
ifeq ($(PY),)
$(error no environment to work in; see the line above)
endif

# The environment of every target. DeepSpeed is told "cpu" only where there is no accelerator, and compiles its own
# operators, if ever, into this environment alone. Thread counts are left to the program.
OWN_ENVIRONMENT := $(filter $(CURDIR)/.venv/%,$(PY))
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(if $(OWN_ENVIRONMENT),.venv,build)/torch_extensions
export PATH := $(dir $(PY)):$(PATH)
ifndef DS_ACCELERATOR
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c GPU)$(wildcard /dev/kfd),0)
export DS_ACCELERATOR := cpu
endif
endif

SOURCES := megatron_dept csrc tools tests benchmarks setup.py pretrain_dept.py

.DEFAULT_GOAL := help
.PHONY: help venv test check format test-long test-all-layouts demo demo-all bench bench-vocabulary gpu-check clean distclean

help:  ## This list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /|/' | \
	  awk -F'|' '{printf "  make %-17s %s\n", $$1, $$2}'
	@echo
	@echo "  PYTHON=...           another Python; one that has torch >= 2.11 is used as it is"
	@echo "  TORCH_INDEX_URL=...  where else torch may come from, e.g. https://download.pytorch.org/whl/cpu"
	@echo "  PYTEST_ARGS=...      more arguments for pytest;  TEST_WORKERS=...  processes that share the tests (2)"
	@echo "  DEMO_ARGS=...        for tools/demo.py (--help lists them)"

venv:  ## Make .venv with everything pinned, native code built; nothing where it is up to date
	@$(BASE_PYTHON) tools/setup_environment.py

# Files of tests go to TEST_WORKERS processes; most of a test's time is spent in ranks that wait for one another.
TEST_WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile

test: venv  ## Every test, as CI runs them
	@$(PYTEST) $(PYTEST_ARGS)

test-long: venv  ## What make test leaves out for its length: further adapters, launchers and examples; some minutes
	@$(PYTEST) -m long $(PYTEST_ARGS)

test-all-layouts: venv  ## Gradients and updates on every legal layout, not only every pair of choices; hours on 2 cores
	@$(PYTEST) -m all_layouts tests/engine $(PYTEST_ARGS)

check: venv  ## Format, lint, types, and the floors that imports go down
	@$(PY) -m ruff format --check --quiet $(wildcard $(SOURCES))
	@$(PY) -m ruff check --quiet $(wildcard $(SOURCES))
	@$(PY) -m mypy
	@cd tools && MYPYPATH=..:. $(PY) -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache --follow-imports=silent *.py demo_corpora demo_job gpu_check_steps run_plan
	@$(PY) -m pytest -q tests/test_floors.py

format: venv  ## Format the code, and mend what the linter can
	@$(PY) -m ruff format $(wildcard $(SOURCES))
	@$(PY) -m ruff check --fix $(wildcard $(SOURCES))

demo: venv  ## The main job on real text: STD, GLOB, TRIM, SPEC-OPT, each with one adapt; under 10 minutes on 2 cores
	@$(PY) tools/demo.py $(DEMO_ARGS)

demo-all: venv  ## The main job with every method and both adapt protocols
	@$(PY) tools/demo.py --all $(DEMO_ARGS)

bench: venv  ## Measure kernels, head and loss beside torch's, steps beside plain DeepSpeed's, and draw layouts' loss curves
	@$(PY) -m benchmarks.kernels
	@$(PY) benchmarks/loss.py
	@$(PY) -m benchmarks.layouts
	@$(PY) -m benchmarks.convergence
	@$(PY) -m benchmarks.exchange --write
	@$(PY) -m benchmarks.overlap --repeats 3
	@$(PY) -m benchmarks.row_table
	@$(PY) -m benchmarks.many_sources

bench-vocabulary: venv  ## Embedding memory of every variant and step time by vocabulary, V = 250,112; 10 minutes, 8 GB
	@$(PY) -m benchmarks.large_vocabulary --json build/large_vocabulary.json --picture build/large-vocabulary.png

# Not venv: it works without a network, in the Python that PYTHON= names, and says itself what is missing there.
gpu-check:  ## Build and check everything on a GPU, with no network needed; WHEELS= OUT= PYTHON=, or GPU_CHECK_ARGS=--help
	@$(BASE_PYTHON) tools/gpu_check.py $(if $(WHEELS),--wheels "$(WHEELS)") $(if $(OUT),--out "$(OUT)") $(GPU_CHECK_ARGS)

clean:  ## Remove what was built and cached; .venv and demo/ stay
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info .venv/megatron_dept.stamp
	find megatron_dept tools tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	find megatron_dept -name '*.so' -delete

distclean: clean  ## ... and .venv and demo/ too
	rm -rf .venv demo
