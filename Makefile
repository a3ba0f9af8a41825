# Two commands: `make demo` and `make test`. Each sets up what it needs in $(VENV) first.
PYTHON ?= python3.11
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin

.PHONY: demo test unit setup bench quality lint clean

demo: setup
	$(BIN)/vivace demo $(ARGS)

test: setup lint
	$(BIN)/python -m pytest $(ARGS)

# lint and what needs neither server nor trained shop: about a minute
unit: setup lint
	$(BIN)/python -m pytest tests/unit $(ARGS)

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml deploy/setup.sh deploy/preflight.py
	@deploy/setup.sh $(PYTHON) $(VENV)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the served ensemble against the same graphs in process; ARGS="--name ml-1m-benchmark" for another data set
bench: setup
	$(BIN)/python -m benchmarks.bench $(ARGS)

# the ML-1M figures of the README: make quality ARGS="--path /folder/of/ml-1m"
quality: setup
	$(BIN)/python -m benchmarks.quality $(ARGS)

clean:
	rm -rf $(VENV) artifacts .tools .pytest_cache .ruff_cache .mypy_cache .hypothesis
