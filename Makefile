PYTHON ?= python3
VENV ?= .venv
BACKEND ?= tensorflow
BACKENDS ?= tensorflow jax torch
WORKERS ?= 2
BIN = $(VENV)/bin
# Python compiles what is imported, which is less than what is installed.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint tests/constraints.txt
# One thread per worker: two workers on two cores, whatever the backend.
ONE_THREAD = OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 \
	XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
# JAX compiles the same programs in many tests; kept, they also serve the next run.
KEPT = JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
# What needs neither PyTorch nor JAX nor the attacks and runtimes of others.
OLDEST = $(addprefix tests/,certification conversion layers $(patsubst %,test_%.py,callbacks constraints geometry linalg \
	losses margins metrics models oneclass optimizers plotting sklearn stored training zoo))
# The kinds that later versions of Keras and NumPy made what they are now.
NEWER = $(addprefix --deselect=tests/certification/test_hostile_kinds.py::,\
	test_overflow_and_underflow_of_products[factors1] test_what_is_sound_is_accepted[RandomGrayscale] \
	test_augmentation_changes_nothing_at_inference[RandomGrayscale])
# What other packages log while they are imported is no output of a notebook.
WITHOUT_LOGS = "import sys, nbformat; book = nbformat.read(sys.argv[1], 4); \
	[cell.update(outputs=[each for each in cell.outputs if each.get('name') != 'stderr']) \
	for cell in book.cells if cell.cell_type == 'code']; nbformat.write(book, sys.argv[1])"
QUIET = TF_CPP_MIN_LOG_LEVEL=3 PYTHONUNBUFFERED=1

.PHONY: help demo test quick oldest lint docs bench notebooks clean

help:  ## What can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.installed-$(BACKEND)  ## Train, certify and show a digits classifier (ARGS="--dataset moons", BACKEND=jax)
	KERAS_BACKEND=$(BACKEND) $(QUIET) $(BIN)/python -m hkr_keras demo $(ARGS)

test: $(VENV)/.installed-test  ## Lint, documentation, then the whole suite on every backend, each in its own process
	@$(MAKE) --no-print-directory -j2 lint docs
	@set -e; for backend in $(BACKENDS); do \
		echo "== tests on $$backend"; \
		KERAS_BACKEND=$$backend $(QUIET) $(KEPT) $(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations=5 \
			--doctest-modules hkr_keras tests; \
	done

quick: $(VENV)/.installed-test  ## The suite on PyTorch without what is slow
	KERAS_BACKEND=torch $(QUIET) $(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" \
		--doctest-modules hkr_keras tests

oldest: $(VENV)-oldest/.installed  ## Part of the suite with the lowest versions that setup.cfg admits
	KERAS_BACKEND=tensorflow $(QUIET) $(ONE_THREAD) $(VENV)-oldest/bin/python -m pytest -q -n $(WORKERS) -m "not slow" \
		--everywhere -W default $(NEWER) $(OLDEST)

lint: $(VENV)/.installed-test  ## Style, types and the layer contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-test  ## The site, in docs/_build/html; warnings are errors
	KERAS_BACKEND=torch $(QUIET) $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.installed-test  ## The cost of a training step, a projection and a layer on every backend
	@set -e; for backend in $(BACKENDS); do \
		export KERAS_BACKEND=$$backend $(QUIET); \
		$(BIN)/python benchmarks/step_cost.py --rounds 3; \
		$(BIN)/python benchmarks/projection_cost.py --shapes 64x64 256x256 1024x1024 784x512 576x64; \
		$(BIN)/python benchmarks/layer_cost.py --shapes 128x512 128x14x14x32; \
	done

notebooks: $(VENV)/.installed-test  ## Make the .ipynb files from their .py pairs, with outputs
	@set -e; for script in notebooks/*.py; do \
		$(BIN)/jupytext --quiet --to ipynb $$script; \
		$(QUIET) TF_ENABLE_ONEDNN_OPTS=0 $(BIN)/jupyter execute --inplace $${script%.py}.ipynb; \
		$(BIN)/python -c $(WITHOUT_LOGS) $${script%.py}.ipynb; \
	done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)-oldest/.installed: setup.cfg tests/oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/oldest.txt \
		--editable ".[tensorflow,sklearn,plots]" scipy hypothesis pytest pytest-xdist
	@touch $@

$(VENV)/.installed-test: $(VENV)/bin/python setup.cfg tests/constraints.txt
	$(PIP) --editable ".[tensorflow,jax,torch,test]"
	@touch $@

$(VENV)/.installed-%: $(VENV)/bin/python setup.cfg tests/constraints.txt
	$(PIP) --editable ".[$*,plots,sklearn]"
	@touch $@

clean:  ## Remove what the other targets made
	rm -rf $(VENV) $(VENV)-oldest docs/_build docs/gallery docs/notebooks hkr_demo build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
