"""Tolerances, sizes and inputs that the tests of the Triton kernels share."""

import os
import time
from itertools import product

import pytest
import torch
from helpers import assert_close

from rfclip.ops.selftest import TOLERANCE
from rfclip_kernels.launch import interpreted

DEVICE = "cpu" if interpreted() else "cuda"  # where the kernels run

GUARD = 64  # bytes on either side of a buffer that a kernel writes
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def one_dtype_each(**axes):
    """Every combination of the axes' values, each with one of the dtypes in turn.

    A value meets all three of them where the other axes have three values or more between them.
    """
    cases = []
    for places in product(*map(range, map(len, axes.values()))):
        values = [values[place] for values, place in zip(axes.values(), places, strict=True)]
        cases.append((list(TOLERANCE)[sum(places) % len(TOLERANCE)], *values))
    return pytest.mark.parametrize(("dtype", *axes), cases, ids=lambda value: str(value).removeprefix("torch."))


# B, H, T, D: T below, at and beyond tiles of 64, and head dimensions that are not powers of two.
SIZES = [
    (1, 1, 2, 32),
    (2, 3, 17, 64),
    (1, 2, 65, 80),
    (1, 1, 130, 96),
    (1, 2, 64, 128),
    (2, 1, 198, 64),
]

CASES = [(size, dtype) for size in SIZES for dtype in TOLERANCE] + [((1, 1, 330, 64), torch.float32)]

NAMES = ["B{}-H{}-T{}-D{}-{}".format(*size, str(dtype).removeprefix("torch.")) for size, dtype in CASES]

sizes = pytest.mark.parametrize(("size", "dtype"), CASES, ids=NAMES)


def inside_nan(tensor):
    """The same values in a strided view that is surrounded by NaN along every axis."""
    padded = torch.full([side + 2 for side in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = padded[tuple(slice(1, -1) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


def randn(*shape, seed, dtype=torch.float32, spread=1.5):
    """Normal samples, always drawn in float32 and then rounded to `dtype`."""
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def masks(B, N, pattern):
    u = torch.rand(B, N, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    every, none = torch.ones_like(u) > 0, torch.zeros_like(u) > 0
    one = torch.arange(N, device=DEVICE).expand(B, N) == N // 2
    return {
        "some": (u < 0.3, u > 0.6),
        "no distraction": (none, u > 0.6),
        "no target": (u < 0.3, none),
        "all distraction": (every, none),
        "all target": (none, every),
        "one and the rest": (one, ~one),
        "the rest and one": (~one, one),
        "overlapping": (u < 0.5, u > 0.2),
    }[pattern]


def check(got, want, dtype):
    assert_close(got, want, TOLERANCE[dtype], dtype)


def pretended_compilation(one):
    """Of tiles, in a process of its own: by their rows it succeeds, fails, ends the process or never ends."""
    if one.rows == 64:
        os._exit(1)
    if one.rows == 128:
        time.sleep(3600)
    return "spills" if one.rows == 32 else None
