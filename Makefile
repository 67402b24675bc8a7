# Two commands: `make demo` and `make test`. Both make .venv themselves.
# ARGS goes to the command: make demo ARGS='--port 0', make test ARGS='-k wire'. The tests run in
# JOBS processes, each with servers of its own. (One more than two processors: a third of the time
# a test waits for somebody.)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 3

# What decides whether the installation is still current.
SOURCES := pyproject.toml setup.py conchkernel/_fastpty.pyx

.PHONY: demo test lint bench bench-ssh bench-files bench-tunnels fuzz clean need-tools

demo: need-tools $(VENV)/.demo
	@exec $(BIN)/conchkernel demo $(ARGS)

test: need-tools $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: need-tools $(VENV)/.test
	$(BIN)/python -m bench $(ARGS)

bench-ssh: need-tools $(VENV)/.test
	$(BIN)/python -m bench.ssh_servers $(ARGS)

bench-files: need-tools $(VENV)/.test
	$(BIN)/python -m bench.files $(ARGS)

bench-tunnels: need-tools $(VENV)/.test
	$(BIN)/python -m bench.tunnels $(ARGS)

# A few thousand inputs for each parser that a stranger reaches; more by FUZZ='-max_total_time=600'.
FUZZ ?= -runs=20000

fuzz: need-tools $(VENV)/.test
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet atheris
	@for target in hello clear stranger user keys offers; do \
	  echo "$$target"; $(BIN)/python -m tests.fuzz $$target $(FUZZ) >fuzz.log 2>&1 || \
	  { tail -40 fuzz.log; exit 1; }; done; rm -f fuzz.log

clean:
	rm -rf $(VENV) build dist *.egg-info conchkernel/*.c conchkernel/*.so

# Everything that is missing, in one line.
need-tools:
	@missing=; \
	command -v $(PYTHON) >/dev/null || missing="$$missing python3"; \
	test -e $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  missing="$$missing python3-venv"; \
	command -v ssh >/dev/null || missing="$$missing openssh-client"; \
	test -z "$$missing" || { \
	  echo "Something is missing here. On Debian: sudo apt install$$missing" >&2; exit 1; }

$(BIN)/python: | need-tools
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "conchkernel needs Python 3.11 or newer. If there is one: make PYTHON=python3.12 ..." >&2; exit 1; }
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
