"""The kernels for key similarity, against the float64 reference."""

import math

import torch
from helpers import assert_close
from kernel_cases import TOLERANCE, inside_nan, randn, sizes

import rfclip_kernels
from rfclip import reference


def tolerance(keys):
    """What is allowed of exp(x - y), x a key's logit with itself and y its log-sum-exp, about as large: their errors.

    In float32 the sum of the D products is cut off after every 8 of them, on tensor cores, which loses half of eps on
    average, of half the sum on average: D / 32 eps. The two are summed in another order, so that this does not cancel.
    Their scales and the change of base take 4 eps: a reciprocal that is off by 2, and four roundings.
    """
    if keys.dtype != torch.float32:  # whose products are exact and summed in the same order
        return TOLERANCE[torch.float32]
    D, eps = keys.shape[-1], torch.finfo(torch.float32).eps
    logits = keys.double().square().sum(dim=-1) / math.sqrt(D)
    return max(TOLERANCE[torch.float32], (4 + D / 32) * eps * logits.square().mean().sqrt().item())


@sizes
def test_key_similarity(size, dtype):
    first, second = (randn(*size, seed=seed, dtype=dtype) for seed in (6, 7))
    allowed = max(tolerance(first), tolerance(second))
    assert allowed < 3e-5
    want = reference.key_similarity(first.double())
    got = rfclip_kernels.key_similarity(inside_nan(first))
    assert_close(got, want, allowed, torch.float32)
    want = reference.key_similarity(second.double(), want, 1)
    both = rfclip_kernels.key_similarity(second, got, 1)
    assert_close(both, want, allowed, torch.float32)
    view = inside_nan(got)
    assert rfclip_kernels.key_similarity(second, view, 1, inplace=True) is view
    assert torch.equal(view, both)
    assert view._base.isnan().sum() == view._base.numel() - view.numel()
