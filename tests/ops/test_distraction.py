"""Finding distraction tokens, and the ways to repair their embeddings, against brute force."""

import math
from itertools import product

import pytest
import torch
from cases import CASES, MASKS, assert_matches, assert_same_bits, differs, dtypes, score_dtype, tokens
from helpers import float64
from oracles.operations import brute_blended, brute_clamped, brute_filtered, brute_redistributed, brute_scores

from rfclip import RefocusConfig

# Distraction scores and masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "raw"])
@pytest.mark.parametrize("B, H, grid, D, dtype", CASES)
def test_distraction_scores(impl, B, H, grid, D, dtype, shifted):
    x = tokens(B, math.prod(grid), H * D, dtype)
    dims = [3, 1]
    want = brute_scores(x, dims, shifted)
    assert differs(want, brute_scores(x, dims, not shifted))
    assert differs(want, brute_scores(x, [3], shifted))
    assert_matches(impl.distraction_scores(x, dims, shifted=shifted), want, score_dtype(dtype))


@dtypes()
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "raw"])
def test_dimension_weights(impl, dtype, shifted):
    x = tokens(2, 6, 9, dtype)
    w = impl.dimension_weights(x, shifted=shifted)
    want = torch.stack([brute_scores(x, [j], shifted) for j in range(9)], dim=-1)
    assert_matches(w, want, score_dtype(dtype))
    torch.testing.assert_close(w.sum(dim=-1), torch.ones_like(w[..., 0]))


@dtypes()
def test_scores_of_a_token_whose_sum_is_zero(impl, dtype):
    x = tokens(1, 4, 4, dtype)
    x[0, 1], x[0, 2] = 7, 0
    x[0, 3] = torch.tensor([1, -1, 2, -2], dtype=dtype)
    shifted = impl.distraction_scores(x, [0, 1])
    raw = impl.distraction_scores(x, [0, 1], shifted=False)
    assert shifted.isfinite().all() and raw.isfinite().all()
    assert (shifted[0] == 0).tolist() == [False, True, True, False]
    assert (raw[0] == 0).tolist() == [False, False, True, True]


@dtypes()
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "raw"])
@pytest.mark.parametrize("threshold", [5 / 48, 0.2], ids=["five", "0.2"])
def test_distraction_mask(impl, dtype, shifted, threshold):
    x = tokens(2, 35, 48, dtype)
    want = brute_scores(x, [1, 5], shifted) > threshold
    assert 0 < want.sum() < want.numel()
    got = impl.distraction_mask(x, [1, 5], threshold, shifted=shifted)
    assert got.dtype == torch.bool and torch.equal(got, want)


def test_distraction_mask_depends_on_shift_and_threshold(impl):
    x = float64([[[6, -2, 1, 1]]])  # phi of dimension 0 is 8/14 when shifted and 6/6 raw
    verdicts = [
        impl.distraction_mask(x, [0], threshold, shifted=shifted).item()
        for threshold, shifted in product((0.5, 0.8, 1.25), (True, False))
    ]
    assert verdicts == [True, True, False, True, False, False]


@dtypes()
def test_distraction_mask_is_strict(impl, dtype):
    x = torch.tensor([[[3, 1, 0, 0]]], dtype=dtype)  # phi = 3/4 exactly
    assert not impl.distraction_mask(x, [0], 0.75).any()
    assert impl.distraction_mask(x, [0], 0.7499).all()


@dtypes()
def test_the_papers_threshold_is_five_times_the_uniform_share(impl, dtype):
    x = torch.zeros(1, 2, 16, dtype=dtype)
    x[0, :, :2] = torch.tensor([[5, 11], [6, 10]])  # phi = 5/16 and 6/16
    tau, tau_attn = RefocusConfig(distraction_dims=(0,)).thresholds(16, 2)
    assert (tau, tau_attn) == (5 / 16, None)
    assert impl.distraction_mask(x, [0], tau).tolist() == [[False, True]]


@dtypes("fp16", "bf16")
def test_distraction_mask_compares_in_float32(impl, dtype):
    x = torch.tensor([[[1, 1, 1, 0]]], dtype=dtype)
    threshold = 0.33333
    assert torch.tensor(1 / 3) > threshold
    assert torch.tensor(1 / 3, dtype=dtype) == torch.tensor(threshold, dtype=dtype)  # half precision would say no
    assert impl.distraction_mask(x, [0], threshold).all()


def test_no_distraction_dims(impl):
    x = tokens(2, 6, 8)
    assert impl.distraction_mask(x, [1], -1.0).all()
    assert torch.equal(impl.distraction_scores(x, []), torch.zeros(2, 6, dtype=torch.float64))
    assert torch.equal(impl.distraction_mask(x, [], -1.0), torch.zeros(2, 6, dtype=torch.bool))
    out = impl.redistribute_embeddings(x, torch.ones(2, 6, dtype=torch.bool), [], (2, 3))
    assert_same_bits(out, x)


# Embedding redistribution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("B, H, grid, D, dtype", CASES)
def test_redistribute_embeddings(impl, B, H, grid, D, dtype, pattern):
    N = math.prod(grid)
    x = tokens(B, N, H * D, dtype)
    mask = MASKS[pattern](B, N)
    dims = (1, 3, 0)
    want = brute_redistributed(x, mask, dims, grid, 3)
    assert differs(want, x) == (N > 1 and bool(mask.any()))
    got = impl.redistribute_embeddings(x, mask, dims, grid)
    assert_matches(got, want, dtype)
    untouched = torch.ones(B, N, H * D, dtype=torch.bool)
    untouched[..., dims] = ~mask[..., None]
    assert_same_bits(got[untouched], x[untouched])


@dtypes("fp16", "fp64")
@pytest.mark.parametrize("grid", [(1, 9), (4, 3), (8, 9)], ids=lambda grid: f"grid{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("size", [3, 5, 7])
def test_redistribution_window(impl, size, grid, dtype):
    N = math.prod(grid)
    x, mask = tokens(2, N, 6, dtype), MASKS["some"](2, N)
    want = brute_redistributed(x, mask, [1, 4], grid, size)
    assert size == 3 or differs(want, brute_redistributed(x, mask, [1, 4], grid, 3))
    assert_matches(impl.redistribute_embeddings(x, mask, [1, 4], grid, size=size), want, dtype)


def test_redistribution_depends_on_the_shape_of_the_grid(impl):
    x, mask = tokens(1, 12, 6), MASKS["all"](1, 12)
    results = [impl.redistribute_embeddings(x, mask, [1], grid) for grid in ((3, 4), (4, 3), (1, 12), (12, 1))]
    assert differs(results[0], results[1]) and differs(results[0], results[2])
    assert torch.equal(results[2], results[3])  # a line is a line


@dtypes()
def test_redistribution_reads_values_before_the_update(impl, dtype):
    x = torch.tensor([[[1.0], [100.0], [3.0]]], dtype=dtype)
    got = impl.redistribute_embeddings(x, MASKS["all"](1, 3), [0], (1, 3))
    assert got.flatten().tolist() == [100.0, 2.0, 100.0]


@dtypes("fp16", "fp32")
def test_redistribution_forgets_the_centre(impl, dtype):
    x = torch.ones(1, 9, 2, dtype=dtype)
    for outlier in (torch.finfo(dtype).max, math.inf, math.nan):
        x[0, 4, 0] = outlier
        got = impl.redistribute_embeddings(x, MASKS["one"](1, 9), [0], (3, 3))
        assert torch.equal(got, torch.ones_like(x))


@dtypes()
def test_redistribution_keeps_odd_bits(impl, dtype):
    x = tokens(1, 9, 4, dtype)
    x[0, :, 3] = torch.tensor([math.nan, -0.0, math.inf, -math.inf, 0.0, -math.nan, 1.0, -1.0, 2.0], dtype=dtype)
    x[0, 8, 0] = -0.0
    got = impl.redistribute_embeddings(x, MASKS["one"](1, 9), [0, 1], (3, 3))
    assert got[0, 4, 0] != x[0, 4, 0]
    assert_same_bits(got[..., 2:], x[..., 2:])
    others = torch.arange(9) != 4
    assert_same_bits(got[:, others], x[:, others])


# Variants of the repair, in tables 1 and 4 of the paper ---------------------------------------------------------------


@dtypes()
@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "raw"])
@pytest.mark.parametrize("threshold", [5 / 48, 0.2], ids=["five", "0.2"])
def test_clamp_embeddings(impl, dtype, pattern, shifted, threshold):
    x, mask, dims = tokens(2, 35, 48, dtype), MASKS[pattern](2, 35), [1, 5]
    want = brute_clamped(x, mask, dims, shifted, threshold)
    assert differs(want, x) == (pattern != "none")
    got = impl.clamp_embeddings(x, mask, dims, threshold, shifted=shifted)
    assert_matches(got, want, dtype)
    untouched = torch.ones(x.shape, dtype=torch.bool)
    untouched[..., dims] = ~mask[..., None]
    assert_same_bits(got[untouched], x[untouched])


@dtypes()
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (4, 3), (8, 9)], ids=lambda grid: f"grid{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_filter_embeddings(impl, dtype, grid, size, statistic):
    N = math.prod(grid)
    x = tokens(2, N, 6, dtype)
    for mask in (MASKS["some"](2, N), MASKS["all"](2, N)):
        want = brute_filtered(x, mask, grid, size, statistic)
        assert differs(want, x) == (N > 1)
        got = impl.filter_embeddings(x, mask, grid, size=size, statistic=statistic)
        assert_matches(got, want, dtype)
        assert_same_bits(got[~mask], x[~mask])


@dtypes()
@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (4, 3), (8, 9)], ids=lambda grid: f"grid{grid[0]}x{grid[1]}")
def test_blend_embeddings(impl, dtype, grid, pattern):
    N = math.prod(grid)
    x, mask = tokens(2, N, 6, dtype), MASKS[pattern](2, N)
    want = brute_blended(x, mask, grid)
    assert differs(want, x) == bool(mask.any())
    got = impl.blend_embeddings(x, mask, grid)
    assert_matches(got, want, dtype)
    assert_same_bits(got[~mask], x[~mask])


def test_blending_takes_nothing_from_beyond_the_window(impl):
    """Nor from the other side of the grid, nor from another image; infinities would show."""
    x = torch.ones(2, 25, 3)
    x[1], x[0, [4, 10, 20, 24]] = torch.inf, torch.nan
    mask = torch.zeros(2, 25, dtype=torch.bool)
    mask[0, [0, 7, 12]] = True  # a corner, and two places whose windows are whole
    got = impl.blend_embeddings(x, mask, (5, 5))
    torch.testing.assert_close(got[0, [0, 7, 12], 0], torch.tensor([0.6 + 0.4 * 4 / 9, 1.0, 1.0]))
