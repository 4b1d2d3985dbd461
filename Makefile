# `make demo` and `make test` need Python 3.11 or later and nothing else: they make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-oldest docs clean

demo: .venv/installed
	$(BIN)/rankscope demo

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

# Parity with PEFT, training, commands and a short embedded study on the lowest versions that pyproject.toml accepts.
OLDEST := .venv-oldest
OLDEST_PYTHON ?= $(shell for p in python3.12 $(PYTHON); do $$p --version >/dev/null 2>&1 && echo $$p && break; done)
OLDEST_TESTS := lora/test_packed.py lora/test_adapters.py lora/test_svd.py lora/test_variants.py train/test_parity.py \
	train/test_full_parity.py train/test_attention.py train/test_loss.py train/test_loop.py train/test_checkpoint.py \
	train/test_optimizer.py train/test_probe.py test_cli.py

# What the oldest transformers does otherwise: its Falcon lets rows laid end to end see each other, and is refused; its
# Gemma 2 rounds the weights of attention to float32.
OLDEST_DIFFERS := test_attention_of_all_kinds_equals_pefts[falcon] test_packed_equals_peft[gemma2-0.0-torch.float64]

test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest --numprocesses auto --dist loadfile -W ignore::DeprecationWarning \
		$(patsubst %,--deselect 'tests/train/test_parity.py::%',$(OLDEST_DIFFERS)) $(addprefix tests/,$(OLDEST_TESTS))
	rm -rf build/oldest
	$(OLDEST)/bin/rankscope run --ranks 2,8 --seeds 0 --steps 4 --set measure.profiles=false --out build/oldest
	$(OLDEST)/bin/python benchmarks/gpu.py --rehearse --stages machine,parity,scaling

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

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[quantization]' pytest pytest-timeout pytest-xdist hypothesis
	touch $@

clean:
	rm -rf .venv .venv-oldest rankscope-demo build
