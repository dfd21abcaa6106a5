# Each target does all it needs on a fresh machine with Python >= 3.11: it makes the environment
# .venv, installs into it, and runs. `make` alone lists the targets.
#
#   PYTHON=python3.12        the interpreter .venv is made with (when it exists: `make clean` first)
#   JOBS=4                   test processes
#   NEWEST_PYTHON=python3.13 the interpreter of the second test run of `make check`

PYTHON ?= python3
JOBS ?= 2

# On Linux, memory that a step has used is kept for the next one, not given back to the kernel and
# faulted in again: 0.6 of the time of a small step on a CPU. Both are needed, and read by glibc.
export MALLOC_MMAP_THRESHOLD_ := 1000000000
export MALLOC_TRIM_THRESHOLD_ := 1000000000

VENV := .venv
NEWEST_VENV := .venv-newest
# Not compiled: only what is imported gets compiled then, which saves half of the install's time.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
# A file's tests stay in one process, so that what they compile is compiled once.
PYTEST := -m pytest -q -n $(JOBS) --dist loadfile
FAST := not slow and not oracle and not drill

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo demo-transfer demo-family test check check-newest drills format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-stamp ## pre-train on the packaged digits, into runs/demo
	$(VENV)/bin/python -m mae_jax.main --config=demo --workdir=runs/demo

demo-transfer: demo ## compare uses of the demo's encoder with 100 and 500 labels
	$(VENV)/bin/python -m mae_jax.tools.transfer_table --checkpoint=runs/demo --out=runs/demo_transfer

demo-family: $(VENV)/.demo-stamp ## train all methods on the digits and compare them
	$(VENV)/bin/python -m mae_jax.tools.family_table --out=runs/family

test: $(VENV)/.dev-stamp ## run the fast tests
	$(VENV)/bin/python $(PYTEST)

# One after the other: each has tests that need 10 GB of memory and more.
check: $(VENV)/.oracle-stamp ## lint, types, slow tests, oracles, fast tests on the newest Python
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/python $(PYTEST) -m "slow and not oracle and not drill"
	$(VENV)/bin/python $(PYTEST) -m "oracle and not drill"
	@$(MAKE) --no-print-directory check-newest

check-newest: $(VENV)/.python-stamp ## run the fast tests on the newest Python, if newer than .venv's
	@newest="$(NEWEST_PYTHON)"; \
	if [ -z "$$newest" ]; then $(find_newest); fi; \
	if [ -z "$$newest" ]; then \
	  echo "check-newest: skipped, no Python newer than the one of $(VENV) is installed"; \
	else \
	  $(MAKE) --no-print-directory $(NEWEST_VENV)/.dev-stamp NEWEST_PYTHON="$$newest" && \
	  echo "check-newest: $$($(NEWEST_VENV)/bin/python --version)" && \
	  $(NEWEST_VENV)/bin/python $(PYTEST) -m "$(FAST)"; \
	fi

drills: $(VENV)/.dev-stamp ## kill, damage and fault runs, and see that they recover
	$(VENV)/bin/python -m pytest -m drill -s

format: $(VENV)/.dev-stamp ## format the code and mend what lint can mend
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean: ## remove environments, caches and build outputs; runs/ stays
	rm -rf $(VENV) $(NEWEST_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find configs mae_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: one is renewed when what it depends on is newer. Installs are editable, so that a change
# of the code needs none.

$(VENV)/.python-stamp:
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "$(PYTHON) not found: install Python >= 3.11, or name one, as in make test PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python >= 3.11 is needed, which $(PYTHON) is not: name another, as in make test PYTHON=python3.12"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.demo-stamp: $(VENV)/.python-stamp setup.py
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev-stamp: $(VENV)/.python-stamp setup.py
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

# timm of the official fine-tuning, one file of which is read. Not the torchvision it asks for: one
# that was not built for the very torch at hand keeps transformers from being imported.
$(VENV)/.oracle-stamp: $(VENV)/.dev-stamp
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[dev,oracle]'
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps timm==0.3.2
	@touch $@

$(NEWEST_VENV)/.dev-stamp: setup.py
	"$(NEWEST_PYTHON)" -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

# Shell code that sets $newest to the newest interpreter that is newer than .venv's, runs (a pyenv
# shim of a version that is not enabled does not), and can make an environment; else to nothing.
define find_newest
have=$$($(VENV)/bin/python -c 'import sys; print(sys.version_info[1])'); \
for minor in 14 13 12; do \
  for python in python3.$$minor "$$HOME"/.pyenv/versions/3.$$minor.*/bin/python; do \
    if [ -z "$$newest" ] && [ "$$minor" -gt "$$have" ] && \
       "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then newest="$$python"; fi; \
  done; \
done
endef
