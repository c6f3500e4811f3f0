# Each target does its own set-up in .venv. PYTHON chooses the interpreter that .venv is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAISS := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: demo test lint docs bench install
demo: install
	$(BIN)/featcache demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The lowest versions that pyproject.toml allows, and the newest there are; TESTS=tests/evalsuite runs a part.
test-lowest test-newest: test-%:
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		$(if $(filter lowest,$*),--constraint constraints-lowest.txt) --editable ".[cpu,demo,dev]"
	$(VENV)-$*/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: install
	$(BIN)/python benchmarks/throughput.py

install: $(VENV)/.installed-$(FAISS)

$(VENV)/.installed-$(FAISS): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "featcache needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(FAISS),demo,dev]"
	touch $@
