# `make demo` and `make test` need Python 3.11 or later and nothing else: they make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow docs clean

demo: .venv/installed
	$(BIN)/rankscope run --out rankscope-demo

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Long tests: real kills, lost nodes, full disks, the tour, the recipes, simulations; more examples of each property.
test-slow: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile -m slow
	OMP_NUM_THREADS=1 $(BIN)/pytest --hypothesis-profile long tests/properties tests/lora/test_pattern_keys.py

# Builds the site in build/site. tests/docs/test_site.py builds and checks it too.
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankscope needs Python 3.11 or later; give one with make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev
	touch $@

clean:
	rm -rf .venv rankscope-demo build
