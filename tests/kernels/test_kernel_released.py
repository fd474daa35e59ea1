"""The kernels for what only the released code computes, against the float64 reference."""

import math

import pytest
import torch
from helpers import clear_threshold
from kernel_cases import DEVICE, check, dtypes, inside_nan, masks, randn

import rfclip_kernels
from rfclip import reference
from rfclip.methods.cosines import cosines


@dtypes
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (5, 7)], ids=str)
@pytest.mark.parametrize("pattern", ["some", "no distraction", "all distraction", "one and the rest"])
def test_blending(dtype, grid, pattern):
    N = math.prod(grid)
    x, mask = randn(2, N, 300, seed=3, dtype=dtype), masks(2, N, pattern)[0]
    want = reference.blend_embeddings(x.double(), mask, grid)
    got = rfclip_kernels.blend_embeddings(inside_nan(x), mask, grid)
    check(got, want, dtype)
    view = inside_nan(x)
    assert rfclip_kernels.blend_embeddings(view, mask, grid, inplace=True) is view
    assert torch.equal(view, got)
    assert view._base.isnan().sum() == view._base.numel() - view.numel()
    assert torch.equal(got[~mask], x[~mask])


@dtypes
@pytest.mark.parametrize(
    ("B", "N", "d", "e"), [(1, 1, 3, 5), (2, 9, 20, 33), (2, 65, 70, 300), (1, 130, 192, 384)], ids=str
)
def test_cosine_aggregation(dtype, B, N, d, e):
    guide, x = randn(B, N, d, seed=4), randn(B, N, e, seed=5, dtype=dtype)
    guide[:, ::3] += 1.5
    guide = guide.to(dtype)
    cut = clear_threshold(cosines(guide.double()))
    want = reference.cosine_aggregation(guide.double(), x.double(), cut)
    check(rfclip_kernels.cosine_aggregation(inside_nan(guide), inside_nan(x), cut), want, dtype)
    cuts = torch.tensor([cut, 1.5], device=DEVICE)[:B]  # of the second image, no other patch counts
    want = reference.cosine_aggregation(guide.double(), x.double(), cuts, gain=3.0)
    check(rfclip_kernels.cosine_aggregation(inside_nan(guide), inside_nan(x), inside_nan(cuts), gain=3), want, dtype)
    assert N == 1 or not torch.allclose(want[:1], reference.cosine_aggregation(guide[:1].double(), x[:1].double(), cut))


@dtypes
def test_a_cosine_equal_to_the_cut_counts(dtype):
    guide = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, -1], [1, -1, 1, -1], [0, 0, 0, 0]]], dtype=dtype, device=DEVICE)
    x = torch.tensor([[[1], [10], [100], [1000]]], dtype=dtype, device=DEVICE)
    assert rfclip_kernels.cosine_aggregation(guide, x, 0.5).flatten().tolist() == [6.0, 60.5, 105.0, 0.0]
    assert rfclip_kernels.cosine_aggregation(guide, x, 0.51).flatten().tolist() == [1.0, 10.0, 100.0, 0.0]


def test_the_cosine_of_a_vector_with_itself_is_one():
    """Of those whose norms are integers, the quotient is exact."""
    guide = torch.tensor([[3, 4, 0], [1, 2, 2], [2, 3, 6], [1, 4, 8], [4, 4, 7], [2, 6, 9], [6, 6, 7], [3, 4, 12]])
    guide = torch.cat([n * guide for n in range(1, 9)])[None].float().to(DEVICE)
    x = torch.eye(64, device=DEVICE)[None]
    got = rfclip_kernels.cosine_aggregation(guide, x, 1.0)
    alike = (torch.arange(64)[:, None] - torch.arange(64)) % 8 == 0
    assert torch.equal(got[0], alike.to(DEVICE, torch.float32))
