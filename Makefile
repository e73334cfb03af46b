# `make help` lists what there is. A virtual environment in $(VENV) is made when it is needed, and again when
# pyproject.toml or constraints.txt change. Any of these can be set on the command line: PYTHON, VENV, ARGS.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Every test computes with one thread, so a process per core.
WORKERS ?= -n logical --maxprocesses 8 --dist worksteal

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt
COMMA := ,

.DEFAULT_GOAL := help
.PHONY: help demo test nightly lint dev wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## */  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/.installed  ## train Hbat on the embedded model and task, into runs/demo
	$(BIN)/hbat fit --config configs/hbat_dpo.yaml --config configs/demo.yaml \
		--trainer.callbacks.strength 1 --overwrite true $(ARGS)

test: $(VENV)/.installed-test  ## run the tests, with coverage
	$(BIN)/python -m pytest $(WORKERS) --cov --cov-report=term $(ARGS)

nightly: $(VENV)/.installed-test  ## run the tests that take minutes each
	$(BIN)/python -m pytest -m nightly $(ARGS)

lint: dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hbat_lightning

dev: $(VENV)/.installed-dev hbat_lightning/callbacks  ## install everything needed to work on the code

wheel: $(VENV)/.installed-test  ## build a wheel into dist/
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation
	rm -rf build

clean:  ## remove what builds and checks leave behind; not the environment, not runs/
	rm -rf build dist *.egg-info htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	if [ -L hbat_lightning/callbacks ]; then rm hbat_lightning/callbacks; fi

# Type checkers and editors do not see the import hook of an editable install; git ignores this link.
hbat_lightning/callbacks:
	ln -s ../callbacks $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, \
	this one is %d.%d: make PYTHON=/path/to/python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first, by itself: what it takes is then decided by the pin alone, and a build that is there stays.
define install
$(PIP) install -c constraints.txt torch
$(PIP) install -c constraints.txt -e ".$(1)"
@touch $@
endef

$(VENV)/.installed: $(VENV)/.created $(REQUIREMENTS)
	$(call install,)

$(VENV)/.installed-test: $(VENV)/.created $(REQUIREMENTS)
	$(call install,[test])

$(VENV)/.installed-dev: $(VENV)/.created $(REQUIREMENTS)
	$(call install,[dev$(COMMA)oracles])
