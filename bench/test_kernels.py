"""Each operation on each backend, and PyTorch's own attention where that can express it.

`pytest bench/test_kernels.py` runs it; a case is timed once its result is known to be right.
"""

import pytest
import torch

from bench.measure import DEVICE, DTYPE, relative_error
from bench.operations import CASES, capturable, prepare
from rfclip_kernels.registry import Sizes

GRIDS = {"224x224": (14, 14), "336x448": (21, 28)}  # of ViT-B/16
NAMES, PATCH = 60, 8  # fewer class names and a smaller picture than the report counts, to take seconds


@pytest.fixture(params=GRIDS)
def size(request):
    return request.param


@pytest.mark.parametrize(("name", "how"), CASES, ids=[f"{name}-{how}".replace(" ", "_") for name, how in CASES])
def test_kernel(timed, size, name, how):
    if how == "triton" and DEVICE == "cpu":
        pytest.skip("no GPU: the interpreter's time says nothing about a kernel's")
    sizes = Sizes(grid=GRIDS[size], dtype=DTYPE, device=DEVICE, names=NAMES, patch=PATCH)
    function = prepare(name, how, sizes)
    if how not in ("attention", "reference"):
        error = relative_error(function(), prepare(name, "reference", sizes)())
        assert error < {torch.float32: 1e-4, torch.float16: 1e-2}[DTYPE]
    timed(function, f"{name}, ViT-B/16 at {size}", graph=capturable(name, how))
