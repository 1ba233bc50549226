# Every target makes .venv by itself, and only again when what it is made from has changed.
PYTHON ?= python3
WORKERS ?= 2
PORT ?= 8000
NBS := $(shell find nbs -name '*.ipynb' -not -path '*/.*')
PAGES := $(wildcard docs/*.py docs/map.toml docs/_static/*.css docs/_static/*.js) CHANGELOG.md CONTRIBUTING.md
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test docs docs-live export notebooks results verdicts hooks clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  make notebooks MODEL=Qwen/Qwen3-0.6B PAIRS=pairs.jsonl: every notebook that takes a model on yours; executed copies in notebooks-*/, ONLY= for a part"
	@echo "  PYTHON=$(PYTHON) is the interpreter that .venv is made with (3.11 or newer); WORKERS=$(WORKERS) processes run the tests"

demo: .venv/.package  ## train DPO and two hidden-state methods on the embedded world, and print where each stands
	$(BIN)/reprpo demo

test: .venv/.dev  ## ruff, tests/, and every notebook executed
	$(BIN)/ruff check
	$(BIN)/python -m pytest -n $(WORKERS) --maxschedchunk 1

docs: docs/_build/html/index.html  ## the site, in docs/_build/html
	@echo "open $<"

docs-live: docs/_build/html/index.html  ## the site on http://127.0.0.1:8000 (PORT=), built again when a notebook changes
	$(BIN)/python docs/live.py $(PORT)

export: .venv/.dev  ## notebooks to modules, notebooks stripped of what changes by itself, README
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python docs/readme.py

notebooks: .venv/.dev  ## execute the notebooks and keep their outputs; ONLY=nbs/06_losses for a part
ifneq ($(strip $(MODEL)$(PAIRS)),)
	@env -u OMP_NUM_THREADS $(BIN)/python docs/execute.py --model '$(MODEL)' --pairs '$(PAIRS)' $(ONLY)
else
	$(BIN)/python docs/execute.py $(ONLY)
	$(MAKE) export
endif

results: .venv/.dev  ## the demo's table on the first page, made again
	$(BIN)/python docs/demo.py
	$(MAKE) notebooks ONLY=nbs/index.ipynb

verdicts: .venv/.dev  ## the comparisons behind the page of verdicts, made again (two hours on two cores; resumes)
	$(BIN)/python docs/verdicts.py
	$(BIN)/python bench/error_rates.py

hooks: .venv/.dev  ## git hooks: no commit with notebooks and modules out of step
	git config core.hooksPath .githooks

clean:  ## remove .venv and what was built
	rm -rf .venv build docs/_build docs/_pages

docs/_build/html/index.html: .venv/.dev $(NBS) $(PAGES) reprpo/_modidx.py
	$(BIN)/python docs/prepare.py nbs docs/_pages
	$(BIN)/sphinx-build -q -a -b html -j auto -W --keep-going -d docs/_build/doctrees -c docs docs/_pages docs/_build/html
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "reprpo needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.package: settings.ini setup.py constraints.txt | .venv/bin/python
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.package
	$(PIP) -e '.[dev]'
	@touch $@
