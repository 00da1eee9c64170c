# Farthing's everyday commands. `make demo` is the first one: it needs Python and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
# Nothing is compiled at the installation: a process that may not keep its bytecode would compile it all, each time.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help setup demo test lint bench bench-engines bench-audits bench-cascade faults faults-again advisories lock clean

help:
	@echo "make demo     run the whole thing on this machine: no account, key or container needed"
	@echo "make test     lint, types and every test but the long ones"
	@echo "make setup    only install into $(VENV)    make lint    only ruff and mypy"
	@echo "make bench    measure the pipeline         make faults  kill it, again and again"
	@echo "make bench-engines  the same job on processes, Prefect's workers, Dask and Ray, as far as they are installed"
	@echo "make bench-audits  how long an audit takes of a big ledger, ATTEMPTS=10000000 for a really big one"
	@echo "make bench-cascade  measure the certified cut against others"
	@echo "make lock     resolve requirements.lock    make clean   remove $(VENV), the sandbox and caches"
	@echo "make advisories  known vulnerabilities of what requirements.lock names, by pip-audit"

setup: $(READY)

# The stamp is written last, so that an interrupted installation is done again. Bytecode comes as it is needed: most of
# what is installed along with Prefect is never imported.
$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON): install Python 3.11 or newer, or say make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Farthing needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV): some 140 packages, about a minute"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: setup
	$(BIN)/farthing demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One more than there are cores, since many tests wait: for a heartbeat, for a server, for a process to end.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not long"

# Two at a time, on any machine: they kill processes and servers of their own, and what is measured is measured in
# company. SEED plays other faults, or the same again; SCALE is the share of the full counts, like 0.1.
SEED ?= 1
SCALE ?= 1
faults: setup
	FARTHING_FAULTS_SEED=$(SEED) FARTHING_FAULTS_SCALE=$(SCALE) FARTHING_FAULTS_REPORT=tests/faults/report.json \
		$(BIN)/python -m pytest tests/faults -m "long or not long" -n 2 --dist loadgroup -v
	$(BIN)/python -m pytest tests/acceptance tests/integration -m long -v

# Only the tests that failed, added to the report of the run they failed in. Their names have spaces.
faults-again: setup
	$(BIN)/python -m tests.faults.summary failed | tr '\n' '\0' | FARTHING_FAULTS_AGAIN=1 \
		FARTHING_FAULTS_SEED=$(SEED) FARTHING_FAULTS_SCALE=$(SCALE) FARTHING_FAULTS_REPORT=tests/faults/report.json \
		xargs -0 $(BIN)/python -m pytest -m "long or not long" -v

bench: setup
	$(BIN)/python -m benchmarks.pipeline

bench-engines: setup
	$(BIN)/python -m benchmarks.engines

ATTEMPTS ?= 500000
bench-audits: setup
	$(BIN)/python -m benchmarks.audits --attempts $(ATTEMPTS)

# Without PEERS=1 only what needs no package of others. With it these get an environment of their own, as nothing that
# Farthing runs on; where they cannot be installed, the bench says what it did not measure.
bench-cascade: setup
	if test -n "$(PEERS)" && ! test -e $(VENV)/peers; then $(PYTHON) -m venv $(VENV)/peers; \
		$(VENV)/peers/bin/python -m pip install --quiet --disable-pip-version-check bargain==0.1.3 "scikit-learn>=1.9,<2" || rm -rf $(VENV)/peers; fi
	$(BIN)/python -m benchmarks.cascade

# Known vulnerabilities of what the lock names; --strict: what cannot be looked up is a failure. It needs PyPI itself,
# so no test does it, and an environment of its own, so that it audits none of its own packages.
advisories:
	$(PYTHON) -m venv $(VENV)/advisories
	$(VENV)/advisories/bin/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.10,<3"
	$(VENV)/advisories/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

lock:
	UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile pyproject.toml --extra sandbox --extra otel --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url -o requirements.lock

clean:
	if test -x $(BIN)/farthing; then $(BIN)/farthing sandbox reset --yes; fi
	rm -rf $(VENV) .farthing data/licences .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
