# make install      the environment, in .venv
# make quickstart   train and run everything on the built-in captioned videos (ARGS="--fresh" starts anew, "--help" tells more)
# make test         the tests
# make test-all     and those that take long
# make gpu PACK=box.clips   everything that a GPU is needed for, in nine minutes (ARGS="--parts tests speed" chooses)
# make docs         these pages and an API reference as a web site, in build/site
# make test-oldest  the fast tests with the oldest versions that pyproject.toml allows
# make gpu-kit PACK=box.clips   what to carry to a GPU machine without a network, in build/gpu-kit (docs/performance.md)
# make wheelhouse PYTHON=3.12   the wheels that a GPU machine without a network lacks, in build/wheelhouse
PYTHON ?= python3
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: install quickstart test test-all test-oldest docs gpu gpu-kit wheelhouse lint clean

# What a machine with torch, transformers, peft and OpenCV usually lacks of the packages that this project imports.
LACKING   := deepspeed hjson msgpack py-cpuinfo pydantic pydantic_core annotated-types typing-inspection \
             tyro docstring_parser typeguard pytorch-msssim gguf
PLATFORMS ?= manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux_2_28_x86_64
# A bare version is what a wheelhouse is for; the Python that runs here is another matter.
TARGET := $(or $(filter 3.%,$(PYTHON)),3.12)
ifneq ($(filter 3.%,$(PYTHON)),)
override PYTHON := python3
endif

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

# A process for each core, each with whole files of tests: their fixtures are made once.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test: install
	$(PYTEST) -m "not slow"
	$(PYTEST) -m "slow and not long"

test-all: test
	$(BIN)/python -m pytest -m long

gpu: install
	$(BIN)/python eval/gpu.py $(if $(PACK),--pack $(PACK)) $(ARGS)

docs: .venv/installed-docs
	$(BIN)/python docs/make_site.py

.venv/installed-docs: .venv/installed
	$(PIP) --editable '.[docs]'
	touch $@

# Every `name>=version` of pyproject.toml as `name==version`.
test-oldest: build/oldest/installed
	build/oldest/bin/python -m pytest -m "not slow"

build/oldest/installed: pyproject.toml
	$(PYTHON) -m venv build/oldest
	grep -oE '"[A-Za-z_-]+>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/' > build/oldest/versions.txt
	build/oldest/bin/python -m pip --disable-pip-version-check install --constraint build/oldest/versions.txt --editable '.[dev]'
	touch $@

# There: pip install --no-index --no-deps --target DIR wheelhouse/*.whl, and DIR in PYTHONPATH.
# DeepSpeed comes as a source archive only; its kernels are compiled on first use, on the machine that has the compiler.
wheelhouse: install
	rm -rf build/wheelhouse
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --no-deps --constraint constraints.txt --wheel-dir build/wheelhouse deepspeed
	$(BIN)/python -m pip download --no-deps --constraint constraints.txt --dest build/wheelhouse --only-binary :all: \
	  --python-version $(TARGET) $(PLATFORMS:%=--platform %) $(filter-out deepspeed,$(LACKING))
	du -ch build/wheelhouse/*.whl

gpu-kit: wheelhouse
	test -n "$(PACK)" || { echo "PACK names no packed clips: make gpu-kit PACK=box.clips (larp-mllm pack-clips makes them)"; exit 2; }
	rm -rf build/gpu-kit && mkdir -p build/gpu-kit/wheels
	cp build/wheelhouse/*.whl build/gpu-kit/wheels/ && cp "$(PACK)" build/gpu-kit/box.clips
	for name in lpips lpips-alexnet; do cp "$$($(BIN)/larp-mllm fetch $$name | tail -1)" build/gpu-kit || exit 1; done
	du -ch build/gpu-kit

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info
