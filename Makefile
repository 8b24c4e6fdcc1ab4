# Two commands do everything: `make quickstart` and `make test`. Both make their own environment first.
# PYTHON picks another interpreter: make test PYTHON=python3.12

LOCKED := $(patsubst requirements/py%.txt,%,$(wildcard requirements/py*.txt))
CANDIDATES := python3 $(addprefix python,$(LOCKED)) python
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(if $(filter $(LOCKED),$(call version,$(p))),$(p))))
LINE := $(call version,$(PYTHON))
LOCK := requirements/py$(LINE).txt
VENV := .venv/$(LINE)
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python
# A process a core, at most four: each holds eight simulated devices and some 2 GB.
# One that crashes ends the run with its test's name: in its place another may get what is done already, and
# all wait for ever (pytest-xdist 3.8, issue 1378).
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=loadfile --max-worker-restart=0

.PHONY: help quickstart test test-fast lint lock install clean

help:
	@echo "make quickstart   train a small language model on Python's own source, about 3 minutes"
	@echo "make test         all tests; make test-fast: without the slow ones"
	@echo "make lint         ruff; make lock: resolve the requirements anew (needs uv)"
	@echo "Python lines with pinned requirements: $(LOCKED); this would use: $(PYTHON) $(LINE)"

quickstart: install
	$(RUN) scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart

test: install
	$(RUN) -m pytest $(PARALLEL)

test-fast: install
	$(RUN) -m pytest $(PARALLEL) -m "not slow"

lint: install
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

ifeq ($(filter $(LINE),$(LOCKED)),)
install:
	@echo "no pinned requirements for Python '$(LINE)' ($(PYTHON)); there are: $(LOCKED)." >&2
	@echo "Name one of these: make test PYTHON=python3.12. Or without pins: pip install -e '.[dev]'" >&2
	@exit 2
else
install: $(INSTALLED)
endif

$(INSTALLED): $(LOCK) pyproject.toml
	@echo "installing $(LOCK) into $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed; on Debian: apt install python3-venv" >&2; exit 2; }
	@$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r $(LOCK)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

lock:
	@for line in $(LOCKED); do \
	  uv pip compile pyproject.toml --extra dev --python-version $$line --universal --fork-strategy fewest \
	    --upgrade --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet \
	    -o requirements/py$$line.txt || exit 1; \
	done

clean:
	rm -rf .venv runs build *.egg-info
