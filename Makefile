# Every task of the project; `make` alone lists them. All of it lives in .venv, which is made where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGING := settings.ini setup.py pyproject.toml
PAGES := $(sort $(wildcard nbs/*.ipynb nbs/tutorials/*.ipynb))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-install test-oldest bench scores lint export pages docs docs-links docs-test clean
.DELETE_ON_ERROR:

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ssm_lib needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# One stamp per extra: installed again only when what is to be installed has changed.
$(VENV)/.installed-%: $(PACKAGING) | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

install: $(VENV)/.installed-dev  ## make .venv with everything that development needs

demo: $(VENV)/.installed-demo  ## train on a real PDE, roll it out, and write the results under runs/
	$(BIN)/python -m ssm_lib.cli demo

# How the tests have XLA compile; `make test QUICK=` runs all of them as users' programs run.
QUICK = $$($(BIN)/python tests/conftest.py)
AS_USERS_DO := $(addprefix tests/test_,accuracy.py cost.py golden.py)
test: install  ## run the guards, the notebooks and the tests
	$(BIN)/pytest tests/test_guards.py
	XLA_FLAGS="$(QUICK)" $(BIN)/nbdev_test
	XLA_FLAGS="$(QUICK)" $(BIN)/pytest -n auto $(addprefix --ignore=,tests/test_guards.py $(AS_USERS_DO))
	XLA_FLAGS= $(BIN)/pytest -n auto $(AS_USERS_DO)

test-install:  ## install into a bare environment and import, without any development tool
	rm -rf .venv-bare build
	$(PYTHON) -m venv .venv-bare
	.venv-bare/bin/python -m pip install --quiet .
	.venv-bare/bin/python -m pip check
	.venv-bare/bin/python -I -c 'import ssm_lib; print("ssm_lib", ssm_lib.__version__, "imports from a bare install")'

test-oldest:  ## run the notebooks and the tests on the lower bounds of settings.ini (Python 3.11)
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	sed -n 's/^requirements *= *//p' settings.ini | tr ' ' '\n' | sed 's/>=/==/' > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/oldest.txt --editable '.[dev]'
	XLA_FLAGS="$$(.venv-oldest/bin/python tests/conftest.py)" .venv-oldest/bin/nbdev_test
	.venv-oldest/bin/pytest -n auto --ignore=tests/test_guards.py

bench: install $(VENV)/.installed-bench  ## measure speed and memory; tables in benchmarks/results/
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/space_cost.py
	$(BIN)/python benchmarks/mesh.py
	$(BIN)/python benchmarks/newer.py

scores: install $(VENV)/.installed-bench  ## what is missing of the scores on public protocols; hours, can be stopped at any time
	$(BIN)/python benchmarks/apebench.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/timescales.py
	$(BIN)/python benchmarks/recall.py

lint: install  ## check the style of notebooks and scripts
	$(BIN)/ruff check nbs tests tools setup.py $(wildcard benchmarks)

export: install  ## write ssm_lib/ and README.md from the notebooks, and clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py

pages: export  ## run every page top to bottom and store its outputs; PAGES=nbs/01_scan.ipynb runs one
	JAX_PLATFORMS=cpu $(BIN)/jupyter-nbconvert --to notebook --execute --inplace \
		--Exporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor --log-level=WARN $(PAGES); \
		status=$$?; $(BIN)/nbdev_clean; exit $$status
	$(BIN)/python tools/readme.py

# Quarto where it is, else Sphinx, which pip brings; `make docs QUARTO=` builds with Sphinx in any case.
QUARTO ?= $(shell command -v quarto)
docs: install $(if $(QUARTO),,$(VENV)/.installed-docs)  ## build the site into _docs/
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)" JAX_PLATFORMS=cpu sh -c "$(if $(QUARTO),touch README.md && nbdev_docs,python tools/docs.py)"

docs-links:  ## build the site without Quarto and follow every link, without a browser or a network
	$(MAKE) docs QUARTO=
	$(BIN)/pytest tools/links_test.py

docs-test: docs-links  ## build the site, follow its links and look at every page in Chromium
	$(BIN)/pytest tools/docs_test.py

clean:  ## remove what can be made again; results under runs/ stay
	rm -rf .venv .venv-bare .venv-oldest build dist _docs _proc nbs/nbdev.yml *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
