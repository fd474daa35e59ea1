"""Dtypes, sizes and inputs that the tests of the operations share.

Inputs are rounded to their dtype first, and the brute force starts from the rounded values, so that only the
arithmetic of an implementation is measured.
"""

from itertools import product

import pytest
import torch
from helpers import assert_close, rand, randn
from oracles.operations import brute_weights

from rfclip.ops.dispatch import backend

IMPLEMENTATIONS = {name: backend(name) for name in ("reference", "eager")}

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
HALF = (torch.float16, torch.bfloat16)
# The largest relative RMS error allowed, by the dtype of the result: a few units of its rounding.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6, torch.float64: 1e-14}

SIZES = [  # B, H, grid, D
    (1, 1, (1, 1), 4),
    (2, 1, (1, 7), 8),
    (1, 2, (6, 3), 5),
    (2, 3, (5, 7), 64),
]
CASES = [
    pytest.param(B, H, grid, D, dtype, id=f"B{B}-H{H}-N{grid[0] * grid[1]}-D{D}-{name}")
    for (B, H, grid, D), (name, dtype) in product(SIZES, DTYPES.items())
]


def dtypes(*names):
    return pytest.mark.parametrize("dtype", [pytest.param(DTYPES[name], id=name) for name in names or DTYPES])


def score_dtype(dtype):
    return torch.float32 if dtype in HALF else dtype


def assert_matches(got, want, dtype, tolerance=None):
    assert_close(got, want, tolerance or TOLERANCE[dtype], dtype)


def assert_same_bits(got, want):
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    assert got.dtype == want.dtype
    assert torch.equal(got.contiguous().view(as_int), want.contiguous().view(as_int))


def differs(a, b):
    return not torch.allclose(a.double(), b.double(), rtol=1e-2, atol=1e-3)


def tokens(B, N, d, dtype=torch.float64, seed=1):
    """Patch tokens with positive sums, for the raw form to be well conditioned; dimension 1 of some is an outlier."""
    x = randn(B, N, d, seed=seed) + 2
    x[..., 1] += 40 * (rand(B, N, seed=seed + 1) < 0.4)
    x[:, N // 2, 1] += 40
    return x.to(dtype)


def qkv(B, H, T, D, dtype=torch.float64, seed=2):
    return [1.5 * randn(B, H, T, D, seed=seed + i, dtype=dtype) for i in range(3)]


def some_masks(B, N, seed=3):
    u = rand(B, N, seed=seed)
    return u < 0.4, u > 0.6


MASKS = {
    "none": lambda B, N: torch.zeros(B, N, dtype=torch.bool),
    "one": lambda B, N: (torch.arange(N) == N // 2).repeat(B, 1),
    "some": lambda B, N: some_masks(B, N)[0],
    "all": lambda B, N: torch.ones(B, N, dtype=torch.bool),
}


def clustered_keys(B, H, N, D, dtype=torch.float64, seed=4):
    """Keys of CLS and of N patches in two groups, the first two fifths and the rest: the cut is clear."""
    k = 0.3 * randn(B, H, N + 1, D, seed=seed)
    split = 1 + 2 * N // 5
    k[:, :, 1:split, 0] += 2
    k[:, :, split:, 1] += 2
    return k.to(dtype)


def clustered_similarity(B, N, dtype=torch.float64, seed=4):
    return brute_weights(*[clustered_keys(B, 2, N, 6, seed=seed)] * 2, scale=1.0).mean(dim=1)[:, 1:, 1:].to(dtype)
