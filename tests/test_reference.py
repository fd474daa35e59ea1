"""The steps of RF-CLIP against brute force: per-element Python loops in float64 that share no code with the package.

Every implementation in IMPLEMENTATIONS runs the same tests. Inputs are rounded to their dtype first and the brute force
starts from the rounded values, so that only the arithmetic of the implementation is measured.
"""

import inspect
import math
import statistics
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rfclip import reference
from rfclip.backends import functions

IMPLEMENTATIONS = {name: functions(name) for name in ("reference", "eager")}

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
HALF = (torch.float16, torch.bfloat16)
# Largest relative RMS error, by the dtype of the result: a few units of its rounding.
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


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    return IMPLEMENTATIONS[request.param]


def dtypes(*names):
    return pytest.mark.parametrize("dtype", [pytest.param(DTYPES[name], id=name) for name in names or DTYPES])


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rand(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def float64(nested):
    return torch.tensor(nested, dtype=torch.float64)


def score_dtype(dtype):
    return torch.float32 if dtype in HALF else dtype


def assert_matches(got, want, dtype, tolerance=None):
    """The shape of `want`, the dtype asked for, finite, and close to `want` in relative RMS."""
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert got.isfinite().all()
    error = (got.double() - want.double()).square().mean().sqrt().item()
    bound = (tolerance or TOLERANCE[dtype]) * want.double().square().mean().sqrt().item()
    assert error <= bound, f"RMS error {error:.3g}, at most {bound:.3g} allowed"


def assert_same_bits(got, want):
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    assert got.dtype == want.dtype
    assert torch.equal(got.contiguous().view(as_int), want.contiguous().view(as_int))


def differs(a, b):
    return not torch.allclose(a.double(), b.double(), rtol=1e-2, atol=1e-3)


# Brute force ---------------------------------------------------------------------------------------------------------


def brute_weights(q, k, scale=None):
    B, H, T, D = q.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    q, k = q.tolist(), k.tolist()
    weights = torch.zeros(B, H, T, T, dtype=torch.float64)
    for b, h, i in product(range(B), range(H), range(T)):
        logits = [scale * sum(x * y for x, y in zip(q[b][h][i], k[b][h][j], strict=True)) for j in range(T)]
        top = max(logits)
        total = math.fsum(math.exp(z - top) for z in logits)
        weights[b, h, i] = float64([math.exp(z - top) / total for z in logits])
    return weights


def brute_apply(weights, v):
    """Rows of `weights` times values, one number at a time."""
    B, H, rows, T = weights.shape
    D = v.shape[-1]
    weights, v = weights.tolist(), v.tolist()
    out = [
        [
            [[math.fsum(weights[b][h][i][j] * v[b][h][j][c] for j in range(T)) for c in range(D)] for i in range(rows)]
            for h in range(H)
        ]
        for b in range(B)
    ]
    return float64(out)


def brute_plain(q, k, v):
    return brute_apply(brute_weights(q, k), v)


def brute_refocused(q, k, v, distraction, target, beta):
    weights = brute_weights(q, k)
    B, H, T, _ = q.shape
    first = T - target.shape[1]  # 1 for a target over the patches, 0 for one over all tokens
    for b in range(B):
        taken = [j for j in range(1, T) if distraction[b, j - 1]]
        given_to = [j for j in range(first, T) if target[b, j - first] and j not in taken]
        for h, i in product(range(H), range(1, T)):
            row = weights[b, h, i].tolist()
            omega = beta * math.fsum(row[j] for j in taken)
            mass = math.fsum(row[j] for j in given_to)
            if omega > 0 and mass > 0:
                for j in taken:
                    weights[b, h, i, j] = (1 - beta) * row[j]
                for j in given_to:
                    weights[b, h, i, j] = row[j] + omega * row[j] / mass
    return brute_apply(weights, v)


def brute_scores(x, dims, shifted):
    scores = []
    for image in x.tolist():
        scores.append([])
        for f in image:
            low = min(f) if shifted else 0.0
            total = math.fsum(value - low for value in f)
            scores[-1].append(max((f[j] - low) / total for j in dims))
    return float64(scores)


def brute_redistributed(x, mask, dims, grid, size):
    gh, gw = grid
    before, after = x.tolist(), x.tolist()
    reach = size // 2
    for b, row, column, j in product(range(x.shape[0]), range(gh), range(gw), dims):
        near = [
            before[b][r * gw + c][j]
            for r in range(max(0, row - reach), min(gh, row + reach + 1))
            for c in range(max(0, column - reach), min(gw, column + reach + 1))
            if (r, c) != (row, column)
        ]
        if mask[b, row * gw + column] and near:
            after[b][row * gw + column][j] = math.fsum(near) / len(near)
    return float64(after)


def brute_clamped(x, mask, dims, shifted, tau):
    out = x.tolist()
    for b, i in product(range(x.shape[0]), range(x.shape[1])):
        token = x[b, i].tolist()
        low = min(token) if shifted else 0.0
        most = low + tau * math.fsum(value - low for value in token)
        for j in dims:
            if mask[b, i]:
                out[b][i][j] = min(token[j], most)
    return float64(out)


def brute_filtered(x, mask, grid, size, statistic):
    gh, gw = grid
    before, after = x.tolist(), x.tolist()
    reach = size // 2
    for b, row, column, j in product(range(x.shape[0]), range(gh), range(gw), range(x.shape[2])):
        window = [
            before[b][r * gw + c][j]
            for r in range(max(0, row - reach), min(gh, row + reach + 1))
            for c in range(max(0, column - reach), min(gw, column + reach + 1))
        ]
        if mask[b, row * gw + column]:
            after[b][row * gw + column][j] = getattr(statistics, statistic)(window)
    return float64(after)


def brute_resized(plane, H, W):
    """Bilinear samples at the centres of H x W pixels over the plane; its edge repeats beyond its own centres."""
    h, w = len(plane), len(plane[0])

    def taps(place, length, size):
        at = min(max((place + 0.5) * length / size - 0.5, 0.0), length - 1.0)
        low = min(int(at), max(length - 2, 0))
        return (low, 1 - (at - low)), (min(low + 1, length - 1), at - low)

    def sample(Y, X):
        rows, columns = taps(Y, h, H), taps(X, w, W)
        return math.fsum(a * b * plane[y][x] for (y, a), (x, b) in product(rows, columns))

    return [[sample(Y, X) for X in range(W)] for Y in range(H)]


def brute_averaged(logits, corners, side, size):
    h, w = size
    windows = [[brute_resized(plane, side, side) for plane in window] for window in logits.tolist()]
    found = [[[[] for _ in range(w)] for _ in range(h)] for _ in range(logits.shape[1])]
    for (top, left), window in zip(corners, windows, strict=True):
        for k, y, x in product(range(logits.shape[1]), range(side), range(side)):
            found[k][top + y][left + x].append(window[k][y][x])
    return float64([[[math.fsum(values) / len(values) for values in row] for row in plane] for plane in found])


def brute_probabilities(logits, size, scale, class_of_name, classes):
    planes = [brute_resized(plane, *size) for plane in logits.tolist()]
    out = torch.zeros(classes, *size, dtype=torch.float64)
    for y, x in product(range(size[0]), range(size[1])):
        values = [scale * plane[y][x] for plane in planes]
        shares = [math.exp(value - max(values)) for value in values]
        for share, c in zip(shares, class_of_name, strict=True):
            out[c, y, x] = max(out[c, y, x].item(), share / math.fsum(shares))
    return out


def brute_pamr(image, mask, iterations, dilations):
    B, channels, H, W = image.shape
    image, out = image.tolist(), mask.double().clone()

    def near(y, x):
        places = [(y + d * dy, x + d * dx) for d in dilations for dy, dx in product((-1, 0, 1), repeat=2) if dy or dx]
        return [(min(max(r, 0), H - 1), min(max(c, 0), W - 1)) for r, c in places]

    def weights(b, y, x):
        logits = [0.0 for _ in near(y, x)]
        for plane in image[b]:
            values = [plane[r][c] for r, c in near(y, x)]
            spread = 1e-8 + 0.1 * statistics.stdev([*values, *[plane[y][x]] * len(dilations)])
            logits = [z - abs(plane[y][x] - v) / spread / channels for z, v in zip(logits, values, strict=True)]
        shares = [math.exp(z - max(logits)) for z in logits]
        return [share / math.fsum(shares) for share in shares]

    for b in range(B):
        table = {(y, x): list(zip(weights(b, y, x), near(y, x), strict=True)) for y, x in product(range(H), range(W))}
        for _ in range(iterations):
            before = out[b].tolist()
            for c, (y, x) in product(range(out.shape[1]), table):
                out[b, c, y, x] = math.fsum(weight * before[c][r][q] for weight, (r, q) in table[y, x])
    return out


def brute_fiedler(similarity):
    """By another route: the unsymmetric problem Deg^-1 (Deg - W) y = lambda y, its eigenvalues sorted by hand."""
    vectors = []
    for S in similarity.double():
        N = len(S)
        W = float64([[(S[i, j].item() + S[j, i].item()) / 2 for j in range(N)] for i in range(N)])
        degree = [math.fsum(W[i].tolist()) for i in range(N)]
        matrix = float64([[((i == j) * degree[i] - W[i, j].item()) / degree[i] for j in range(N)] for i in range(N)])
        values, columns = torch.linalg.eig(matrix)
        second = sorted(range(N), key=lambda i: values[i].real.item())[1]
        y = columns[:, second].real.tolist()
        largest = max(y, key=abs)
        length = math.sqrt(math.fsum(value * value for value in y))
        vectors.append([value * math.copysign(1, largest) / length for value in y])
    return float64(vectors)


def between_class_variance(values, threshold):
    low, high = [y for y in values if y <= threshold], [y for y in values if y > threshold]
    if not low or not high:
        return 0.0
    gap = math.fsum(low) / len(low) - math.fsum(high) / len(high)
    return len(low) * len(high) * gap**2 / len(values) ** 2


def brute_otsu(values):
    threshold = max(sorted(values), key=lambda y: between_class_variance(values, y))
    return [y > threshold for y in values]


# Inputs --------------------------------------------------------------------------------------------------------------


def tokens(B, N, d, dtype=torch.float64, seed=1):
    """Patch tokens of positive sum, so that the raw form is well conditioned; dimension 1 is an outlier in some."""
    x = randn(B, N, d, seed=seed) + 2
    x[..., 1] += 40 * (rand(B, N, seed=seed + 1) < 0.4)
    x[:, N // 2, 1] += 40
    return x.to(dtype)


def qkv(B, H, T, D, dtype=torch.float64, seed=2):
    return [1.5 * randn(B, H, T, D, seed=seed + i, dtype=dtype) for i in range(3)]


def some_masks(B, N, seed=3):
    u = rand(B, N, seed=seed)
    return u < 0.4, u > 0.6


def clustered_keys(B, H, N, D, dtype=torch.float64, seed=4):
    """Keys of CLS and of N patches in two groups, the first two fifths and the rest: a clear second eigenvector."""
    k = 0.3 * randn(B, H, N + 1, D, seed=seed)
    split = 1 + 2 * N // 5
    k[:, :, 1:split, 0] += 2
    k[:, :, split:, 1] += 2
    return k.to(dtype)


def clustered_similarity(B, N, dtype=torch.float64, seed=4):
    return brute_weights(*[clustered_keys(B, 2, N, 6, seed=seed)] * 2, scale=1.0).mean(dim=1)[:, 1:, 1:].to(dtype)


# Step 1: distractor localization -------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("threshold", [None, 0.2], ids=["default", "0.2"])
def test_distraction_mask(impl, dtype, shifted, threshold):
    x = tokens(2, 35, 48, dtype)
    tau = 5 / 48 if threshold is None else threshold
    want = brute_scores(x, [1, 5], shifted) > tau
    assert 0 < want.sum() < want.numel()
    got = impl.distraction_mask(x, [1, 5], threshold, shifted=shifted)
    assert got.dtype == torch.bool and torch.equal(got, want)


def test_distraction_mask_depends_on_shift_and_threshold(impl):
    x = float64([[[6, -2, 1, 1]]])  # phi of dimension 0 is 8/14 when shifted and 6/6 raw
    verdicts = [
        impl.distraction_mask(x, [0], threshold, shifted=shifted).item()
        for threshold, shifted in product((0.5, 0.8, None), (True, False))
    ]
    assert verdicts == [True, True, False, True, False, False]


@dtypes()
def test_distraction_mask_is_strict(impl, dtype):
    x = torch.tensor([[[3, 1, 0, 0]]], dtype=dtype)  # phi = 3/4 exactly
    assert not impl.distraction_mask(x, [0], 0.75).any()
    assert impl.distraction_mask(x, [0], 0.7499).all()


@dtypes()
def test_distraction_mask_takes_five_times_the_uniform_share(impl, dtype):
    x = torch.zeros(1, 2, 16, dtype=dtype)
    x[0, :, :2] = torch.tensor([[5, 11], [6, 10]])  # phi = 5/16 and 6/16
    assert impl.distraction_mask(x, [0]).tolist() == [[False, True]]


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


# Step 2: the joint criterion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("B, H, grid, D, dtype", CASES)
def test_received_attention(impl, B, H, grid, D, dtype):
    N = math.prod(grid)
    q, k, _ = qkv(B, H, N + 1, D, dtype)
    weights = brute_weights(q, k).tolist()
    want = float64(
        [
            [
                math.fsum(weights[b][h][i][j] for h in range(H) for i in range(1, N + 1)) / (H * N)
                for j in range(1, N + 1)
            ]
            for b in range(B)
        ]
    )
    assert_matches(impl.received_attention(q, k), want, score_dtype(dtype))


def test_received_attention_keeps_the_share_of_cls(impl):
    q, k, _ = qkv(2, 3, 8, 6)
    cls_share = brute_weights(q, k)[:, :, 1:, 0].mean(dim=(1, 2))
    assert (cls_share > 0.01).all()
    torch.testing.assert_close(impl.received_attention(q, k).sum(dim=-1), 1 - cls_share)


# Step 3: embedding redistribution ------------------------------------------------------------------------------------

MASKS = {
    "none": lambda B, N: torch.zeros(B, N, dtype=torch.bool),
    "one": lambda B, N: (torch.arange(N) == N // 2).repeat(B, 1),
    "some": lambda B, N: some_masks(B, N)[0],
    "all": lambda B, N: torch.ones(B, N, dtype=torch.bool),
}


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


# Step 4: defocus localization ----------------------------------------------------------------------------------------


def brute_similarity(k, scale=None):
    weights = brute_weights(k, k, scale)
    B, H, T, _ = weights.shape
    rows = weights.tolist()
    return float64(
        [
            [[math.fsum(rows[b][h][i][j] for h in range(H)) / H for j in range(1, T)] for i in range(1, T)]
            for b in range(B)
        ]
    )


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
    S = rand(3, 12, 12, seed=seed)  # few enough tokens for fifteen steps to be exact
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


# Step 5: attention redistribution ------------------------------------------------------------------------------------


def over_all_tokens(target, cls):
    return torch.cat([torch.full_like(target[:, :1], cls), target], dim=1)


def target_patterns(B, N):
    """Pairs of masks by name, and whether redistribution does anything there."""
    dis, tgt = some_masks(B, N)
    none, every = torch.zeros_like(dis), torch.ones_like(dis)
    first, last = torch.arange(N) == torch.zeros(B, 1), torch.arange(N) == torch.full((B, 1), N - 1)
    one_image = dis & (torch.arange(B) == B - 1)[:, None]
    return {
        "some": (dis, tgt, True),
        "one-each": (first, last, True),
        "all-the-rest": (dis, ~dis, True),
        "overlap": (dis, every, True),
        "one-image": (one_image, tgt, True),
        "to-cls": (dis, over_all_tokens(none, True), True),
        "to-cls-from-all": (every, over_all_tokens(none, True), True),
        "to-cls-and-some": (dis, over_all_tokens(tgt, True), True),
        "some-over-all": (dis, over_all_tokens(tgt, False), True),
        "no-distraction": (none, tgt, False),
        "no-target": (dis, none, False),
        "no-target-over-all": (dis, over_all_tokens(none, False), False),
        "all-distract": (every, every, False),
        "neither": (none, none, False),
    }


@pytest.mark.parametrize("B, H, grid, D, dtype", CASES)
def test_refocused_attention(impl, B, H, grid, D, dtype):
    N = math.prod(grid)
    q, k, v = qkv(B, H, N + 1, D, dtype)
    distraction, target = some_masks(B, N)
    want = brute_refocused(q, k, v, distraction, target, 0.7)
    assert differs(want, brute_plain(q, k, v)) == (N > 1)
    assert_matches(impl.refocused_attention(q, k, v, distraction, target, 0.7), want, dtype)


@dtypes()
@pytest.mark.parametrize("pattern", target_patterns(1, 1))
def test_refocused_attention_masks(impl, pattern, dtype):
    B, H, N, D = 2, 2, 12, 6
    q, k, v = qkv(B, H, N + 1, D, dtype)
    distraction, target, active = target_patterns(B, N)[pattern]
    want, plain = brute_refocused(q, k, v, distraction, target, 0.6), brute_plain(q, k, v)
    assert differs(want, plain) == active
    got = impl.refocused_attention(q, k, v, distraction, target, 0.6)
    assert_matches(got, want, dtype)
    assert_matches(got[:, :, 0], plain[:, :, 0], dtype)  # the CLS row never changes
    ones = impl.refocused_attention(q, k, torch.ones_like(v), distraction, target, 0.6)
    torch.testing.assert_close(ones, torch.ones_like(v))  # every row sums to 1


def test_target_over_patches_is_a_target_over_all_tokens_without_cls(impl):
    q, k, v = qkv(2, 2, 13, 6)
    distraction, target = some_masks(2, 12)
    over_patches = impl.refocused_attention(q, k, v, distraction, target, 0.7)
    over_all = impl.refocused_attention(q, k, v, distraction, over_all_tokens(target, False), 0.7)
    with_cls = impl.refocused_attention(q, k, v, distraction, over_all_tokens(target, True), 0.7)
    assert differs(over_patches, with_cls)
    torch.testing.assert_close(over_patches, over_all)


@dtypes()
def test_no_budget_is_plain_attention(impl, dtype):
    q, k, v = qkv(2, 3, 16, 8, dtype)
    distraction, target = some_masks(2, 15)
    assert differs(impl.refocused_attention(q, k, v, distraction, target, 0.5), brute_plain(q, k, v))
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_matches(impl.refocused_attention(q, k, v, distraction, target, 0), want, dtype)


@dtypes()
def test_full_budget_empties_the_distraction_columns(impl, dtype):
    q, k, v = qkv(2, 3, 16, 8, dtype)
    distraction, target = some_masks(2, 15)
    other = v.clone()
    other[:, :, 1:][distraction[:, None].expand(2, 3, 15)] += 50
    partly = [impl.refocused_attention(q, k, values, distraction, target, 0.9) for values in (v, other)]
    fully = [impl.refocused_attention(q, k, values, distraction, target, 1.0) for values in (v, other)]
    assert differs(partly[0][:, :, 1:], partly[1][:, :, 1:])
    torch.testing.assert_close(fully[0][:, :, 1:], fully[1][:, :, 1:])
    assert differs(fully[0][:, :, 0], fully[1][:, :, 0])  # the CLS row still sees them


def test_refocused_attention_follows_a_permutation_of_the_patches(impl):
    q, k, v = qkv(2, 2, 13, 6)
    distraction, target = some_masks(2, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with_cls = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    got = impl.refocused_attention(q, k, v, distraction, target, 0.7)
    permuted = impl.refocused_attention(
        *(tensor[:, :, with_cls] for tensor in (q, k, v)), distraction[:, order], target[:, order], 0.7
    )
    assert differs(got, permuted)
    torch.testing.assert_close(permuted, got[:, :, with_cls])


@dtypes("fp32", "fp64")
@pytest.mark.parametrize("blind_to", ["target", "distraction"])
def test_a_row_without_mass_stays_unchanged(impl, dtype, blind_to):
    """Query 3 gives the tokens of one mask a weight that underflows to 0; the other rows are redistributed."""
    T, D = 6, 4
    _, k, v = qkv(1, 1, T, D, dtype)
    q = 0.1 * randn(1, 1, T, D, seed=5, dtype=dtype)
    distraction = torch.tensor([[True, True, False, False, False]])
    target = torch.tensor([[False, False, False, True, True]])
    hidden = 1 + (target if blind_to == "target" else distraction)[0].nonzero().flatten()
    k[..., 0], q[..., 0] = 0, 0
    k[:, :, hidden, 0], q[:, :, 3, 0] = -100, 100
    got = impl.refocused_attention(q, k, v, distraction, target, 0.7)
    plain = brute_plain(q, k, v)
    assert_matches(got, brute_refocused(q, k, v, distraction, target, 0.7), dtype)
    assert_matches(got[:, :, 3], plain[:, :, 3], dtype)
    assert differs(got[:, :, 4], plain[:, :, 4])


def test_a_target_mass_near_underflow_stays_finite(impl):
    """omega / mass would overflow in float32; the target takes all of the budget all the same."""
    q = torch.zeros(1, 1, 4, 1)
    k = torch.zeros(1, 1, 4, 1)
    q[..., 2, :], k[..., 3, :] = 1, -95  # exp(-95) is 5e-42
    v = torch.tensor([1.0, 2.0, 0.0, 64.0]).reshape(1, 1, 4, 1)
    distraction, target = torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])
    mass = torch.softmax(q @ k.mT, dim=-1)[0, 0, 2, 3]
    assert mass > 0 and torch.isinf(0.2 / mass)
    got = impl.refocused_attention(q, k, v, distraction, target, 0.6)
    assert got[0, 0, 2].item() == pytest.approx(1 / 3 + 0.4 * 2 / 3 + 0.6 * 64 / 3, rel=1e-5)


# Step 7: dense prediction --------------------------------------------------------------------------------------------


def brute_proxy(keys, v):
    total = sum(brute_weights(k, k) for k in keys)
    return brute_apply(total[:, :, 1:, 1:] / len(keys), v[:, :, 1:])


@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("B, H, grid, D, dtype", CASES)
def test_proxy_attention(impl, B, H, grid, D, dtype, L):
    T = math.prod(grid) + 1
    keys = torch.stack([qkv(B, H, T, D, dtype, seed=10 * layer)[0] for layer in range(L)])
    v = qkv(B, H, T, D, dtype)[2]
    want = brute_proxy(keys, v)
    assert L == 1 or differs(want, brute_proxy(keys[-1:], v))
    assert_matches(impl.proxy_attention(keys, v), want, dtype)


def test_proxy_attention_drops_cls_without_renormalizing(impl):
    keys = torch.stack([qkv(2, 2, 9, 6, seed=10 * layer)[0] for layer in range(3)])
    to_cls = sum(brute_weights(k, k)[:, :, 1:, :1] for k in keys) / 3
    v = torch.ones(2, 2, 9, 6, dtype=torch.float64)
    v[:, :, 0] = 1000
    assert (to_cls > 1e-4).all()
    torch.testing.assert_close(impl.proxy_attention(keys, v), (1 - to_cls).expand(2, 2, 8, 6))


@dtypes()
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (4, 3)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_self_attention(impl, grid, dtype, biased):
    (gh, gw), T = grid, math.prod(grid) + 1
    u, _, v = qkv(2, 2, T, 6, dtype)
    if not biased:
        assert_matches(impl.self_attention(u, v), brute_plain(u, u, v), dtype)
        return
    bias = randn(2 * gh - 1, 2 * gw - 1, seed=8, dtype=score_dtype(dtype))
    weights = brute_weights(u, u).log()
    for i, j in product(range(1, T), range(1, T)):
        down, right = (i - 1) // gw - (j - 1) // gw, (i - 1) % gw - (j - 1) % gw
        weights[..., i, j] += bias[down + gh - 1, right + gw - 1]
    want = brute_apply(weights.softmax(dim=-1), v)
    assert T == 2 or differs(want, brute_plain(u, u, v))
    assert_matches(impl.self_attention(u, v, bias), want, dtype)


# Step 3, variants of tables 1 and 4 ----------------------------------------------------------------------------------


@dtypes()
@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "raw"])
@pytest.mark.parametrize("threshold", [None, 0.2], ids=["default", "0.2"])
def test_clamp_embeddings(impl, dtype, pattern, shifted, threshold):
    x, mask, dims = tokens(2, 35, 48, dtype), MASKS[pattern](2, 35), [1, 5]
    want = brute_clamped(x, mask, dims, shifted, 5 / 48 if threshold is None else threshold)
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


# Steps 9 and 10: from patches to pixels ------------------------------------------------------------------------------

WINDOWS = {  # K, patch grid, side, size, corners
    "one": (3, (2, 3), 8, (8, 8), [(0, 0)]),
    "uneven": (2, (3, 2), 6, (8, 11), [(0, 0), (0, 5), (2, 0), (1, 3), (2, 5)]),
    "smaller than the grid": (2, (7, 5), 4, (5, 4), [(1, 0), (0, 0)]),
    "one row of pixels": (1, (1, 1), 1, (1, 3), [(0, 2), (0, 0), (0, 1)]),
    "one column of pixels": (1, (2, 1), 1, (2, 1), [(1, 0), (0, 0)]),
}
windows = pytest.mark.parametrize("case", WINDOWS)


@dtypes()
@windows
def test_average_windows(impl, case, dtype):
    K, grid, side, size, corners = WINDOWS[case]
    logits = randn(len(corners), K, *grid, seed=9, dtype=dtype)
    want = brute_averaged(logits, corners, side, size)
    assert_matches(impl.average_windows(logits, corners, side, size), want, score_dtype(dtype))


def test_one_window_is_resized_as_pytorch_does(impl):
    logits = randn(1, 2, 14, 10, seed=9)
    want = F.interpolate(logits, size=(56, 56), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(impl.average_windows(logits, [(0, 0)], 56, (56, 56)), want)


PICTURES = {  # class of each name, size of the logits, size of the picture
    "larger": ([0, 2, 1, 2, 0], (3, 4), (7, 9)),
    "smaller": ([1, 0, 1], (11, 9), (4, 5)),
    "one row": ([2, 0, 1], (1, 6), (1, 9)),
    "one column": ([0, 1], (5, 1), (8, 1)),
    "one name": ([0], (3, 3), (5, 4)),
    "a class without names": ([3, 0, 3], (2, 2), (3, 5)),
}
pictures = pytest.mark.parametrize("case", PICTURES)


@dtypes()
@pictures
def test_class_probabilities(impl, case, dtype):
    names, before, size = PICTURES[case]
    logits, class_of_name, classes = randn(len(names), *before, seed=10, dtype=dtype), torch.tensor(names), 4
    want = brute_probabilities(logits, size, 3.0, names, classes)
    arguments = (logits, size, 3.0, class_of_name, classes)
    tolerance = 3e-6 if dtype != torch.float64 else None
    got = impl.class_probabilities(*arguments)
    assert_matches(got, want, score_dtype(dtype), tolerance)
    for rows in (range(size[0] - 1, size[0]), range(size[0])[: size[0] // 2 + 1], range(0, size[0], 3)):
        part = impl.class_probabilities(*arguments, rows)
        torch.testing.assert_close(part, got[:, rows.start : rows.stop : rows.step])


@pytest.mark.parametrize("size", [(7, 9), (40, 23), (5, 80), (1, 1)], ids=str)
def test_probabilities_are_those_of_logits_resized_as_pytorch_does(impl, size):
    logits = randn(3, 11, 13, seed=10)
    want = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].softmax(dim=0)
    got = [
        impl.class_probabilities(logits, size, 1.0, torch.arange(3), 3, range(top, min(top + 4, size[0])))
        for top in range(0, size[0], 4)
    ]
    torch.testing.assert_close(torch.cat(got, dim=1), want)


@dtypes()
@pictures
@pytest.mark.parametrize("threshold", [None, 0.0, 0.6, 1.0], ids=str)
def test_upsample_argmax(impl, monkeypatch, case, dtype, threshold):
    names, before, size = PICTURES[case]
    logits, class_of_name = randn(len(names), *before, seed=10, dtype=dtype), torch.tensor(names)
    probabilities = brute_probabilities(logits, size, 3.0, names, 4)
    best, want = probabilities.max(dim=0)
    clear = best - probabilities.topk(2, dim=0).values[1] > 1e-4
    if threshold is not None:
        want[best < threshold] = -1
        clear &= ((best - threshold).abs() > 1e-4) | (best == threshold)
    assert clear.double().mean() > 0.95
    got = impl.upsample_argmax(logits, size, 3.0, class_of_name, threshold)
    assert got.dtype == torch.int32
    assert torch.equal(got[clear].long(), want[clear])
    monkeypatch.setattr(reference, "BAND", 1)  # a band is then a row
    assert torch.equal(impl.upsample_argmax(logits, size, 3.0, class_of_name, threshold), got)


def test_the_lowest_of_equal_classes_wins(impl):
    plane = randn(1, 3, 4, seed=10)
    logits = torch.cat([plane - 1, plane, plane, plane])
    for names, lowest in (([0, 3, 1, 2], 1), ([3, 2, 2, 1], 1), ([0, 5, 5, 5], 5)):
        assert impl.upsample_argmax(logits, (5, 7), 9.0, torch.tensor(names)).unique().tolist() == [lowest]
    assert impl.upsample_argmax(logits, (5, 7), 0.0, torch.tensor([4, 3, 2, 6])).unique().tolist() == [2]
    assert impl.upsample_argmax(logits, (5, 7), 9.0, torch.tensor([0, 3, 1, 2]), 0.34).unique().tolist() == [-1]


@dtypes()
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (5, 8)], ids=str)
@pytest.mark.parametrize("dilations", [(1,), (2, 1), (1, 8, 16)], ids=str)
def test_pamr(impl, size, dilations, dtype):
    image, mask = rand(2, 3, *size, seed=11).to(dtype), rand(2, 2, *size, seed=12).to(dtype)
    for iterations in (0, 1, 3):
        want = brute_pamr(image, mask, iterations, dilations)
        if min(size) > 1:  # in a line, a place beyond the border is the pixel itself, which then outweighs the others
            assert differs(want, mask) == (iterations > 0)
        tolerance = 3e-6 if dtype == torch.float32 else None
        assert_matches(impl.pamr(image, mask, iterations, dilations), want, dtype, tolerance)


def test_pamr_of_a_constant_mask_and_of_a_flat_picture(impl):
    mask = rand(1, 1, 5, 6, seed=12)
    torch.testing.assert_close(impl.pamr(rand(1, 3, 5, 6, seed=11), torch.ones_like(mask)), torch.ones_like(mask))
    padded = F.pad(mask, (1,) * 4, mode="replicate")
    mean = (F.avg_pool2d(padded, 3, stride=1) * 9 - mask) / 8
    torch.testing.assert_close(impl.pamr(torch.full((1, 1, 5, 6), 0.3, dtype=mask.dtype), mask, 1, (1,)), mean)


def test_pamr_takes_two_dtypes_and_defaults_to_the_papers(impl):
    image, mask = rand(1, 3, 9, 9, seed=11), rand(1, 2, 9, 9, seed=12)
    got = impl.pamr(image.float(), mask.half())
    assert got.dtype == torch.float16
    assert_matches(got, brute_pamr(image.float(), mask.half(), 10, (8, 16)), torch.float16)


# Every function ------------------------------------------------------------------------------------------------------

DIMS = (1, 4)
CALLS = {  # name: the tensors it takes, batched (keys along axis 1), and how it is called on them
    "dimension_weights": (("x",), lambda impl, x: impl.dimension_weights(x)),
    "clamp_embeddings": (("x", "distraction"), lambda impl, x, mask: impl.clamp_embeddings(x, mask, DIMS)),
    "filter_embeddings": (("x", "distraction"), lambda impl, x, mask: impl.filter_embeddings(x, mask, (3, 4))),
    "filter_embeddings-median": (
        ("x", "distraction"),
        lambda impl, x, mask: impl.filter_embeddings(x, mask, (3, 4), statistic="median"),
    ),
    "distraction_scores": (("x",), lambda impl, x: impl.distraction_scores(x, DIMS)),
    "distraction_mask": (("x",), lambda impl, x: impl.distraction_mask(x, DIMS)),
    "received_attention": (("q", "k"), lambda impl, q, k: impl.received_attention(q, k)),
    "redistribute_embeddings": (
        ("x", "distraction"),
        lambda impl, x, mask: impl.redistribute_embeddings(x, mask, DIMS, (3, 4)),
    ),
    "key_similarity": (("k", "running"), lambda impl, k, running: impl.key_similarity(k, running, 2)),
    "fiedler_vector": (("similarity", "start"), lambda impl, S, start: impl.fiedler_vector(S, start)),
    "defocus_mask": (("y",), lambda impl, y: impl.defocus_mask(y)),
    "defocus_mask-otsu": (("y",), lambda impl, y: impl.defocus_mask(y, threshold="otsu")),
    "refocused_attention": (
        ("q", "k", "v", "distraction", "target"),
        lambda impl, *tensors: impl.refocused_attention(*tensors, 0.7),
    ),
    "proxy_attention": (("keys", "v"), lambda impl, keys, v: impl.proxy_attention(keys, v)),
    "self_attention": (("q", "v"), lambda impl, q, v: impl.self_attention(q, v)),
    "pamr": (("image", "scores"), lambda impl, image, scores: impl.pamr(image, scores, 2, (1, 2))),
}
PICTURE_CALLS = {  # the same for the functions of one picture
    "average_windows": (
        ("windows",),
        lambda impl, windows: impl.average_windows(windows, [(0, 0), (0, 2), (1, 1), (1, 0), (1, 2)], 3, (4, 5)),
    ),
    "class_probabilities": (
        ("logits",),
        lambda impl, x: impl.class_probabilities(x, (5, 6), 4.0, torch.tensor([1, 0, 1], device=x.device), 2),
    ),
    "upsample_argmax": (
        ("logits",),
        lambda impl, x: impl.upsample_argmax(x, (5, 6), 4.0, torch.tensor([1, 0, 1], device=x.device), 0.5),
    ),
}
every_call = pytest.mark.parametrize("call", CALLS | PICTURE_CALLS)
batched_call = pytest.mark.parametrize("call", CALLS)


def example(call, dtype=torch.float64, B=3):
    """The arguments of one call: 3 x 4 patches, 2 heads of 5 dimensions."""
    N = 12
    q, k, v = qkv(B, 2, N + 1, 5, dtype)
    distraction, target = some_masks(B, N)
    inputs = {
        "x": tokens(B, N, 10, dtype),
        "q": q,
        "k": k,
        "v": v,
        "keys": torch.stack([k, q]),
        "distraction": distraction,
        "target": target,
        "running": clustered_similarity(B, N, score_dtype(dtype)),
        "similarity": clustered_similarity(B, N, dtype),
        "start": randn(B, N, seed=6, dtype=dtype),
        "y": randn(B, N, seed=7, dtype=dtype),
        "image": rand(B, 3, 3, 4, seed=11).to(dtype),
        "scores": rand(B, 2, 3, 4, seed=12).to(dtype),
        "windows": randn(5, 2, 2, 3, seed=9, dtype=dtype),
        "logits": randn(3, 3, 4, seed=10, dtype=dtype),
    }
    names, function = (CALLS | PICTURE_CALLS)[call]
    return {name: inputs[name] for name in names}, function


@every_call
@dtypes()
def test_inputs_are_not_modified_and_results_are_new(impl, call, dtype):
    tensors, function = example(call, dtype)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    out = function(impl, *tensors.values())
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert out.untyped_storage().data_ptr() not in storages
    assert (
        out.is_contiguous() or out.transpose(1, 2).is_contiguous()
    )  # heads may lie as the output projection reads them
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name


@dtypes()
def test_in_place(impl, dtype):
    tensors, _ = example("redistribute_embeddings", dtype)
    x, mask = tensors.values()
    want = impl.redistribute_embeddings(x, mask, DIMS, (3, 4))
    view = F.pad(x, (0, 0, 1, 0))[:, 1:]  # the patches of a block's input
    assert impl.redistribute_embeddings(view, mask, DIMS, (3, 4), inplace=True) is view
    assert_same_bits(view, want)
    tensors, _ = example("key_similarity", dtype)
    k, running = tensors.values()
    want = impl.key_similarity(k, running, 2)
    assert impl.key_similarity(k, running, 2, inplace=True) is running
    assert_same_bits(running, want)
    assert_same_bits(impl.key_similarity(k, inplace=True), impl.key_similarity(k))


@batched_call
@dtypes()
def test_a_batch_equals_its_images_one_by_one(impl, call, dtype):
    tensors, function = example(call, dtype)
    batch = function(impl, *tensors.values())
    for b in range(3):
        image = [t[:, b : b + 1] if name == "keys" else t[b : b + 1] for name, t in tensors.items()]
        torch.testing.assert_close(function(impl, *image), batch[b : b + 1])
    assert not torch.equal(batch[0], batch[1])


@every_call
def test_strided_inputs(impl, call):
    tensors, function = example(call)
    strided = [torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0] for t in tensors.values()]
    crossed = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors.values()]
    want = function(impl, *tensors.values())
    for variant in (strided, crossed):
        assert not any(t.is_contiguous() for t in variant)
        torch.testing.assert_close(function(impl, *variant), want)


@batched_call
def test_an_empty_batch(impl, call):
    tensors, function = example(call)
    shape = function(impl, *tensors.values()).shape
    out = function(impl, *(t[:, :0] if name == "keys" else t[:0] for name, t in tensors.items()))
    assert out.shape == (0, *shape[1:])


@every_call
def test_the_reference_reads_nothing_back_from_the_device(call):
    tensors, function = example(call)
    want = function(reference, *tensors.values())
    out = function(reference, *(t.to("meta") for t in tensors.values()))  # a meta tensor has no values to read
    assert (out.shape, out.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_scale(impl, scale):
    q, k, v = qkv(2, 2, 9, 6)
    distraction, target = some_masks(2, 8)
    factor = scale * math.sqrt(6)  # what the default scale makes of queries multiplied by this
    root = math.sqrt(factor)
    pairs = [
        (impl.received_attention, (q, k), (factor * q, k)),
        (impl.key_similarity, (k,), (root * k,)),
        (impl.proxy_attention, (k[None], v), (root * k[None], v)),
        (impl.refocused_attention, (q, k, v, distraction, target, 0.7), (factor * q, k, v, distraction, target, 0.7)),
    ]
    for function, arguments, scaled in pairs:
        got = function(*arguments, scale=scale)
        assert differs(got, function(*arguments))
        torch.testing.assert_close(got, function(*scaled))


def test_public_names(impl):
    assert sorted(reference.__all__) == sorted({call.split("-")[0] for call in CALLS | PICTURE_CALLS})
    for name in reference.__all__:
        parameters = inspect.signature(getattr(reference, name)).parameters
        assert list(inspect.signature(getattr(impl, name)).parameters) == list(parameters)


# Errors --------------------------------------------------------------------------------------------------------------

X = torch.ones(2, 6, 8)
Q = torch.ones(2, 3, 7, 4)
M = torch.zeros(2, 6, dtype=torch.bool)
S = torch.ones(2, 6, 6)
C = torch.zeros(2, dtype=torch.int64)  # a class for each of X's two planes

ERRORS = {
    # tensors: rank, size, dtype, emptiness, type
    "scores-rank": (lambda f: f.distraction_scores(X[0], [1]), "x must be", "[B>=0, N>=1, d>=1]", "float32", "[6, 8]"),
    "scores-dtype": (lambda f: f.distraction_scores(X.int(), [1]), "x must be a floating-point", "int32"),
    "scores-no-tensor": (lambda f: f.distraction_scores([[[1.0]]], [0]), "x must be", "got list"),
    "scores-no-patches": (lambda f: f.distraction_scores(X[:, :0], [1]), "N>=1", "[2, 0, 8]"),
    "mask-rank": (lambda f: f.distraction_mask(X[0], [1]), "x must be", "[6, 8]"),
    "received-q-rank": (lambda f: f.received_attention(Q[0], Q), "q must be", "[B>=0, H>=1, T>=2, D>=1]", "[3, 7, 4]"),
    "received-k-shape": (lambda f: f.received_attention(Q, Q[:, :, 1:]), "k must be", "T=7", "[2, 3, 6, 4]"),
    "received-k-dtype": (lambda f: f.received_attention(Q, Q.half()), "k must be a float32", "float16"),
    "received-cls-only": (lambda f: f.received_attention(Q[:, :, :1], Q[:, :, :1]), "T>=2", "[2, 3, 1, 4]"),
    "redistribute-x": (lambda f: f.redistribute_embeddings(X[0], M, [1], (2, 3)), "x must be", "[6, 8]"),
    "redistribute-mask-dtype": (
        lambda f: f.redistribute_embeddings(X, M.int(), [1], (2, 3)),
        "mask must be a bool tensor [B=2, N=6]",
        "int32 of shape [2, 6]",
    ),
    "redistribute-mask-shape": (lambda f: f.redistribute_embeddings(X, M[:, 1:], [1], (2, 3)), "mask", "N=6", "[2, 5]"),
    "redistribute-mask-rank": (lambda f: f.redistribute_embeddings(X, M[..., None], [1], (2, 3)), "mask", "[2, 6, 1]"),
    "weights-rank": (lambda f: f.dimension_weights(X[0]), "x must be", "[6, 8]"),
    "clamp-mask": (lambda f: f.clamp_embeddings(X, M.int(), [1]), "mask must be a bool", "int32"),
    "clamp-threshold": (lambda f: f.clamp_embeddings(X, M, [1], math.nan), "threshold must be a number", "nan"),
    "filter-mask": (lambda f: f.filter_embeddings(X, M[:, 1:], (2, 3)), "mask", "N=6", "[2, 5]"),
    "filter-grid": (lambda f: f.filter_embeddings(X, M, (2, 4)), "grid", "gh * gw = N = 6", "(2, 4)"),
    "filter-size": (lambda f: f.filter_embeddings(X, M, (2, 3), size=4), "size must be an odd", "got 4"),
    "filter-statistic": (
        lambda f: f.filter_embeddings(X, M, (2, 3), statistic="mode"),
        "statistic",
        '"mean" or "median"',
        "'mode'",
    ),
    "refocused-q": (lambda f: f.refocused_attention(Q.int(), Q, Q, M, M, 0.7), "q must be a floating-point", "int32"),
    "refocused-k": (lambda f: f.refocused_attention(Q, Q[:1], Q, M, M, 0.7), "k must be", "B=2", "[1, 3, 7, 4]"),
    "refocused-v": (lambda f: f.refocused_attention(Q, Q, Q[..., :3], M, M, 0.7), "v must be", "D=4", "[2, 3, 7, 3]"),
    "refocused-v-dtype": (
        lambda f: f.refocused_attention(Q, Q, Q.double(), M, M, 0.7),
        "v must be a float32",
        "float64",
    ),
    "refocused-distraction": (
        lambda f: f.refocused_attention(Q, Q, Q, torch.zeros(2, 7, dtype=torch.bool), M, 0.7),
        "distraction must be a bool tensor [B=2, N=6]",
        "[2, 7]",
    ),
    "refocused-distraction-dtype": (
        lambda f: f.refocused_attention(Q, Q, Q, M.float(), M, 0.7),
        "distraction",
        "float32",
    ),
    "refocused-target": (
        lambda f: f.refocused_attention(Q, Q, Q, M, M[:, 1:], 0.7),
        "target must be a bool tensor [B=2, N=6] or [B=2, T=7]",
        "[2, 5]",
    ),
    "refocused-target-dtype": (lambda f: f.refocused_attention(Q, Q, Q, M, M.int(), 0.7), "target", "int32"),
    "similarity-k": (lambda f: f.key_similarity(Q[0]), "k must be", "[3, 7, 4]"),
    "similarity-running": (lambda f: f.key_similarity(Q, S[:, 1:], 1), "running", "[B=2, N=6, N=6]", "[2, 5, 6]"),
    "similarity-running-dtype": (
        lambda f: f.key_similarity(Q.half(), S.half(), 1),
        "running must be a float32",
        "float16",
    ),
    "fiedler-square": (lambda f: f.fiedler_vector(S[:, 1:]), "similarity must be", "[B>=0, N>=1, N>=1]", "[2, 5, 6]"),
    "fiedler-empty": (lambda f: f.fiedler_vector(S[:, :0, :0]), "similarity", "N>=1", "[2, 0, 0]"),
    "fiedler-start": (lambda f: f.fiedler_vector(S, torch.ones(2, 5)), "start must be", "[B=2, N=6]", "[2, 5]"),
    "defocus-rank": (lambda f: f.defocus_mask(S), "fiedler must be", "[B>=0, N>=1]", "[2, 6, 6]"),
    "defocus-dtype": (lambda f: f.defocus_mask(M), "fiedler must be a floating-point", "bool"),
    "proxy-rank": (lambda f: f.proxy_attention(Q, Q), "keys must be", "[L>=1, B>=0, H>=1, T>=2, D>=1]", "[2, 3, 7, 4]"),
    "proxy-no-layers": (lambda f: f.proxy_attention(Q[None][:0], Q), "keys", "L>=1", "[0, 2, 3, 7, 4]"),
    "proxy-v": (lambda f: f.proxy_attention(Q[None], Q[:, :, 1:]), "v must be", "T=7", "[2, 3, 6, 4]"),
    "proxy-v-dtype": (lambda f: f.proxy_attention(Q[None], Q.half()), "v must be a float32", "float16"),
    "self-v": (lambda f: f.self_attention(Q, Q[:, :, 1:]), "v must be", "T=7", "[2, 3, 6, 4]"),
    "self-bias-even": (lambda f: f.self_attention(Q, Q, torch.ones(3, 4)), "bias", "2 gh - 1", "[3, 4]"),
    "self-bias-grid": (lambda f: f.self_attention(Q, Q, torch.ones(3, 3)), "bias", "gh * gw = N = 6", "[3, 3]"),
    "self-bias-dtype": (lambda f: f.self_attention(Q, Q, M.int()), "bias", "int32"),
    "self-bias-no-tensor": (lambda f: f.self_attention(Q, Q, 1.0), "bias", "got float"),
    "average-rank": (
        lambda f: f.average_windows(X, [(0, 0)], 2, (2, 2)),
        "logits must be",
        "[W>=1, K>=1, gh>=1, gw>=1]",
    ),
    "average-corners": (lambda f: f.average_windows(Q, [(0, 0)], 2, (2, 2)), "corners", "W=2", "[(0, 0)]"),
    "average-corner": (lambda f: f.average_windows(Q, [(0, 0), (0, 0.5)], 2, (2, 2)), "two integers", "(0, 0.5)"),
    "average-pairs": (lambda f: f.average_windows(Q, [(0, 0), (0,)], 2, (2, 2)), "(top, left)", "(0,)"),
    "average-side": (lambda f: f.average_windows(Q, [(0, 0)] * 2, 0, (2, 2)), "side", "at least 1", "got 0"),
    "average-size": (lambda f: f.average_windows(Q, [(0, 0)] * 2, 2, (2,)), "size must be (height, width)", "(2,)"),
    "average-outside": (
        lambda f: f.average_windows(Q, [(0, 0), (1, 2)], 2, (3, 3)),
        "2 x 2 at (1, 2) is not inside a picture 3 x 3",
    ),
    "average-negative": (lambda f: f.average_windows(Q, [(0, 0), (-1, 0)], 2, (2, 2)), "(-1, 0) is not inside"),
    "average-gap-right": (lambda f: f.average_windows(Q, [(0, 0)] * 2, 2, (2, 3)), "covers pixel (0, 2)", "2 x 3"),
    "average-gap-between": (lambda f: f.average_windows(Q, [(0, 3), (0, 0)], 2, (2, 5)), "covers pixel (0, 2)"),
    "average-gap-below": (lambda f: f.average_windows(Q, [(0, 0), (0, 1)], 2, (4, 3)), "covers pixel (2, 0)"),
    "average-gap-corner": (lambda f: f.average_windows(Q, [(0, 0), (1, 1)], 2, (3, 3)), "covers pixel (0, 2)"),
    "argmax-rank": (lambda f: f.upsample_argmax(Q, (2, 2), 1.0, C), "logits must be", "[K>=1, h>=1, w>=1]"),
    "argmax-classes": (lambda f: f.upsample_argmax(X, (2, 2), 1.0, C[:1]), "class_of_name must be an int64", "K=2"),
    "argmax-class-dtype": (lambda f: f.upsample_argmax(X, (2, 2), 1.0, C.int()), "class_of_name", "int32"),
    "argmax-size": (lambda f: f.upsample_argmax(X, (2, 0), 1.0, C), "size must be (height, width)", "(2, 0)"),
    "argmax-scale": (lambda f: f.upsample_argmax(X, (2, 2), "40", C), "logit_scale must be a number", "'40'"),
    "argmax-threshold": (lambda f: f.upsample_argmax(X, (2, 2), 1.0, C, 1.5), "threshold", "[0, 1]", "got 1.5"),
    "probabilities-rank": (lambda f: f.class_probabilities(Q, (2, 2), 1.0, C, 1), "logits must be", "[2, 3, 7, 4]"),
    "probabilities-classes": (lambda f: f.class_probabilities(X, (2, 2), 1.0, C, 0), "classes", "at least 1", "got 0"),
    "probabilities-rows": (
        lambda f: f.class_probabilities(X, (2, 2), 1.0, C, 1, range(1, 3)),
        "rows must be a range",
        "0 .. 1",
        "range(1, 3)",
    ),
    "probabilities-no-rows": (lambda f: f.class_probabilities(X, (2, 2), 1.0, C, 1, range(0)), "rows", "not empty"),
    "pamr-image": (lambda f: f.pamr(X, Q), "image must be", "[B>=0, CI>=1, H>=1, W>=1]", "[2, 6, 8]"),
    "pamr-mask": (lambda f: f.pamr(Q, Q[..., 1:]), "mask must be", "[B=2, C>=1, H=7, W=4]", "[2, 3, 7, 3]"),
    "pamr-mask-dtype": (lambda f: f.pamr(Q, Q.int()), "mask must be a floating-point", "int32"),
    "pamr-iterations": (lambda f: f.pamr(Q, Q, -1), "iterations", "at least 0", "got -1"),
    "pamr-dilations": (lambda f: f.pamr(Q, Q, 1, (8, 0)), "dilations", "at least 1", "(8, 0)"),
    "pamr-no-dilations": (lambda f: f.pamr(Q, Q, 1, ()), "dilations", "not empty", "()"),
    # dims
    "dims-too-large": (lambda f: f.distraction_scores(X, [1, 8]), "dims", "0 .. 7", "[1, 8]"),
    "dims-negative": (lambda f: f.distraction_mask(X, [-1]), "dims", "0 .. 7", "[-1]"),
    "dims-repeated": (lambda f: f.redistribute_embeddings(X, M, [2, 2], (2, 3)), "dims must be distinct", "[2, 2]"),
    "dims-fractional": (lambda f: f.distraction_scores(X, [1.0]), "dims must be a sequence of integers", "[1.0]"),
    "dims-none": (lambda f: f.distraction_mask(X, None), "dims must be a sequence", "None"),
    # numbers and choices
    "threshold-nan": (lambda f: f.distraction_mask(X, [1], math.nan), "threshold must be a number", "nan"),
    "threshold-text": (lambda f: f.distraction_mask(X, [1], "5/d"), "threshold must be a number", "'5/d'"),
    "grid-empty": (lambda f: f.redistribute_embeddings(X, M, [1], (0, 6)), "grid", "at least 1", "(0, 6)"),
    "grid-negative": (lambda f: f.redistribute_embeddings(X, M, [1], (-2, -3)), "grid", "at least 1", "(-2, -3)"),
    "grid-mismatch": (lambda f: f.redistribute_embeddings(X, M, [1], (2, 4)), "grid", "gh * gw = N = 6", "(2, 4)"),
    "grid-length": (lambda f: f.redistribute_embeddings(X, M, [1], (6,)), "grid must be (gh, gw)", "(6,)"),
    "grid-number": (lambda f: f.redistribute_embeddings(X, M, [1], 6), "grid must be (gh, gw)", "got 6"),
    "grid-fractional": (lambda f: f.redistribute_embeddings(X, M, [1], (2.0, 3)), "grid", "integers", "(2.0, 3)"),
    "size-even": (lambda f: f.redistribute_embeddings(X, M, [1], (2, 3), size=4), "size must be an odd", "got 4"),
    "size-one": (lambda f: f.redistribute_embeddings(X, M, [1], (2, 3), size=1), "size", "at least 3", "got 1"),
    "size-fractional": (lambda f: f.redistribute_embeddings(X, M, [1], (2, 3), size=3.0), "size", "integer", "got 3.0"),
    "beta-negative": (lambda f: f.refocused_attention(Q, Q, Q, M, M, -0.1), "beta", "[0, 1]", "got -0.1"),
    "beta-large": (lambda f: f.refocused_attention(Q, Q, Q, M, M, 1.5), "beta", "[0, 1]", "got 1.5"),
    "beta-nan": (lambda f: f.refocused_attention(Q, Q, Q, M, M, math.nan), "beta", "[0, 1]", "got nan"),
    "scale-nan": (lambda f: f.received_attention(Q, Q, scale=math.nan), "scale must be a number", "nan"),
    "scale-text": (lambda f: f.proxy_attention(Q[None], Q, scale="auto"), "scale must be a number", "'auto'"),
    "count-negative": (lambda f: f.key_similarity(Q, S, -1), "count", "at least 0", "got -1"),
    "count-fractional": (lambda f: f.key_similarity(Q, S, 1.0), "count must be an integer", "got 1.0"),
    "count-without-running": (lambda f: f.key_similarity(Q, None, 2), "running", "running None, count 2"),
    "running-without-count": (lambda f: f.key_similarity(Q, S), "running", "running a tensor, count 0"),
    "cut-unknown": (lambda f: f.defocus_mask(S[0], threshold="median"), "threshold", '"mean" or "otsu"', "'median'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_given(impl, case):
    call, *words = ERRORS[case]
    with pytest.raises(ValueError) as error:
        call(impl)
    for word in words:
        assert word in str(error.value)
