# make demo     pretrain on a real genome, kill the run, resume it
# make test     all tests; make quick: those that take seconds
# make lint     ruff, mypy, the order of imports, and the docs
# make docs     the site, in build/site
# make mlflow   MLflow's page with the runs of the demo (PORT=5000)
# make bench    time and memory beside other libraries (DEVICE=cuda on a GPU)
# Each makes the virtual environment .venv if there is none. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests
# Two tests that start ranks never run at once. WORKERS sets the number of processes that run tests (0: this one). They
# keep compiled files, even if PYTHONDONTWRITEBYTECODE is set: each compiles all tests otherwise, which takes 4 s.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadgroup --numprocesses
DEVICE ?= cpu
PORT ?= 5000

.PHONY: demo test quick lint docs mlflow bench lock clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

# One process more than CPUs, because tests on SLURM mostly wait; 8 at most.
test: $(VENV)/.installed-test
	$(PYTEST) $(or $(WORKERS),$$(( $$(nproc) < 8 ? $$(nproc) + 1 : 8 ))) $(TESTS)

# The tests that take at most seconds, with fewer examples and cases: what to run while working.
quick: $(VENV)/.installed-test
	$(PYTEST) $(or $(WORKERS),$$(nproc)) --hypothesis-profile quick -m "not slow and not distributed and not slurm" \
		$(TESTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(MAKE) --no-print-directory docs

# The site, in build/site, without downloads. A broken link or reference is an error. (Do not add --quiet: it hides
# warnings from --strict.)
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Ends with Ctrl-C. Runs may go on sending to the database meanwhile.
# Without the queues of MLflow's GenAI jobs, which are eight more processes and start before it answers.
mlflow: $(VENV)/.installed
	@test -f runs/mlflow.db || { echo "runs/mlflow.db does not exist: make demo, or train with run.root=runs"; exit 2; }
	@echo "The runs: http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning"
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --host 127.0.0.1 --port $(PORT) --workers 1 --backend-store-uri sqlite:///runs/mlflow.db \
		--artifacts-destination runs/mlartifacts

# The figures of docs/performance.md, with the machine named. This takes about an hour on a small CPU. Run nothing else
# in that time.
bench: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[bench]"
	$(BIN)/megabase bench attention --device $(DEVICE) --json benchmarks/results/attention-$(DEVICE).json \
		--picture docs/pictures/attention-$(DEVICE).png
	$(BIN)/megabase bench model --device $(DEVICE) --json benchmarks/results/model-$(DEVICE).json \
		--picture docs/pictures/model-$(DEVICE).png
	$(BIN)/megabase bench data --json benchmarks/results/data-cpu.json --picture docs/pictures/data-cpu.png

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "megabase needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[test,lint,docs]"
	touch $@

# Pin the installed versions. Run the tests with them first.
lock: $(VENV)/.installed-test
	$(BIN)/python -m pip freeze --exclude-editable | sed "s/+cpu//" > requirements.lock

clean:
	rm -rf $(VENV) runs data/demo
