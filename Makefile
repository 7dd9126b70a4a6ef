# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Quiet, local, and no telemetry, in all that runs from here.
export RAY_USAGE_STATS_ENABLED := 0
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1

.PHONY: help install demo test lint slow bench serve licences sbom audit clean

help: ## Say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

install: $(READY) ## Make .venv and install everything into it

$(READY): pyproject.toml deploy/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e '.[all,dev]'
	touch $@

demo: $(READY) ## Run the main job on synthetic images, write a report, score a batch through the endpoint
	$(BIN)/dermaflow demo
	$(BIN)/dermaflow serve demo

lint: $(READY) ## Style, walls between the packages, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint ## Everything CI runs: lint, walls, types, tests (two files at a time, the long ones first)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(READY) ## The long tests
	$(BIN)/python -m pytest -m slow

bench: $(READY) ## Measure again what docs/results.md says of speed
	$(BIN)/python bench/preparation.py
	$(BIN)/python bench/training.py
	$(BIN)/python bench/pathways.py
	$(BIN)/python bench/scoring.py
	$(BIN)/python bench/serving.py

serve: demo ## Serve the demo's model and show the page; Ctrl-C ends it
	$(BIN)/dermaflow serve --model demo-run/model --state demo-run/serve

licences: $(READY) ## Write docs/licences.md from what is installed
	$(BIN)/python .ci/licences.py docs/licences.md

sbom: $(READY) ## Write the bill of materials, build/sbom.json (CycloneDX)
	$(BIN)/python .ci/licences.py build/sbom.json

audit: ## Look the pinned versions up among known vulnerabilities; needs the network
	test -x build/audit/bin/pip-audit || ($(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit)
	build/audit/bin/pip-audit --no-deps --disable-pip --requirement deploy/constraints.txt

clean: ## Remove what the demo and the installation wrote
	rm -rf $(VENV) demo-run
