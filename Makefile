# Everything a newcomer needs; `make help` lists it.
# The first of these that is a Python for which megatron-core exists.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c '$(FITS)' 2>/dev/null && { echo $$python; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# torch's build for CPUs, so that a laptop does not download CUDA. Where an NVIDIA driver is, PyPI's.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)

LONGEST := $(patsubst %,tests/%.py,notebooks/test_notebooks notebooks/test_other_data launch/test_slurm \
  notebooks/test_project_chain notebooks/test_experts notebooks/test_sweep notebooks/test_dialect_chain training/test_stopping training/test_start notebooks/test_train_notebook \
  launch/test_orphans data/test_real_input model/test_families tokenizer/test_contract)

# What depends on the version of megatron-core; `make test-engine VENV=.venv-3.12 PYTHON=python3.12` runs it with another.
ENGINE := tests/model tests/training $(patsubst %,tests/%.py,checkpoint/test_conversion notebooks/test_demo)

.PHONY: help demo gallery test test-engine lint lab clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed  ## run the whole method on a tiny model, 3 to 5 minutes on 2 CPU cores
	@$(BIN)/python -m rsft_lib.notebook notebooks/00_quickstart.ipynb outputs/quickstart

gallery: $(VENV)/.installed  ## all notebooks executed with the tiny model, as pages in outputs/gallery; 13 minutes
	@for notebook in notebooks/*.ipynb; do $(BIN)/python -m rsft_lib.notebook $$notebook outputs/gallery || exit; done
	@$(BIN)/jupyter nbconvert --log-level=ERROR --to html outputs/gallery/*.ipynb
	@ls $(CURDIR)/outputs/gallery/*.html

test: lint  ## lint and all tests
	@# Most tests wait for processes to start, so four files at a time, those that take minutes first: begun last, one of
	@# them runs alone. More threads than cores wait for each other in loops that take all the time there is.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder \
	  $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py tests/*/test_*.py))

test-engine: $(VENV)/.installed  ## the tests of training, conversion and the demo only
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(ENGINE) \
	  $(patsubst %,--ignore=tests/training/test_%.py,advisor model_menu)

lint: $(VENV)/.installed  ## style of code and notebooks, types, and form of notebooks: parameters, no outputs, short cells
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_project.py

lab: $(VENV)/.installed  ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

clean:  ## remove the environment; assets and outputs stay
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(FITS)' || { echo "Python 3.11, 3.12 or 3.13 is needed, found" \
	  "$$($(or $(PYTHON),python3) --version 2>&1); install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version) ($$(command -v $(PYTHON))) and installing; this happens once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --retries 1 $(TORCH_INDEX) torch
	@$(PIP) -e '.[dev]'
	@touch $@
