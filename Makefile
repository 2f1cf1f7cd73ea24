# Needs make and Python 3.11 or newer; everything else goes into .venv.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
TORCH := $(shell grep '^torch==' constraints.txt)
QUICK := not slow and not gpu and not evidence
# a process for each core, up to four, of one thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test slow check fix prove lock clean

help:
	@echo "make demo              slim the embedded pipeline and write a report"
	@echo "make test              run the quick tests"
	@echo "make slow              run the slow tests, which CI leaves out"
	@echo "make check             what CI runs: format, lint, types, floors, tests, docs"
	@echo "make fix               format, and repair what the linter can"
	@echo "make prove NAME=...    run one method's proof against its baseline"
	@echo "make lock              write constraints.txt from .venv"

# torch comes first and alone: pinned, it is a small CPU build; a bare torch fetches CUDA.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old: Python 3.11 or newer is needed, try make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(PIP) install '$(TORCH)'
	@echo "installing effuse and its tools"
	@$(PIP) install --editable '.[dev,house]' --constraint constraints.txt
	@touch $@

demo: $(STAMP)
	@$(BIN)/effuse slim house:emoji --recipe balanced --out demo-out --pictures 16
	@$(BIN)/effuse sample demo-out/pipeline "red apple" "blue heart" --steps 12 --out demo-out/after.png
	@echo "report: $(CURDIR)/demo-out/report/index.html"

test: $(STAMP)
	@$(PYTEST) -m "$(QUICK)"

slow: $(STAMP)
	@$(PYTEST) -m "slow and not gpu"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "$(QUICK)"
	$(BIN)/python -m effuse.docs --check

fix: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

prove: $(STAMP)
	@test -n "$(NAME)" || { echo "which method? make prove NAME=momentum"; exit 1; }
	@$(BIN)/effuse prove $(NAME)

lock: $(STAMP)
	@$(BIN)/python scripts/lock.py

clean:
	rm -rf demo-out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
