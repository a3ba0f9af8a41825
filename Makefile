# Two commands: `make demo` and `make test`. Each sets up what it needs in $(VENV) first.
PYTHON ?= python3.11
VENV ?= .venv
ARGS ?=
# on the machine with the GPU: its own Python, what deploy/gpu/unpack.py unpacked, and the time to take
PYTHON_GPU ?= python3
GPU_HOME ?= $(HOME)/.cache/vivace/gpu
MINUTES ?= 9
BIN = $(VENV)/bin

.PHONY: demo test unit setup bench quality gpu-pack gpu lint clean

demo: setup
	$(BIN)/vivace demo $(ARGS)

test: setup lint
	@deploy/test.sh $(BIN)/python $(ARGS)

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

# pieces for a machine with a GPU and no network; ARGS="--with onnxruntime-gpu,tensorrt-rtx"; data below $VIVACE_DATA
gpu-pack: setup
	$(BIN)/python -m benchmarks.gpu.pack $(ARGS)

# there, after `python3 deploy/gpu/unpack.py FOLDER`: every figure of a GPU; ARGS=--cpu rehearses it without one
gpu:
	[ ! -e $(GPU_HOME)/env.sh ] || . $(GPU_HOME)/env.sh; \
	$(PYTHON_GPU) -m benchmarks.gpu.run --minutes $(MINUTES) --out artifacts/gpu --artifacts "$${VIVACE_ARTIFACTS:-artifacts}" $(ARGS)

clean:
	rm -rf $(VENV) artifacts .tools .pytest_cache .ruff_cache .mypy_cache .hypothesis
