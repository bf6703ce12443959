# Each target first makes .venv, once. A fresh machine needs Python 3.10 or newer, and make.
PYTHON ?= python3
# The tests of one cluster stay in one process.
PYTEST_ARGS ?= -n 2 --dist loadgroup
PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_DISABLE_PIP_VERSION_CHECK

BIN := .venv/bin
INSTALLED := .venv/.installed
# Where mypy and editors find blackpoint.*, whose folders lie at the top.
LINKS := .venv/src/blackpoint

# Importing compiles what our commands use: a quarter of what is installed, while pip would compile
# all of it, for two minutes.
IMPORTED := import blackpoint.scripts.miniature.demo_steps, blackpoint.train.run, wandb, pytest; \
  from diffusers import StableDiffusionPipeline, UNet2DConditionModel; \
  from transformers import CLIPTextModel

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench black-point full-architecture

help:
	@echo "make demo         show the zero-SNR fix on real digits: runs/demo/report.html"
	@echo "make test         run every test, the fast ones first"
	@echo "make lint         ruff and mypy"
	@echo "make bench        speed and memory beside a bare loop, accelerate and diffusers; half an hour"
	@echo "make black-point  measure the black point, 500 images a cell"
	@echo "make full-architecture  every verb at full size: time and memory (24 GB, 40 GB of disk)"
	@echo "PYTHON=python3.12 make ... chooses the Python that .venv is made from (3.10 or newer)"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not installed; set PYTHON to a Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$$($(PYTHON) --version) is too old; set PYTHON to a Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@echo "installing into .venv: once, a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --editable '.[demo,dev]'
	@mkdir -p $(LINKS)
	@for folder in assets configs data sampling scripts train; do \
	  ln -sfn ../../../$$folder $(LINKS)/$$folder; done
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -W ignore -c "$(IMPORTED)"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/blackpoint demo

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m blackpoint.scripts.bench.bench

black-point: $(INSTALLED)
	$(BIN)/python -m blackpoint.scripts.studies.black_point_study

full-architecture: $(INSTALLED)
	$(BIN)/python -m blackpoint.scripts.measurements.full_architecture architecture=sd15
	$(BIN)/python -m blackpoint.scripts.measurements.full_architecture architecture=sd21_base
	$(BIN)/python -m blackpoint.scripts.measurements.full_architecture architecture=sdxl
