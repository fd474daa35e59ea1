# Two commands for a newcomer: `make demo` and `make test`. Both create the environment first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint report docs bench clean

demo: $(READY)
	$(BIN)/rfclip segment rfclip/tiny/scene.png --classes "dog, cactus, octopus, sailboat, cat, bus, grass, sky" --out demo --overwrite
	@echo "The picture with its labels: demo/scene.overlay.png"

# The second run uses Triton's interpreter, which reads the variable when it is imported.
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --ignore tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal tests/kernels

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

# torch and torchvision first, as a pinned pair: another torch may lack Triton or not match torchvision.
$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv demo build *.egg-info
