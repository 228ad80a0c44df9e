# make demo: train a small OpenELM on your Python installation's text, then read what it writes.
# make test, make check: what the continuous integration runs.
# Each sets itself up in .venv, and does nothing twice.

PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-transformers-4 check clean
.DELETE_ON_ERROR:

.venv/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# torch first and pinned: its dependants would otherwise choose another build. The CPU decoder is compiled here.
.venv/user: .venv/python pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[plot,gguf]'
	touch $@

# The project is there already: this adds what its developers need, and compiles nothing again.
.venv/developer: .venv/user
	$(BIN)/pip install --quiet --constraint constraints.txt 'openelm-framework[dev]'
	touch $@

demo: runs/demo/summary.json
	$(BIN)/openelm generate runs/demo --prompt 'def read(self' --max-tokens 120 --temperature 0.7 --top-p 0.95
	@echo
	@echo "The curve, the samples and the geometry: runs/demo/report/index.html"

# A run that was stopped goes on where it was.
runs/demo/summary.json: | .venv/user
	$(BIN)/openelm pretrain demo --minutes 4.2 --auto-resume

test: .venv/developer
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The transformers model with the older transformers, in an environment of its own.
test-transformers-4: .venv-transformers-4/ready
	.venv-transformers-4/bin/python -m pytest tests/interop/test_modeling.py

.venv-transformers-4/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-transformers-4
	.venv-transformers-4/bin/pip install --quiet "$(TORCH)"
	.venv-transformers-4/bin/pip install --quiet --constraint constraints.txt --editable . 'transformers==4.57.*' accelerate pytest
	touch $@

check: .venv/developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-transformers-4 runs build dist
