"""The kernels for key similarity, against the float64 reference."""

import torch
from kernel_cases import check, inside_nan, randn, sizes

import rfclip_kernels
from rfclip import reference


@sizes
def test_key_similarity(size, dtype):
    first, second = (randn(*size, seed=seed, dtype=dtype) for seed in (6, 7))
    want = reference.key_similarity(first.double())
    got = rfclip_kernels.key_similarity(inside_nan(first))
    check(got, want, torch.float32)
    want = reference.key_similarity(second.double(), want, 1)
    both = rfclip_kernels.key_similarity(second, got, 1)
    check(both, want, torch.float32)
    view = inside_nan(got)
    assert rfclip_kernels.key_similarity(second, view, 1, inplace=True) is view
    assert torch.equal(view, both)
    assert view._base.isnan().sum() == view._base.numel() - view.numel()
