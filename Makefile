# make demo: pretrain on a real genome, kill it, resume it.   make test: all tests.
# make bench: time and memory against the peers (DEVICE=cuda on a GPU).
# All make the environment (.venv) if it is not there. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests
DEVICE ?= cpu

.PHONY: demo test quick lint bench lock clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(TESTS)

# The tests that take seconds: what to run while working.
quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow and not distributed and not slurm" $(TESTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The figures of the README, with the machine named. On a small CPU: about an hour, in which nothing else should run.
bench: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[bench]"
	$(BIN)/megabase bench attention --device $(DEVICE) --json benchmarks/results/attention-$(DEVICE).json
	$(BIN)/megabase bench model --device $(DEVICE) --json benchmarks/results/model-$(DEVICE).json
	$(BIN)/megabase bench data --json benchmarks/results/data-cpu.json

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "megabase needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[test,lint]"
	touch $@

# Pin what is installed now, after the tests have passed with it.
lock: $(VENV)/.installed-test
	$(BIN)/python -m pip freeze --exclude-editable | sed "s/+cpu//" > requirements.lock

clean:
	rm -rf $(VENV) runs data/demo
