# Two commands for a newcomer: `make demo` and `make test`. Both create the environment first, around the PyTorch of
# $(PYTHON) if it has one.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# The oldest versions that pyproject.toml allows, with any Python 3.10.
OLDEST_PYTHON ?= 3.10
OLDEST := build/oldest

.PHONY: demo test test-oldest lint report docs dist hf-kernels bench gpu gpu-bundle clean

demo: $(READY)
	$(BIN)/rfclip segment rfclip/tiny/scene.png --classes "tiger, mushroom, pizza, cake, cat, bus, grass, sky" --out demo --overwrite
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
		tests/methods/test_peers.py tests/methods/test_rf_clip.py tests/ops/test_every_operation.py tests/ops/test_compile.py \
		tests/ops/test_dispatch.py tests/segment tests/towers tests/test_plugin.py tests/test_calibration.py
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --dist worksteal \
		tests/kernels/test_every_kernel.py -k "not tiles_of_the_table"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiles the kernels for eight GPU architectures, counts what they compute and move, and fails on spills; needs no GPU.
# TARGETS=sm_90,gfx942 is for these alone.
report: $(READY)
	mkdir -p build
	$(BIN)/python -m tools.kernel_report $(if $(TARGETS),--targets $(TARGETS)) > build/kernels.md

# The documentation site, in build/site.
docs: $(READY)
	$(BIN)/python -m tools.docs

# The page of the command line, from the commands' types and help.
docs/command-line.md: $(wildcard rfclip/app/cli/*.py)
	$(BIN)/python -m typer rfclip.app.cli utils docs --name rfclip --title "Command line" --output $@

# The source distribution and the wheel, in dist/, as PyPI will take them.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

# The Triton kernels as Hugging Face's `kernels` loads them, in build/hf-kernels.
hf-kernels: $(READY)
	$(BIN)/python -m tools.hf_kernels

# Operations, towers, memory and segmentation: build/bench/bench.md, about half an hour on two cores.
bench: $(READY)
	$(BIN)/python -m bench

# Everything a GPU can tell, in under ten minutes and without a network: build/gpu/report.md. DEVICE=cpu is a dry run.
# It needs no environment: any Python with PyTorch, and the wheels of `make gpu-bundle` in place of what that lacks.
DEVICE ?= cuda
gpu:
	$(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) -m bench.gpu --device $(DEVICE)

BUNDLE := open_clip_torch timm ftfy wcwidth colorcet platformdirs filelock tifffile typer shellingham rich \
	torchmetrics lightning_utilities pytest_xdist execnet pytest_benchmark py_cpuinfo hypothesis sortedcontainers
gpu-bundle:
	rm -rf gpu-bundle
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --dest gpu-bundle \
		--python-version 3.10 --implementation py --abi none --platform any $(BUNDLE)
	du -sh gpu-bundle

$(READY): pyproject.toml Makefile tools/environment.py tools/requirements-torch.txt
	$(PYTHON) tools/environment.py .venv
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	touch $@

$(OLDEST)/ready: pyproject.toml $(READY)
	$(BIN)/uv venv --quiet --clear --python $(OLDEST_PYTHON) $(OLDEST)
	$(BIN)/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct --editable ".[evaluate,explain,parquet,results,transformers,test]"
	touch $@

clean:
	rm -rf .venv .cache demo build dist gpu-bundle *.egg-info
