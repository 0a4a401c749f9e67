# make demo | test | lint | bench | wheel | docs: each sets up what it needs in .venv. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TARGET := $(or $(CARGO_TARGET_DIR),target)
export PYO3_PYTHON := $(abspath $(BIN)/python)
export HF_HUB_OFFLINE := 1
export MPLBACKEND := Agg

.PHONY: help setup build wheel demo test test-rust test-python test-kill test-full lint bench bench-rust docs sanitize emulated clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml
	@command -v cargo >/dev/null || { echo "Rust is missing: install it with your system's packages or from https://rustup.rs, then run make again"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements pyproject.toml --extra dev
	touch $@

setup: $(VENV)/.ready  ## .venv with everything the targets need

RUST_SOURCES := $(shell find rust -name '*.rs' -o -name Cargo.toml) Cargo.toml Cargo.lock

$(VENV)/.built: $(VENV)/.ready $(RUST_SOURCES)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --uv --quiet
	touch $@

build: $(VENV)/.built  ## the extension, in release mode, importable from .venv

wheel: $(VENV)/.ready  ## an abi3 wheel in dist/
	$(BIN)/maturin build --release --out dist --quiet
	@ls -sh dist/*.whl

demo: build  ## the main job on the shipped model: writes demo/report.html
	$(BIN)/python -m microtome demo --out demo

test: test-rust test-kill test-python  ## all tests but the long fault tiers

test-rust: $(VENV)/.ready
	cargo test --quiet --features failpoints
	MICROTOME_ISA=plain cargo test --quiet --features failpoints --test kernels_encode --test metrics_similarity

# A wheel in a folder of its own, which PYTHONPATH puts in front of the editable package.
unpack = rm -rf $(1) && $(BIN)/uv pip install --quiet --no-deps --target $(1) $(2)

# Fail points exist in a build of their own alone, which no user gets.
test-kill: $(VENV)/.ready  ## a writer killed at every named point of a commit
	$(BIN)/maturin build --features failpoints --out $(TARGET)/failpoints --quiet
	$(call unpack,$(VENV)/failpoints,$(TARGET)/failpoints/*.whl)
	PYTHONPATH=$(abspath $(VENV)/failpoints) $(BIN)/python -m pytest tests/python/faults/test_kill.py tests/python/faults/test_kill_codes.py -k named_point

test-python: wheel
	$(call unpack,$(VENV)/wheel,dist/*.whl)
	PYTHONPATH=$(abspath $(VENV)/wheel) $(BIN)/python -m pytest -m "not slow and not gpu and not full"

test-full: test-kill wheel  ## the long fault tiers as well
	cargo test --quiet --features failpoints -- --include-ignored
	$(call unpack,$(VENV)/wheel,dist/*.whl)
	PYTHONPATH=$(abspath $(VENV)/wheel) $(BIN)/python -m pytest -m "not gpu"

sanitize:  ## the kernels and the store under AddressSanitizer
	ASAN_OPTIONS=allocator_may_return_null=1 RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test --quiet --target $$(rustc -vV | sed -n 's/host: //p') \
		--target-dir $(TARGET)/asan --lib --test kernels_encode --test metrics_similarity --test store_roundtrip

emulated:  ## kernel tests on AVX-512 and aarch64 in software, see tests/emulated
	tests/emulated/avx512.sh $(TARGET)/emulated
	tests/emulated/neon.sh $(TARGET)/emulated

# The emulator of AVX-512 is for Linux on x86-64 alone.
NO_EMULATOR := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),,--exclude emulated-avx512)

lint: build  ## formatting, clippy, ruff, mypy, stubtest
	cargo fmt --all --check
	cargo clippy --workspace $(NO_EMULATOR) --all-targets --quiet -- -D warnings
	$(BIN)/ruff format --check python tests/python benches/python examples
	$(BIN)/ruff check python tests/python benches/python examples
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest microtome._core --allowlist .ci/stubtest-allowlist

bench: build  ## the table of ratios against torch, numpy, faiss and the CKA packages
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements pyproject.toml --extra bench
	$(BIN)/python benches/python/run.py

bench-rust: $(VENV)/.ready  ## criterion benches of the core
	cargo bench

docs: $(VENV)/.ready  ## the documentation as a site: target/site/index.html
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements pyproject.toml --extra docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --config-file .mkdocs.yml
	@echo open target/site/index.html

clean:  ## what was built
	rm -rf $(VENV) target dist demo
