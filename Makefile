# Everything a fresh clone needs: Python >= 3.11 with venv, pip, make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_WORKERS ?= 2

.PHONY: install quickstart test test-slow drill slurm-up slurm-down slurm-drill forgetting bench check clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('ftdist: Python 3.11 or newer is needed (transformers 5.23 and TRL 1.16 need it); set PYTHON=…')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: $(VENV)/.installed ## the main job on the embedded demo, 2 processes under ZeRO-2
	$(BIN)/ftdist train experiment=quickstart

test: $(VENV)/.installed-test ## the suite
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup -m 'not slow and not gpu'

test-slow: $(VENV)/.installed-test ## what does not fit the suite's time
	$(BIN)/python -m pytest -m 'slow and not gpu'

drill: $(VENV)/.installed-test ## kill and damage runs some 400 times, over strategies and engines; about an hour
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m slow tests/durable/test_long_drill.py

bench: $(VENV)/.installed-test ## training throughput beside a bare loop and TRL; half an hour on a quiet machine
	$(BIN)/python tests/bench/throughput.py

slurm-up: ## a real SLURM of two nodes on this machine; prints `export SLURM_CONF=…`
	@slurm/cluster.sh up

slurm-down:
	@slurm/cluster.sh down

slurm-drill: $(VENV)/.installed-test ## jobs that are pre-empted, cancelled, cut off; minutes each
	$(BIN)/python -m pytest -m slow tests/slurm

forgetting: $(VENV)/.installed-test ## what keeps a skill while another is learnt: the table of docs/forgetting.md
	$(BIN)/python tests/bench/forgetting.py

check: $(VENV)/.installed-test ## lint, types, shell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check ftdist tests
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run $(wildcard slurm/*.sh slurm/*.sbatch launch/*.sh)

clean:
	rm -rf $(VENV) build dist *.egg-info
