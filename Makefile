# SenseQuant. `make run` and `make test` need only Python 3.11+ and make; everything else they bring.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.PHONY: help run test lab text export report bench
.PHONY: release-audit release-validate release-manifest release-deploy release-rollback release-status
.PHONY: deploy-staging deploy-prod

VENV := .venv
PY := $(VENV)/bin/python
SENSEQUANT := $(PY) -c 'from sensequant.ops.main import main; main()'
STAMP := $(VENV)/installed
FIND_PYTHON := for p in python3.14 python3.13 python3.12 python3.11 python3 python; do if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONUTF8 := 1

# The training run: make run, make run SIGNAL_IC=0, make run ARGS="--csv-dir bars --start 2022-01-01"
SIGNAL_IC ?=
ARGS ?=
FAST ?=
CALIBRATE ?=
RUN ?= latest
KIND ?=
FORMAT ?=

# A release: make deploy-staging RUN=live_candidate_..., which asks for yes, or YES=release_...
ENVIRONMENT ?=
YES ?=
WHY ?=
export WHY
PLACE = $(if $(ENVIRONMENT),--environment $(ENVIRONMENT))
CONFIRM = $(if $(YES),--yes $(YES))

help:  ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 26

$(STAMP): settings.ini setup.py pyproject.toml
	@python=$$($(FIND_PYTHON))
	if [ -z "$$python" ]; then echo "error: Python 3.11 or newer must be on the PATH; found none" >&2; exit 1; fi
	echo "Making the environment in $(VENV) with $$($$python --version); once, about a minute"
	[ -x $(PY) ] || $$python -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24" "setuptools>=77" wheel
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(STAMP)

run: $(STAMP)  ## the whole training run on the simulated market; SIGNAL_IC=0 shows a refusal
	@$(SENSEQUANT) run $(if $(ARGS),$(ARGS),--propose) $(if $(SIGNAL_IC),--signal-ic $(SIGNAL_IC))

test: $(STAMP)  ## all checks and tests; FAST=1 leaves out the slow ones
	@$(PY) tests/check.py $(if $(FAST),--fast)

lab: $(STAMP)  ## JupyterLab, opened on the first look
	@$(PY) -m jupyterlab nbs/tutorials/1_first_look.ipynb

text: $(STAMP)  ## notebooks as text in text/, to be edited there and synced back with make text
	@$(PY) -m jupytext --quiet --sync nbs/*.ipynb nbs/*/*.ipynb
	$(PY) -c 'from nbdev.clean import nbdev_clean; nbdev_clean()'
	echo "text/ mirrors nbs/; edit there, then make text export"

export: $(STAMP)  ## clean the notebooks and write the package and README.md from them
	@$(PY) tests/export.py

report: $(STAMP)  ## pages of a run: make report RUN=live_candidate_... [KIND=accuracy FORMAT=pdf]
	@$(SENSEQUANT) report $(RUN) $(KIND) $(if $(FORMAT),--format $(FORMAT))

bench: $(STAMP)  ## speed, as ratios measured in one run; CALIBRATE=1 the gate on empty markets, hours
	@$(if $(CALIBRATE),$(SENSEQUANT) calibrate --replications 400 $(ARGS),$(PY) tests/bench.py)

release-validate: $(STAMP)  ## verify the evidence of a run, RUN=; the code is tested by make test
	@$(SENSEQUANT) release validate $(RUN)

release-manifest: $(STAMP)  ## what a run's manifest says, and whether the run is still whole, RUN=
	@$(SENSEQUANT) release manifest $(RUN)

release-audit: $(STAMP)  ## audit bundle of what is deployed; ENVIRONMENT=staging or production alone
	@$(SENSEQUANT) release audit $(PLACE)

release-deploy: $(STAMP)  ## make an approved run active, RUN= ENVIRONMENT=; asks, or YES=release_...
	@$(SENSEQUANT) release deploy $(RUN) $(PLACE) $(CONFIRM)

deploy-staging: $(STAMP)  ## the same to staging
	@$(SENSEQUANT) release deploy $(RUN) --environment staging $(CONFIRM)

deploy-prod: $(STAMP)  ## the same to production, after its sessions in staging
	@$(SENSEQUANT) release deploy $(RUN) --environment production $(CONFIRM)

release-rollback: $(STAMP)  ## restore the release before it, WHY="..." [ENVIRONMENT= YES=release_...]
	@$(SENSEQUANT) release rollback $(PLACE) --why "$$WHY" $(CONFIRM)

release-status: $(STAMP)  ## what is active, since when and how it is watched
	@$(SENSEQUANT) release status
