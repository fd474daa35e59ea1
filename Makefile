# Two commands for a newcomer: `make demo` and `make test`. Both create the environment first, around the PyTorch of
# $(PYTHON) if it has one.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# The oldest versions that pyproject.toml allows, with any Python 3.10.
OLDEST_PYTHON ?= 3.10
OLDEST := build/oldest

.PHONY: demo test test-oldest lint report docs bench clean

demo: $(READY)
	$(BIN)/rfclip segment rfclip/tiny/scene.png --classes "dog, cactus, octopus, sailboat, cat, bus, grass, sky" --out demo --overwrite
	@echo "The picture with its labels: demo/scene.overlay.png"

# The second run uses Triton's interpreter, which reads the variable when it is imported.
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --ignore tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal tests/kernels

# What depends on PyTorch, open_clip, transformers and Triton, on the oldest of each.
test-oldest: export OMP_NUM_THREADS = 1
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest --numprocesses auto --dist worksteal -W ignore::DeprecationWarning \
		tests/methods tests/ops tests/segment tests/towers tests/test_plugin.py tests/test_calibration.py
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --dist worksteal \
		tests/kernels/test_every_kernel.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiles the kernels for six GPU architectures, counts what they compute and move, and fails on spills; needs no GPU.
report: $(READY)
	mkdir -p build
	$(BIN)/python -m tools.kernel_report > build/kernels.md

# The documentation site, in build/site; the variable hides the theme's notice about its own future.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Operations, towers, memory and segmentation: build/bench/bench.md, about half an hour on two cores.
bench: $(READY)
	$(BIN)/python -m bench

$(READY): pyproject.toml Makefile tools/environment.py tools/requirements-torch.txt
	$(PYTHON) tools/environment.py .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(OLDEST)/ready: pyproject.toml $(READY)
	$(BIN)/uv venv --quiet --clear --python $(OLDEST_PYTHON) $(OLDEST)
	$(BIN)/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct --editable ".[parquet,transformers,test]"
	touch $@

clean:
	rm -rf .venv demo build *.egg-info
