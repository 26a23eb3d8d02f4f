# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo studio browser test test-all check bench torture faults sanitize exactness models docs dist clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# the page, in this folder or FOLDER=...
studio: setup
	$(BIN)/byeori studio $(or $(FOLDER),.)

demo: setup
	$(BIN)/byeori demo

# Chromium for the tests of the page, by apt where that may be; elsewhere these tests are left out and say so
browser:
	@command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -qq -y chromium chromium-driver >/dev/null; } || \
		echo "No chromium and chromedriver here: the tests of tests/studio/test_browser.py are left out."

# everything that can break, in a few minutes
test: check browser
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# also what takes long: many seeds, all of a kind, compilations, the embedded model
test-all: check
	BYEORI_TEST_SEEDS=all $(BIN)/python -m pytest -n 2 --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/bench.py

# RUNS=100 runs killed at random instants, resumed, and compared bit by bit; then as many of every command that writes,
# stopped by a signal, a full disk or a folder that is read-only, and run again
torture: setup
	$(BIN)/python tests/torture.py $(RUNS)
	$(BIN)/python tests/torture_commands.py $(RUNS)

# RUNS=20 of each kind: memory that runs out, rows that are not finite, damaged checkpoints, full disks
faults: setup
	BYEORI_TEST_FAULTS=$(or $(RUNS),20) $(BIN)/python -m pytest -n 2 --dist worksteal tests/train/test_faults.py

# the C kernels under AddressSanitizer and UndefinedBehaviorSanitizer
sanitize: setup
	scripts/sanitize.sh

# SEEDS=1000 random cases for each test that compares with a plain computation
exactness: setup
	BYEORI_TEST_SEEDS=$(or $(SEEDS),1000) $(BIN)/python -m pytest -n 2 --dist worksteal -m exactness tests

# docs/models.md: every architecture of transformers as a tiny random model; JOBS=1 takes one core
models: setup
	$(BIN)/python scripts/models_docs.py

# the documentation in English and Korean, in docs-output/
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# wheel and sdist in dist/, each installed and run in an empty environment
dist: setup
	rm -rf dist
	$(BIN)/python -m build --quiet
	PYTHON=$(PYTHON) .ci/try_dist dist/*

clean:
	rm -rf .venv .venv-peers demo-output bench-output docs-output models-output dist
