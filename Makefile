# `make` lists what there is. Everything runs in .venv, which is made on first use and only then.

PYTHON ?= python3
BIN := .venv/bin
LONGEST := notebooks/07_pretraining.ipynb notebooks/00_tour.ipynb# they go first, so that none runs alone at the end
NOTEBOOKS := $(LONGEST) $(filter-out $(LONGEST),$(sort $(wildcard notebooks/*.ipynb)))
JOBS ?= 2# test processes side by side, each with one thread
TOUR := $(if $(DATA),--data "$$DATA") $(if $(MINUTES),--minutes "$(MINUTES)")

.DEFAULT_GOAL := help
.PHONY: help tour test gpu notebooks book clean
.NOTPARALLEL: # one pip at a time, and one job after the other

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'

tour: .venv/.stamp ## learn from pictures in minutes, then judge and report [DATA=folder-or-archive] [MINUTES=4]
	@$(BIN)/minidino tour $(TOUR)

test: .venv/.stamp-test ## run all tests, and every notebook against its stored outputs [JOBS=2]
	@echo "make: running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile tests
	@$(if $(NOTEBOOKS),echo "make: comparing the notebooks with their stored outputs")
	@$(if $(NOTEBOOKS),OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadscope \
		--no-loadscope-reorder --nbval --nbval-current-env $(NOTEBOOKS))

gpu: .venv/.stamp-test ## on a machine with a CUDA GPU: the tests that are skipped without one, and memcheck of the kernels
	@$(BIN)/python -m pytest -m gpu tests
	@$(BIN)/python benchmarks/memcheck.py run

notebooks: .venv/.stamp-test ## run every notebook again and store its outputs; nothing else writes them
	@$(if $(NOTEBOOKS),echo "make: running $(words $(NOTEBOOKS)) notebooks",echo "make: there are no notebooks yet")
	@$(if $(NOTEBOOKS),$(BIN)/python -m nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False $(NOTEBOOKS))

book: .venv/.stamp-book ## make the course a web page, build/book/index.html, from the notebooks as they are kept
	@$(BIN)/python book/bind.py

clean: ## remove .venv and all caches; runs are kept
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.stamp: pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "make: there is no $(PYTHON); name a Python >= 3.11, as in: make tour PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: Python >= 3.11 is needed and $(PYTHON) is older; name another: make tour PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "make: setting up .venv, once: PyTorch is large, allow some minutes and up to 7 GB of disk"
	@"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.stamp-test: .venv/.stamp
	@echo "make: adding what tests and notebooks need to .venv, once: a minute or two"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,notebooks]'
	@touch $@

.venv/.stamp-book: .venv/.stamp
	@echo "make: adding what the book needs to .venv, once"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[book]'
	@touch $@
