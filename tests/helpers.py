"""Comparisons and random inputs for the whole suite, and what some tests need."""

import math
import sys
from importlib.util import find_spec

import pytest
import torch

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs /proc, or names of files that only Linux allows"
)


def relative_error(got, want):
    """The root mean square of `got - want` relative to that of `want`, in float64."""
    got, want = got.detach().double(), want.detach().double()
    error, size = (values.square().mean().sqrt().item() for values in (got - want, want))
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def assert_close(got, want, tolerance, dtype=None):
    """The shape of `want`, the dtype asked for, no NaN or infinity, and a relative error of at most `tolerance`."""
    assert got.shape == want.shape
    assert dtype is None or got.dtype == dtype
    assert got.isfinite().all()
    error = relative_error(got, want)
    assert error <= tolerance, f"relative RMS error {error:.3g}, at most {tolerance:.3g} allowed"


def clear_threshold(values):
    """One that no rounding crosses: in the widest gap among the middle third of the values."""
    ordered = values.double().flatten().sort().values
    middle = ordered[len(ordered) // 3 : 2 * len(ordered) // 3 + 1]
    if len(middle) < 2:
        return ordered[0].item() - 0.1
    widest = middle.diff().argmax()
    return middle[widest : widest + 2].mean().item()


def float64(nested):
    return torch.tensor(nested, dtype=torch.float64)


def randn(*shape, seed, dtype=torch.float64):
    """Normal samples, always drawn in float64 and then rounded to `dtype`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rand(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
