# Every target sets up what it needs, once: needs Python >= 3.10 and a C compiler.
#
#   make demo        train the digits network with both backends and compare
#   make test        run the tests against the installed wheel
#   make arm64       build for 64-bit ARM and test there, emulated (Debian, as root)
#   make lint        ruff and cython-lint
#   make gallery     the lecture's figures and numbers: build/gallery/index.html
#   make docs        the documentation, with the gallery where that is built: build/docs/index.html
#   make docs-links  ask the network whether the documentation's links to elsewhere are alive
#   make bench       the engine's benchmarks and their report: bench/results/
#   make bench-peers whole models and single vectors against PyTorch, JAX, Numba and BLAS
#   make bench-storage
#                    float32 against narrow storage, and PyTorch's steps of bfloat16
#   make bench-outer outer steps against NumPy as Flower writes them, and PyTorch
#   make bench-rows  rows of large tables against dense steps, PyTorch and NumPy
#   make wheel       build/dist/*.whl
#   make clean       remove all that was built

PYTHON ?= python3
PYTEST_ARGS ?=
# `make test TEST_ENV=ci` installs what the tests of every extra need, PyTorch among it
TEST_ENV ?= test

SOURCES := pyproject.toml setup.py \
    $(wildcard optcore/*.p* python/optcore/*.p* python/optcore/include/*.h)
VENVS := build/venv

.PHONY: help demo test arm64 lint gallery docs docs-links bench bench-peers bench-storage bench-outer \
    bench-rows wheel clean
.SECONDARY:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: $(VENVS)/demo/.installed
	$(VENVS)/demo/bin/python examples/digits.py

test: $(VENVS)/$(TEST_ENV)/.installed
	$(VENVS)/$(TEST_ENV)/bin/python -m pytest $(PYTEST_ARGS)

arm64:
	PYTHON=$(PYTHON) sh tests/arm64.sh

lint: $(VENVS)/lint/.installed
	$(VENVS)/lint/bin/ruff check .
	PATH="$(abspath $(VENVS)/lint/bin):$$PATH" cython-lint optcore python/optcore examples tests/embedding

gallery: $(VENVS)/gallery/.installed
	$(VENVS)/gallery/bin/python examples/lecture/build.py --out build/gallery

# Every warning is an error, also that of a page which was built before (-E).
docs: $(VENVS)/docs/.installed
	rm -rf build/docs
	$(VENVS)/docs/bin/python -m sphinx -q -E -W --keep-going -d build/doctrees docs build/docs

docs-links: $(VENVS)/docs/.installed
	$(VENVS)/docs/bin/python -m sphinx -q -b linkcheck -d build/doctrees docs build/docs-links

bench: $(VENVS)/bench/.installed
	$(VENVS)/bench/bin/python bench/run.py engine --out bench/results $(BENCH_ARGS)

bench-peers: $(VENVS)/bench-peers/.installed
	$(VENVS)/bench-peers/bin/python bench/run.py peers --out bench/results $(BENCH_ARGS)

bench-storage: $(VENVS)/bench-peers/.installed
	$(VENVS)/bench-peers/bin/python bench/run.py storage --out bench/results $(BENCH_ARGS)

bench-outer: $(VENVS)/bench-peers/.installed
	$(VENVS)/bench-peers/bin/python bench/run.py outer --out bench/results $(BENCH_ARGS)

bench-rows: $(VENVS)/bench-peers/.installed
	$(VENVS)/bench-peers/bin/python bench/run.py rows --out bench/results $(BENCH_ARGS)

wheel: build/wheel.stamp

# The sources are compiled once; every environment installs the same wheel.
build/wheel.stamp: $(SOURCES) | $(VENVS)/base/.made
	rm -rf build/dist
	$(VENVS)/base/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/dist .
	touch $@

$(VENVS)/%/.installed: build/wheel.stamp $(VENVS)/%/.made
	set -e; wheel=$$(ls build/dist/*.whl); \
	$(VENVS)/$*/bin/python -m pip install --quiet "$$wheel[$*]"; \
	$(VENVS)/$*/bin/python -m pip install --quiet --force-reinstall --no-deps "$$wheel"
	touch $@

$(VENVS)/%/.made:
	$(PYTHON) -c "import sys; sys.exit('optcore needs Python >= 3.10' * (sys.version_info < (3, 10)) or 0)"
	$(PYTHON) -m venv $(VENVS)/$*
	touch $@

clean:
	rm -rf build
