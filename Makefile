# forkproof's front door. Everything happens in .venv and build/; nothing is installed on the machine except, when
# root on a Debian machine, the compilers and tools that tools/require names.
#
#   make demo        install, build a pair of fixtures, scan them, scan a real daemon        (the two-minute tour)
#   make test        the test suite, against an installed wheel
#   make lint        ruff and mypy
#   make bench       the benchmarks, as ratios
#   make bench-tree  a root file system with 2,288 ELF files: cold and cached, one process and two (half an hour)
#   make lock-tables every row of docs/locks.md: three releases of Debian, two machines         (five minutes)
#   make libc-stress every row of docs/libc.md, by running it                                 (a few minutes)
#   make probe-runs  every fixture probed twenty times; time to verdict beside brute force      (half an hour)
#   make callgraph-check  40 MB of code of each machine, by objdump and by forkproof   (five minutes)
#   make unwinder-check  forkproof's stacks against gdb's, at chance states of real programs (ten minutes)
#   make library-check  everyday uses of Debian's libraries: run, scanned and probed         (half an hour)
#   make fixtures    every fixture, for every machine there is a compiler for: build/fixtures/<machine>/
#   make sysroots    Debian sysroots for the tests that need real binaries (about 300 MB, in the user's cache)
#   make validators  the SARIF validators from npm, for the tests that use them: build/node/
#   make fuzz        22,000 mutated files and archives (two minutes)
#   make manual      the man page and completions for bash, zsh and fish: build/manual/
#   make docs        the documents as a site (mkdocs): build/site/
#   make dev         puts an editable forkproof into .venv, until the next make test or demo
#   make clean

PYTHON   ?= python3
VENV     ?= .venv
SYSROOTS ?= all
PYTEST   ?=
JOBS     ?= 2

bin     := $(VENV)/bin
sources := pyproject.toml $(shell find analyzer signatures -type f -not -name '*.pyc' 2>/dev/null)
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench bench-tree lock-tables libc-stress probe-runs callgraph-check unwinder-check library-check fixtures sysroots validators fuzz manual docs dev clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

# Two stamps: the dependencies, and this project's own wheel, which is rebuilt when a source changes.
$(VENV)/.dependencies: pyproject.toml
	@tools/require venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "forkproof needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12" >&2; \
	    exit 1; }
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python tools/dependencies.py | $(bin)/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
	@touch $@

$(VENV)/.wheel: $(VENV)/.dependencies $(sources)
	$(bin)/python -m pip install --quiet --disable-pip-version-check \
	    --no-deps --no-build-isolation --force-reinstall .
	@touch $@

demo: $(VENV)/.wheel
	@tools/require cc
	@$(bin)/python tools/demo.py

test: $(VENV)/.wheel
	@tools/require cc cxx cross binutils qemu gdb laboratory
	$(bin)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST)

lint: $(VENV)/.dependencies
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

bench: $(VENV)/.wheel
	@tools/require cc binutils
	$(bin)/python benchmarks/run.py

bench-tree: $(VENV)/.wheel
	$(bin)/python benchmarks/tree.py

lock-tables: $(VENV)/.wheel
	$(bin)/python tools/lock_tables.py

libc-stress: $(VENV)/.wheel
	@tools/require cc cross qemu musl
	$(bin)/python -m tools.libc_stress

probe-runs: $(VENV)/.wheel
	@tools/require cc cxx
	$(bin)/python benchmarks/probes.py

callgraph-check: $(VENV)/.wheel
	@tools/require binutils
	FORKPROOF_ORACLE=whole $(bin)/python -m pytest -q tests/real/test_callgraph_oracle.py

unwinder-check: $(VENV)/.wheel
	@tools/require cc cross qemu gdb
	$(bin)/python -m tools.unwinder_check

library-check: $(VENV)/.wheel
	@tools/require cc cxx
	$(bin)/python tools/sysroot.py bookworm-amd64-libraries
	$(bin)/python -m tools.libraries

fixtures: $(VENV)/.dependencies
	@tools/require cc cxx cross
	$(bin)/python -m fixtures.build

sysroots: $(VENV)/.dependencies
	$(bin)/python tools/sysroot.py --keep-going $(SYSROOTS)
	$(bin)/python tools/debs.py bookworm arm64 qemu-system-arm libgoogle-perftools4

fuzz: $(VENV)/.dependencies
	$(bin)/python tools/fuzz.py --cases 22000 --seed 1

manual: $(VENV)/.wheel
	$(bin)/python tools/manual.py build/manual
	@find build/manual -type f | sort

docs: $(VENV)/.dependencies
	$(bin)/python -m pip install --quiet --disable-pip-version-check 'mkdocs>=1.6,<2'
	rm -rf build/docs && cp -r docs build/docs
	mkdir build/docs/rules && cp analyzer/forkproof/rules/*.md build/docs/rules/
	$(bin)/python -m mkdocs build --quiet

validators:
	@command -v npm >/dev/null || { echo "make validators needs npm: apt-get install npm" >&2; exit 1; }
	npm install --silent --no-audit --no-fund --prefix build/node \
	    @microsoft/sarif-multitool-linux@5.7.0 @microsoft/jest-sarif@1.0.0-beta.0

dev: $(VENV)/.dependencies
	$(bin)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.wheel

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
