"""The kernels of the graph cut against the float64 reference."""

import math

import pytest
import torch
from helpers import assert_close
from kernel_cases import DEVICE, TOLERANCE, dtypes, inside_nan, randn
from scene_cuts import cuts_of_scenes

import rfclip_kernels
from rfclip import reference
from rfclip_kernels import cut, tiles


def clusters(B, grid, dtype=torch.float32):
    """The similarity matrix [B, N, N] of keys in two groups of unequal size."""
    N = math.prod(grid)
    keys = randn(B, 1, N + 1, 16, seed=0, spread=0.6)
    keys[:, :, : 1 + N // 3, 0] += 3
    keys[:, :, 1 + N // 3 :, 1] += 3
    return reference.key_similarity(keys).to(dtype)


def affinities(B, grid):
    """W of the same keys in fp16, [B, N, N]."""
    S = clusters(B, grid)
    return ((S + S.mT) * (math.prod(grid) / 2)).half()


def eigenvalues(S):
    """The eigenvalues [B, N] of Deg^-1/2 W Deg^-1/2, in ascending order."""
    W = (S.double() + S.double().mT) / 2
    root = W.sum(dim=-1).rsqrt()
    return torch.linalg.eigvalsh(root[:, :, None] * W * root[:, None, :])


def resolution(S):
    """How far from the second eigenvector float32 may end: a few times eps over the gap to the third eigenvalue."""
    values = eigenvalues(S)[0]
    return 4 * torch.finfo(torch.float32).eps / (values[-2] - values[-3]).item()


def check_vectors(got, similarity, tolerance):
    """Compare the vectors of a batch image by image."""
    want = reference.fiedler_vector(similarity.double())
    assert got.shape == want.shape
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, tolerance, torch.float32)


GRIDS = [((1, 2), torch.bfloat16), ((3, 3), torch.float16), ((5, 7), torch.float16), ((1, 32), torch.bfloat16)]


@pytest.mark.parametrize(("grid", "dtype"), [*GRIDS, ((10, 13), torch.float32), ((13, 20), torch.float32)], ids=str)
def test_fiedler_vector(grid, dtype):
    S = clusters(2, grid, dtype)
    values = eigenvalues(S)
    assert len(S[0]) < 3 or (values[:, -2] - values[:, -3] > 0.15).all()  # apart enough to be resolved
    check_vectors(rfclip_kernels.fiedler_vector(inside_nan(S)), S, 2e-5)


def test_a_near_start_ends_nearer():
    keys = randn(1, 1, 101, 16, seed=0, spread=0.7)
    S, before = (reference.key_similarity(k) for k in (keys, keys + 0.05 * randn(1, 1, 101, 16, seed=1)))
    start = reference.fiedler_vector(before)
    with pytest.raises(AssertionError):
        check_vectors(start, S, 0.05)
    check_vectors(rfclip_kernels.fiedler_vector(S), S, 2e-5)
    near = resolution(S)
    assert near < 1e-5
    check_vectors(rfclip_kernels.fiedler_vector(S, start), S, near)
    several = start.expand(3, -1).T.contiguous().T
    check_vectors(rfclip_kernels.fiedler_vector(S.expand(3, -1, -1), several), S.expand(3, -1, -1), near)


def test_what_is_hard_to_resolve():
    """Two eigenvalues less than 0.0015 apart: a cold start ends near the vector, a start at the right one stays."""
    S = reference.key_similarity(randn(1, 1, 101, 16, seed=0, spread=0.9))
    values = eigenvalues(S)[0]
    assert 0.0001 < values[-2] - values[-3] < 0.0015
    check_vectors(rfclip_kernels.fiedler_vector(S), S, 0.1)
    check_vectors(rfclip_kernels.fiedler_vector(S, reference.fiedler_vector(S)), S, resolution(S))


def test_fiedler_vector_of_a_single_patch_and_of_tokens_like_no_other():
    assert rfclip_kernels.fiedler_vector(torch.ones(2, 1, 1, device=DEVICE)).tolist() == [[0.0], [0.0]]
    S = clusters(2, (3, 4))
    S[:, 5], S[:, :, 5] = 0, 0
    got = rfclip_kernels.fiedler_vector(S)
    check_vectors(got, S, 1e-5)
    assert (got[:, 5] == 0).all()
    degree = ((S + S.mT) / 2).sum(dim=-1)
    torch.testing.assert_close((degree * got**2).sum(dim=-1), torch.ones(2, device=DEVICE))
    assert (got.gather(1, got.abs().argmax(dim=1, keepdim=True)) > 0).all()
    S[:, 5], S[:, :, 5] = -0.01, -0.01  # no similarity, but nothing to give NaN for
    assert rfclip_kernels.fiedler_vector(S).isfinite().all()


def test_separate_groups():
    """With no similarity between two groups, the second eigenvalue is 1 as well, and its vector separates them."""
    S = torch.block_diag(torch.ones(5, 5), torch.ones(9, 9))[None].to(DEVICE)
    check_vectors(rfclip_kernels.fiedler_vector(S), S, 1e-5)


@pytest.mark.parametrize("threshold", ["mean", "otsu"])
@pytest.mark.parametrize(
    ("N", "dtype"), [*((N, dtype) for N in (1, 2, 17) for dtype in TOLERANCE), (1030, torch.bfloat16)], ids=str
)
def test_defocus_mask(N, dtype, threshold):
    y = randn(2, N, seed=13, dtype=dtype)
    y[0] = torch.where(torch.arange(N, device=DEVICE) % 3 == 0, y[0] + 2, y[0] * 0.1)
    want = reference.defocus_mask(y.double(), threshold=threshold)
    assert N == 1 or want.any(dim=1).all()
    assert torch.equal(rfclip_kernels.defocus_mask(inside_nan(y), threshold=threshold), want)
    equal = rfclip_kernels.defocus_mask(torch.full_like(y[:1], 0.25), threshold=threshold)
    assert not equal.any()
    taken = torch.arange(2 * N, device=DEVICE).view(N, 2).T % 3 == 0  # strided
    assert N < 17 or (want & taken).any(dim=1).all()
    assert torch.equal(rfclip_kernels.defocus_mask(inside_nan(y), taken, threshold=threshold), want & ~taken)


@pytest.mark.parametrize("value", [0.25, -3.0, 1365 / 1024], ids=str)
def test_equal_values_are_not_above_their_mean(value):
    """Their sum is exact, and so the quotient must be: it is not a product with the reciprocal of their number."""
    for N in (3, 7, 49, 196, 588, 1030, 2352):
        y = torch.full((1, N), value, device=DEVICE)
        assert not rfclip_kernels.defocus_mask(y).any()
        y[0, N // 2] += 1
        assert rfclip_kernels.defocus_mask(y).sum() == 1


@pytest.mark.parametrize("values", [[-1, 0, 1], [2, 0, 1, 1, 2, 0], [1, 5, 3, 3, 1, 5, 3, 1, 5], [0, 0, 0, 0, 1]])
def test_the_lowest_of_equal_otsu_thresholds(values):
    """Of values that lie symmetrically, two splits differ as much; equal values stay together."""
    y = torch.tensor([values], dtype=torch.float32, device=DEVICE)
    above = [value > min(values) for value in values]
    assert rfclip_kernels.defocus_mask(y, threshold="otsu")[0].tolist() == above


@pytest.mark.parametrize("grid", [(9, 14), (16, 17)], ids=["one launch", "a launch a product"])
def test_the_cuts_of_a_tower(grid):
    """One round a block, from the vectors of the block before, finds what the exact eigenvectors say.

    The second image has its first distraction token in the third block; up to 256 patches its cut begins there.
    """
    N, average, vectors = math.prod(grid), None, None
    drifting = randn(2, 1, N + 1, 16, seed=0, spread=0.6)
    drifting[:, :, : 1 + N // 3, 0] += 2
    drifting[:, :, 1 + N // 3 :, 1] += 2
    for block in range(4):
        keys = (drifting + 0.4 * randn(2, 1, N + 1, 16, seed=block + 1)).half()
        normalizers = rfclip_kernels.key_normalizers(keys)
        average = rfclip_kernels.key_affinity(keys, normalizers, average, block, inplace=True)
        distraction = torch.arange(N, device=DEVICE).expand(2, -1) % 10 == 3
        distraction = distraction & torch.tensor([[True], [block >= 2]], device=DEVICE)
        vectors, target, order = rfclip_kernels.defocused_tokens(average, distraction, vectors)
        present = distraction.any(dim=1)
        y, want, ordered = (each[present] for each in reference.defocused_tokens(average.double(), distraction))
        assert (target[present] == want).double().mean() > 0.998
        assert 0.2 < want.double().mean() < 0.8
        if torch.equal(target[present], want):
            assert torch.equal(order[present], ordered)
        check_vectors(vectors[present, 0], average[present].double() / N, 0.02)
    assert present.all()


@pytest.mark.parametrize("whole", [256, 0], ids=["one launch", "a launch a product"])
def test_masks_of_scenes(monkeypatch, whole):
    """One in seven vectors is next to nothing in some of these, and entries differ by a factor of 10^5."""
    seeds = [10, 13] if whole else [10]
    similarity, distraction, _, want = (each.to(DEVICE) for each in cuts_of_scenes(monkeypatch, seeds))
    N = similarity.shape[1]
    affinity = ((similarity + similarity.mT) * (N / 2)).half()
    monkeypatch.setattr(cut, "whole", lambda affinity: whole)
    target = rfclip_kernels.defocused_tokens(affinity, distraction)[1]
    assert ((target != want).sum(dim=1) <= 1).all()


@pytest.mark.parametrize(
    ("N", "dtype"), [(1, torch.float16), (5, torch.float32), (64, torch.float16), (126, torch.float16)]
)
@pytest.mark.parametrize("started", [False, True], ids=["anew", "from a start"])
def test_ends_of_rounds_in_many_programs(monkeypatch, N, dtype, started):
    """Each finds the sign of y, its mean, and how many patches of T lie before its own."""
    affinity = affinities(3, (1, N)).to(dtype)
    distraction = torch.arange(3 * N, device=DEVICE).view(N, 3).T % 5 == 1
    distraction[1] = False
    monkeypatch.setattr(cut, "whole", lambda affinity: 0)
    start = rfclip_kernels.defocused_tokens(affinity, distraction)[0] if started else None
    want = rfclip_kernels.defocused_tokens(affinity, distraction, start)
    monkeypatch.setattr(cut, "BLOCK_ENDS", 16)
    got = rfclip_kernels.defocused_tokens(affinity, distraction, start)
    torch.testing.assert_close(got[0], want[0])
    exact = reference.defocused_tokens(affinity.double(), distraction)
    for found in (want, got):
        assert torch.equal(found[1], exact[1]) and torch.equal(found[2], exact[2])


def test_an_image_without_distraction_ends_at_once():
    """It gets no target, and its order is that of the patches, whatever else is in the batch."""
    affinity = affinities(2, (3, 7))
    distraction = torch.arange(21, device=DEVICE).expand(2, -1) == torch.tensor([[4], [-1]], device=DEVICE)
    vectors, target, order = rfclip_kernels.defocused_tokens(affinity, distraction)
    assert target[0].any() and not target[1].any() and not vectors[1].any()
    assert order[1].tolist() == [0, *range(21)]
    assert order[0, 0] == target[0].sum() and (order[0] == -5).sum() == 1


@pytest.mark.parametrize("whole", [256, 0], ids=["one launch", "a launch a product"])
@pytest.mark.parametrize("grid", [(3, 7), (9, 14)])
def test_what_rows_are_padded_with_does_not_matter(monkeypatch, grid, whole):
    """It is read where rows are aligned, 16 values at once, and where they are not, it is not."""
    monkeypatch.setattr(cut, "whole", lambda affinity: whole)
    affinity = affinities(2, grid)
    N = affinity.shape[1]
    distraction = torch.arange(N, device=DEVICE).expand(2, -1) % 5 == 1
    results = []
    for width in (N, -(-N // 16) * 16, -(-N // 16) * 16 + 16):
        padded = affinity.new_full((2, N, width), math.nan)
        padded[:, :, :N] = affinity
        assert cut._padded(padded[:, :, :N]) == (width > N)
        results.append(rfclip_kernels.defocused_tokens(padded[:, :, :N], distraction))
    for got in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(got, results[0], strict=True))


@dtypes
def test_an_affinity_of_any_dtype(dtype):
    affinity = affinities(2, (3, 7)).to(dtype)
    distraction = torch.arange(42, device=DEVICE).view(2, 21) % 5 == 1
    got = rfclip_kernels.defocused_tokens(affinity, distraction)
    want = reference.defocused_tokens(affinity.double(), distraction)
    assert all(torch.equal(*pair) for pair in zip(got[1:], want[1:], strict=True))


@pytest.mark.parametrize(("name", "most"), [("sm_80", 256), ("sm_90", 256), ("sm_89", 128), ("gfx942", 128)])
def test_how_much_one_program_takes_depends_on_the_shared_memory(monkeypatch, name, most):
    monkeypatch.setattr(tiles, "architecture", lambda device: name)
    affinity = affinities(1, (2, 2))
    assert cut.whole(affinity) == most
    assert cut.whole(affinity.float()) == 0  # W in fp32 has no tensor cores


def test_otsus_threshold():
    affinity = affinities(2, (3, 7))
    distraction = torch.arange(42, device=DEVICE).view(2, 21) % 5 == 1
    got = rfclip_kernels.defocused_tokens(affinity, distraction, threshold="otsu")
    want = reference.defocused_tokens(affinity.double(), distraction, threshold="otsu")
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])


def test_a_single_patch():
    distraction = torch.ones(2, 1, dtype=torch.bool, device=DEVICE)
    affinity = torch.ones(2, 1, 1, dtype=torch.float16, device=DEVICE)
    vectors, target, order = rfclip_kernels.defocused_tokens(affinity, distraction)
    assert not vectors.any() and not target.any() and order.tolist() == [[0, -1]] * 2
