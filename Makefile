# make install      the environment, in .venv
# make quickstart   train and run everything on the built-in captioned videos (ARGS="--fresh" starts anew, "--help" tells more)
# make test         the tests
# make test-all     and those that take long
PYTHON ?= python3
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: install quickstart test test-all lint clean

install: .venv/installed

# Without a GPU the CPU build of torch is asked for first: the default build brings gigabytes of CUDA libraries.
# Where your package index has no such build, name one that has: make install PIP_EXTRA_INDEX_URL=...
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	if command -v nvidia-smi >/dev/null 2>&1; then $(PIP) torch; else \
	  $(PIP) "torch==$(TORCH)+cpu" || { echo "no CPU build of torch in your package index: installing the default build"; $(PIP) torch; }; fi
	$(PIP) --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/python training/quickstart.py $(ARGS)

test: install
	$(BIN)/python -m pytest -m "not slow"
	$(BIN)/python -m pytest -m "slow and not long"

test-all: test
	$(BIN)/python -m pytest -m long

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info
