# odirect: everything is run from here. `make help` lists what there is.

PYTHON ?= python3
export PYTHON

BIN := .venv/bin
ARGS ?=
# One worker a core; a file's tests stay together, because they share what is dear to make.
# The rooms whose tests need neither mounts nor minutes.
FAST := tests/sched tests/ring/test_calls.py tests/ring/test_uring.py tests/block/test_buffers.py \
	tests/block/test_queue.py tests/block/test_memory.py tests/dio/test_blockdev.py tests/dio/test_engine.py \
	tests/dio/test_completion.py tests/dio/test_requests.py tests/test_docs.py tests/test_imports.py
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help run test check fast format bench env dev-env clean distclean

help:  ## this list
	@echo "odirect: direct I/O from Python"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  make run SIZE=256MiB DIR=/mnt/disk    size of the file, and the directory that it is made in"
	@echo "  make test ARGS='-k cancel -x'         arguments for pytest"

run: env  ## build, then copy, verify and read back a real file, beside fio and cp
	@$(BIN)/python tools/demo.py

test: dev-env  ## install what the tests need and can be had, then run them all
	@tools/install-test-tools
	@PATH="$$PATH:/usr/sbin:/sbin" $(PYTEST) $(ARGS)
	@echo; echo "The same once more, with io_uring denied."
	@PATH="$$PATH:/usr/sbin:/sbin" $(PYTEST) -p tests.denied_plugin $(ARGS)

check: dev-env  ## format, lint, types, layering, fast tests: before every commit
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	@PATH="$$PATH:/usr/sbin:/sbin" $(PYTEST) -x -m "not slow" $(FAST) $(ARGS)

format: dev-env  ## put every file in the form that `check` wants
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: dev-env  ## measure against fio, as ratios; prints, asserts nothing
	@$(BIN)/python -m compileall -q src  # As an installation does, also where Python may write no byte code.
	@set -e; for script in bench/[a-z]*.py; do \
		echo; echo "== $$script"; $(BIN)/python $$script $(ARGS); done

env:  ## .venv with odirect in it
	@tools/setup-env

dev-env:
	@tools/setup-env test,dev

clean:  ## remove what was built, and caches
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .odirect-demo-*
	rm -rf src/*.egg-info .venv/odirect-install*
	find src -name '*.pyx' | while read -r source; do rm -f "$${source%.pyx}.c" "$${source%.pyx}".*.so; done
	find src tests tools bench -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## that, and .venv
	rm -rf .venv
