# Everything a newcomer needs; `make help` lists it.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check install -q
# One build of torch for CPU machines, so that a laptop does not download CUDA. Where an NVIDIA driver is, PyPI's.
TORCH := torch==2.13.0
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)

LONGEST := $(patsubst %,tests/test_%.py,notebooks other_data slurm stopping start \
  train_notebook orphans real_input families contract)

.PHONY: help demo test lint lab clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/.installed  ## run the whole method on a tiny model, 2 to 4 minutes on 2 CPU cores
	@.venv/bin/python -m rsft_lib.notebook notebooks/00_quickstart.ipynb outputs/quickstart

test: lint  ## lint and all tests
	@# Most tests wait for processes to start, so four files at a time, those that take minutes first: begun last, one of
	@# them runs alone. More threads than cores wait for each other in loops that take all the time there is.
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder \
	  $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py))

lint: .venv/.installed  ## style of code and notebooks, and form of notebooks: parameters, no outputs, short cells
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/python -m pytest -q tests/test_project.py

lab: .venv/.installed  ## JupyterLab on the notebooks
	@.venv/bin/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

clean:  ## remove the environment; assets and outputs stay
	rm -rf .venv

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else \
	  f"Python 3.11 or 3.12 is needed, found %d.%d; say make PYTHON=python3.12" % v)'
	@echo "creating .venv and installing; this happens once"
	@$(PYTHON) -m venv .venv
	@$(PIP) --retries 1 $(TORCH_INDEX) $(TORCH)
	@$(PIP) -e '.[dev]'
	@touch $@
