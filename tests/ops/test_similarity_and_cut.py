"""Key similarity, the second eigenvector and the threshold that cuts it, against brute force."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, assert_matches, clustered_similarity, differs, dtypes, qkv, score_dtype
from helpers import float64, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.operations import between_class_variance, brute_fiedler, brute_otsu, brute_similarity

from rfclip import reference


@pytest.mark.parametrize("B, H, grid, D, dtype", CASES)
def test_key_similarity(impl, B, H, grid, D, dtype):
    k = qkv(B, H, math.prod(grid) + 1, D, dtype)[0]
    assert_matches(impl.key_similarity(k), brute_similarity(k), score_dtype(dtype))


@dtypes()
def test_running_key_similarity_is_the_mean_over_layers(impl, dtype):
    layers = [qkv(2, 2, 8, 5, dtype, seed=10 * i)[0] for i in range(4)]
    running = None
    for count, k in enumerate(layers):
        running = impl.key_similarity(k, running, count)
        want = sum(brute_similarity(k) for k in layers[: count + 1]) / (count + 1)
        assert count == 0 or differs(want, brute_similarity(k))
        assert_matches(running, want, score_dtype(dtype))


@pytest.mark.parametrize("N", [2, 5, 12, 35])
@dtypes()
def test_fiedler_vector(impl, dtype, N):
    S = clustered_similarity(2, N, dtype)
    got = impl.fiedler_vector(S)
    assert_matches(
        F.normalize(got, dim=-1), brute_fiedler(S), score_dtype(dtype), 1e-12 if S.dtype == torch.float64 else 2e-5
    )


@pytest.mark.parametrize("seed", range(4))
def test_fiedler_vector_solves_the_eigenproblem(impl, seed):
    S = rand(3, 12, 12, seed=seed)  # noise, the hardest for the filter of "eager"
    y = impl.fiedler_vector(S)
    W = (S + S.mT) / 2
    deg = W.sum(dim=-1)
    laplacian_y = deg * y - (W @ y[..., None])[..., 0]
    value = (y * laplacian_y).sum(dim=-1, keepdim=True) / (y * deg * y).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(laplacian_y, value * deg * y, rtol=1e-10, atol=1e-12)
    spectrum = torch.linalg.eigvals((torch.diag_embed(deg) - W) / deg[..., None]).real.sort().values
    torch.testing.assert_close(value[:, 0], spectrum[:, 1])
    torch.testing.assert_close((y * deg * y).sum(dim=-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(4))
def test_fiedler_vector_is_positive_where_it_is_largest(impl, seed):
    S = rand(3, 15, 15, seed=seed)
    y = impl.fiedler_vector(S)
    largest = y.gather(1, y.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()
    assert impl.defocus_mask(y).gather(1, y.abs().argmax(dim=1, keepdim=True)).all()


@dtypes("fp32", "fp64")
@pytest.mark.parametrize("across", [0.01, 1e-9, 0.0], ids=["near", "far", "apart"])
def test_fiedler_vector_separates_two_clusters(impl, dtype, across):
    small = torch.arange(10) < 4
    S = torch.where(small[:, None] == small, 1.0, across)[None].to(dtype)
    y = impl.fiedler_vector(S)
    for threshold in ("mean", "otsu"):
        assert torch.equal(impl.defocus_mask(y, threshold=threshold)[0], small)  # the smaller one has the largest |y|


def test_fiedler_vector_symmetrizes(impl):
    S = clustered_similarity(2, 9) * (0.5 + rand(2, 9, 9, seed=7))
    assert differs(S, S.mT)
    torch.testing.assert_close(impl.fiedler_vector(S), impl.fiedler_vector(S.mT))
    torch.testing.assert_close(impl.fiedler_vector(S), impl.fiedler_vector((S + S.mT) / 2))


def test_fiedler_vector_follows_a_permutation_of_the_patches(impl):
    S = clustered_similarity(1, 11)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    y = impl.fiedler_vector(S)
    assert differs(y, y[:, order])
    torch.testing.assert_close(impl.fiedler_vector(S[:, order][:, :, order]), y[:, order])


def test_fiedler_vector_with_a_start(impl):
    S = clustered_similarity(2, 9)
    for start in (randn(2, 9, seed=0), torch.zeros(2, 9)):
        torch.testing.assert_close(impl.fiedler_vector(S, start), impl.fiedler_vector(S), rtol=1e-5, atol=1e-6)


@dtypes()
def test_fiedler_vector_of_one_patch_and_of_a_patch_like_no_other(impl, dtype):
    one = impl.fiedler_vector(torch.full((2, 1, 1), 0.5, dtype=dtype))
    assert_matches(one, torch.zeros(2, 1), score_dtype(dtype))
    S = torch.zeros(1, 8, 8, dtype=dtype)
    S[:, :7, :7] = clustered_similarity(1, 7, dtype)
    y = impl.fiedler_vector(S)
    assert y[0, 7] == 0
    torch.testing.assert_close(y[:, :7], impl.fiedler_vector(S[:, :7, :7]))


@dtypes()
@pytest.mark.parametrize("N", [1, 2, 7, 35])
def test_defocus_mask(impl, dtype, N):
    y = randn(3, N, seed=N).exp().to(dtype)  # skewed, so that the two thresholds differ
    rows = y.tolist()
    mean = [[value > math.fsum(row) / N for value in row] for row in rows]
    otsu = [brute_otsu(row) for row in rows]
    assert N < 7 or mean != otsu
    assert impl.defocus_mask(y).tolist() == mean
    assert impl.defocus_mask(y, threshold="mean").tolist() == mean
    assert impl.defocus_mask(y, threshold="otsu").tolist() == otsu
    assert impl.defocus_mask(y).dtype == impl.defocus_mask(y, threshold="otsu").dtype == torch.bool
    distraction = (torch.arange(3 * N) % 3 == 0).view(3, N)
    for threshold, above in (("mean", mean), ("otsu", otsu)):
        want = torch.tensor(above) & ~distraction
        assert N < 7 or differs(want.double(), torch.tensor(above).double())
        assert torch.equal(impl.defocus_mask(y, distraction, threshold=threshold), want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(st.integers(-9, 9), min_size=1, max_size=12))
def test_otsu_reaches_the_largest_variance(values):
    mask = reference.defocus_mask(float64([values]), threshold="otsu")[0].tolist()
    above = [y for y, high in zip(values, mask, strict=True) if high]
    below = [y for y, high in zip(values, mask, strict=True) if not high]
    best = max(between_class_variance(values, y) for y in values)
    if best == 0:
        assert not above
    else:
        assert max(below) < min(above)  # equal values stay together
        assert between_class_variance(values, max(below)) == pytest.approx(best, rel=1e-12)
