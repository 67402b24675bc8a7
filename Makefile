# Two commands: `make demo` and `make test`. Both make .venv themselves.
# ARGS goes to the command: make demo ARGS='--port 0', make test ARGS='-k wire'.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# What decides whether the installation is still current.
SOURCES := pyproject.toml setup.py conchkernel/_fastpty.pyx

.PHONY: demo test lint bench clean need-ssh need-test-tools

demo: need-ssh $(VENV)/.demo
	@exec $(BIN)/conchkernel demo $(ARGS)

test: need-test-tools $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: need-test-tools $(VENV)/.test
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info conchkernel/*.c conchkernel/*.so

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "No $(PYTHON) here. On Debian: sudo apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "conchkernel needs Python 3.11 or newer. If there is one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "This Python cannot make a venv. On Debian: sudo apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# Cython and setuptools come from pip's build isolation; no compiler is no error (setup.py).
$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	@echo "Installing into $(VENV). This happens once." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/python
	@echo "Installing into $(VENV). This happens once." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test]'
	@touch $@ $(VENV)/.demo

need-ssh:
	@command -v ssh >/dev/null || { \
	  echo "No ssh client here. On Debian: sudo apt install openssh-client" >&2; exit 1; }

need-test-tools:
	@for tool in ssh ssh-keygen; do command -v $$tool >/dev/null || { \
	  echo "The tests need $$tool. On Debian: sudo apt install openssh-client" >&2; \
	  exit 1; }; done
