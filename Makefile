PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO := demo

.PHONY: demo poc test test-slow lint bench clean

demo: .venv/installed  ## three generated hospitals train one nnU-Net together
	NNUNET_FLARE_HOME=$(CURDIR)/$(DEMO) $(BIN)/nvflare simulator jobs/ffe -n 3 -t 3 -w $(DEMO)/simulator -l jobs/progress_log.json
	NNUNET_FLARE_HOME=$(CURDIR)/$(DEMO) $(BIN)/nnunet-flare status ffe

poc: .venv/installed  ## a provisioned federation of real processes on this machine, from kits to fetched results
	$(BIN)/python poc/run.py

test: .venv/installed  ## everything but the slow tier
	$(BIN)/pytest -m "not slow"

test-slow: .venv/installed
	$(BIN)/pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p nnunet_flare.errors -p nnunet_flare.storage -p nnunet_flare.fingerprint -p nnunet_flare.aggregation -p nnunet_flare.encryption
	$(BIN)/lint-imports

bench: .venv/installed  ## minutes; see benchmarks/README.md
	$(BIN)/python benchmarks/wire.py
	$(BIN)/python benchmarks/aggregate.py
	$(BIN)/python benchmarks/asym.py
	$(BIN)/python benchmarks/he.py
	$(BIN)/python benchmarks/tax.py
	$(BIN)/python benchmarks/ffe_equality.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv $(DEMO) poc/federation
