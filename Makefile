# Everything happens in .venv; nothing needs root, and nothing but the installation needs a network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

FAST := -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile --durations=15

.PHONY: demo test test-slow coverage lint format site clean

demo: $(INSTALLED)
	@# A new folder each time: an earlier demo is never overwritten.
	$(BIN)/erde run digits --out runs/demo-$$(date +%Y%m%d-%H%M%S) --json

test: lint
	@# Whole files to each process: fixtures of a file are made once.
	$(BIN)/python -m pytest $(FAST)

# The same tests, half as slow again: which lines of src they run.
coverage: $(INSTALLED)
	$(BIN)/python -m pytest $(FAST) --cov --cov-report=term

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --numprocesses auto --maxprocesses 4 --dist loadfile --durations=15

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Builders want all pages in one folder: a copy with the repository's own layout, so that links need no change.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md LOG.md LICENSE docs examples benchmarks/README.md benchmarks/ledger.yaml \
	results src/erde tests/helpers/oracles.py tests/losses/golden/README.md

site: $(INSTALLED)
	rm -rf build/pages site
	mkdir -p build/pages
	tar -c --exclude=__pycache__ --exclude=demos --exclude='*.html' $(PAGES) | tar -x -C build/pages
	$(BIN)/zensical build --clean --strict

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $@

clean:
	rm -rf $(VENV) build site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage*
