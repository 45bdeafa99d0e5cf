# `make quickstart` and `make test` set everything up by themselves, in .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help quickstart test test-all mutants lint benchmarks clean

help:
	@echo "make quickstart   train a small OD-DINO on generated images, about 8 minutes on 2 cores"
	@echo "make test         run the tests, on all cores, without those marked slow"
	@echo "make test-all     run all tests"
	@echo "make mutants      break the code in one place at a time and list the breaks that no test notices; MUTANTS='--files matching' for a part"
	@echo "make lint         ruff and mypy"
	@echo "make benchmarks   run everything in benchmarks/"
	@echo "make clean        remove caches and build folders (never runs/)"
	@echo "Each of them makes the environment $(VENV) first, if it is not there. PYTHON=... chooses the interpreter, 3.11 or newer."

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || uv venv --python $(PYTHON) $(VENV) \
		|| { echo "cannot make $(VENV): install the venv module of your Python (Debian, Ubuntu: python3-venv)"; exit 1; }
	@echo "Installing into $(VENV); the first time this takes some minutes."
	@if uv --version >/dev/null 2>&1; then \
		uv pip install --quiet --python $(BIN)/python -e '.[test,lint]' -c constraints.txt; \
	else \
		$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null; \
		if $(BIN)/python -m pip install --quiet uv; then \
			$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -e '.[test,lint]' -c constraints.txt; \
		else \
			$(BIN)/python -m pip install --quiet -e '.[test,lint]' -c constraints.txt; \
		fi; \
	fi
	@touch $@

# An earlier quickstart is moved aside, never overwritten. On two cores a loading process would only take turns with the training.
quickstart: $(READY)
	@if [ -e runs/quickstart ]; then \
		n=1; while [ -e runs/quickstart-$$n ]; do n=$$((n + 1)); done; \
		mv runs/quickstart runs/quickstart-$$n; echo "The earlier run is now runs/quickstart-$$n."; \
	fi
	@$(BIN)/steadydetr train quickstart --data shapes:images=2700 --data.val-source shapes --data.workers 0 --output runs/quickstart
	@$(BIN)/steadydetr report runs/quickstart
	@echo
	@echo "Done. Look at:"
	@echo "  runs/quickstart/report.html       everything on one page, for a browser"
	@echo "  runs/quickstart/predictions.png   what it found, beside what there is"
	@echo "  runs/quickstart/curves.png        how it learned"
	@echo "  runs/quickstart/summary.json      AP, AP50, seconds, images seen"

# A process for each core, of one thread: more threads than cores would only wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test: $(READY)
	@$(PYTEST) -m "not slow"

test-all: $(READY)
	@$(PYTEST)

MUTANTS ?= --jobs 2

mutants: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(MUTANTS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

benchmarks: $(READY)
	@for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
