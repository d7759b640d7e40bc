# Every target makes .venv by itself, from the pinned requirements, when those are newer than it.
# PYTHON=python3.12 chooses another interpreter for it, WORKERS=4 the number of test processes.

VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?=
WORKERS ?= 2
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev

.PHONY: help demo test check format clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile

demo: $(RUNTIME)  ## generate text with the shipped model, un-masking block by block
	@$(PY) -m reference.demo

test: $(DEV)  ## every test, on the CPU
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS)

check: $(DEV)  ## ruff (lint and format) and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(DEV)  ## let ruff rewrite the files
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:  ## remove .venv and everything generated
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): requirements.txt scripts/bootstrap.sh
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh $(VENV) requirements.txt
	@touch $@

# mamba_ssm's sources hold PyTorch references that the tests compare with; its CUDA extension is not wanted.
$(DEV): requirements-dev.txt requirements-peers.txt $(RUNTIME)
	@scripts/bootstrap.sh $(VENV) requirements-dev.txt
	@MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
		scripts/bootstrap.sh $(VENV) requirements-peers.txt --no-deps --no-build-isolation
	@touch $@
