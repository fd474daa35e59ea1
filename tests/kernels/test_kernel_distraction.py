"""The kernels that find and repair distraction tokens, against the float64 reference."""

import math

import pytest
import torch
from kernel_cases import DEVICE, check, dtypes, inside_nan, masks, one_dtype_each, randn

import rfclip_kernels
from rfclip import reference


@dtypes
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "raw"])
@pytest.mark.parametrize(("B", "N", "d"), [(1, 1, 3), (2, 17, 128), (3, 40, 200)])
def test_distraction(dtype, shifted, B, N, d):
    x = randn(B, N, d, seed=1) + 2
    x[:, ::3, 1] += 60
    x = x.to(dtype)
    want = reference.distraction_scores(x.double(), [1, 2], shifted=shifted)
    got = rfclip_kernels.distraction_scores(inside_nan(x), [1, 2], shifted=shifted)
    check(got, want, torch.float32)
    clear = (want - 5 / d).abs() > 1e-5
    assert clear.all()
    assert torch.equal(rfclip_kernels.distraction_mask(inside_nan(x), [1, 2], 5 / d, shifted=shifted), want > 5 / d)
    assert torch.equal(rfclip_kernels.distraction_mask(x, [1, 2], 0.01, shifted=shifted), want > 0.01)


def test_scores_of_a_large_mean_and_of_equal_values():
    x = randn(1, 20, 256, seed=2) + 1000
    check(rfclip_kernels.distraction_scores(x, [3]), reference.distraction_scores(x.double(), [3]), torch.float32)
    assert rfclip_kernels.distraction_scores(torch.full((1, 2, 5), 7.0, device=DEVICE), [0]).tolist() == [[0.0, 0.0]]
    assert rfclip_kernels.distraction_scores(x, []).count_nonzero() == 0
    assert not rfclip_kernels.distraction_mask(x, [], -1.0).any()


def test_a_score_equal_to_the_threshold_is_not_above_it():
    """1 / n for each n: the quotient is that of float32, rounded to nearest, as PyTorch's is."""
    x = (torch.arange(64) < torch.arange(2, 65)[:, None]).float()[None].to(DEVICE)  # n ones and 64 - n zeros
    want = 1 / torch.arange(2, 65, device=DEVICE)
    assert torch.equal(rfclip_kernels.distraction_scores(x, [0])[0], torch.cat([want[:-1], want.new_zeros(1)]))
    assert torch.equal(rfclip_kernels.distraction_scores(x, [0], shifted=False)[0], want)
    for n in (3, 7, 41, 49):
        mask = rfclip_kernels.distraction_mask(x, [0], want[n - 2].item(), shifted=False)[0]
        assert mask.tolist() == [each < n for each in range(2, 65)]


@pytest.mark.parametrize("size", [3, 5, 7])
def test_the_mean_of_equal_neighbours_is_their_value(size):
    """On a grid where a window is cut off on every side, so that there are all counts of neighbours."""
    x = (torch.arange(20) / 4 - 1.75).expand(1, 63, -1).to(DEVICE)
    mask = torch.ones(1, 63, dtype=torch.bool, device=DEVICE)
    assert torch.equal(rfclip_kernels.redistribute_embeddings(x, mask, [0, 7], (7, 9), size=size), x)


@pytest.mark.parametrize("d", [48, 768])
def test_the_norm_of_equal_values_is_the_bias(d):
    x = (torch.arange(1, 10) * 111.25).to(DEVICE)[None, :, None].expand(1, 9, d)
    weight, bias = randn(d, seed=1), randn(d, seed=2)
    _, out = rfclip_kernels.add_layer_norm(x, torch.zeros_like(x), weight, bias)
    assert torch.equal(out, bias.expand_as(x))


@one_dtype_each(
    grid=[(1, 1), (1, 9), (5, 7)],
    size=[3, 5, 7],
    pattern=["some", "no distraction", "all distraction", "one and the rest"],
)
def test_redistribution(dtype, grid, size, pattern):
    N = math.prod(grid)
    x, mask = randn(2, N, 20, seed=3, dtype=dtype), masks(2, N, pattern)[0]
    want = reference.redistribute_embeddings(x.double(), mask, [0, 7], grid, size=size)
    got = rfclip_kernels.redistribute_embeddings(inside_nan(x), mask, [0, 7], grid, size=size)
    check(got, want, dtype)
    view = inside_nan(x)
    assert rfclip_kernels.redistribute_embeddings(view, mask, [0, 7], grid, size=size, inplace=True) is view
    assert torch.equal(view, got)
    assert view._base.isnan().sum() == view._base.numel() - view.numel()
    untouched = torch.ones_like(x, dtype=torch.bool)
    untouched[..., [0, 7]] = ~mask[..., None]
    assert torch.equal(got[untouched], x[untouched])


@dtypes
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_stream_is_summed_as_pytorch_sums_it(dtype, other):
    """To the bit: what is rounded otherwise in every block adds up."""
    x, branch = randn(2, 9, 70, seed=1, dtype=dtype), randn(2, 9, 70, seed=2, dtype=other)
    ones = torch.ones(70, device=DEVICE)
    total, _ = rfclip_kernels.add_layer_norm(x, branch, ones, ones)
    assert total.dtype == (x + branch).dtype and torch.equal(total, x + branch)
    repaired, _, mask = rfclip_kernels.repaired_layer_norm(x, branch, ones, ones, [3], 1.0, (2, 4))
    assert torch.equal(repaired, x + branch) and not mask.any()
