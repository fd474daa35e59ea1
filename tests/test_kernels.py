"""The Triton kernels in Triton's interpreter, against the float64 reference.

Run in a process of its own, since Triton reads the variable when it is imported: TRITON_INTERPRET=1 pytest
tests/test_kernels.py, as `make test` does. Buffers that a kernel writes are poisoned with NaN and have guard bands;
inputs lie inside NaN, so that a value read outside of them shows in the result. Every address that a kernel reads or
writes is checked against the tensors of its launch.
"""

import math
import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from rfclip import reference

assert os.environ.get("TRITON_INTERPRET") == "1", "run as TRITON_INTERPRET=1 pytest tests/test_kernels.py"

from rfclip_kernels import attention, cut, distraction, refinement, similarity, upsample  # noqa: E402

# Largest relative RMS error against float64 on the same rounded inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GUARD = 64  # bytes on either side of a written buffer
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))

# B, H, T, D: T below, at and beyond tiles of 64, and head dimensions that are no power of two.
SIZES = [
    (1, 1, 2, 32),
    (2, 3, 17, 64),
    (1, 2, 65, 80),
    (1, 1, 130, 96),
    (1, 2, 64, 128),
    (2, 1, 198, 64),
]
CASES = [(size, dtype) for size in SIZES for dtype in TOLERANCE] + [((1, 1, 600, 64), torch.float32)]
NAMES = ["B{}-H{}-T{}-D{}-{}".format(*size, str(dtype).removeprefix("torch.")) for size, dtype in CASES]
sizes = pytest.mark.parametrize(("size", "dtype"), CASES, ids=NAMES)


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Poison what `new_empty` returns and check afterwards that nothing was written beside it."""
    buffers = []
    original = torch.Tensor.new_empty

    def new_empty(tensor, shape, *, dtype=None, **options):
        if options:  # the interpreter's own, not a kernel's output
            return original(tensor, shape, dtype=dtype, **options)
        dtype = dtype or tensor.dtype
        count = math.prod(shape) * dtype.itemsize
        buffer = torch.full((count + 2 * GUARD,), 0xFF, dtype=torch.uint8)  # NaN in every float dtype
        buffers.append(buffer)
        return buffer[GUARD : GUARD + count].view(dtype).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield buffers
    for buffer in buffers:
        assert (buffer[:GUARD] == 0xFF).all()
        assert (buffer[-GUARD:] == 0xFF).all()


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """Refuse every load and store of a kernel outside of the tensors of its launch, masks and indices too."""
    extents = []
    to_host = GridExecutor._init_args_hst

    def remember(executor, arguments, keywords):
        arguments, keywords = to_host(executor, arguments, keywords)
        tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, torch.Tensor)]
        extents[:] = [
            (
                t.data_ptr(),
                t.data_ptr() + t.itemsize * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))),
            )
            for t in tensors
            if t.numel()
        ]
        return arguments, keywords

    def checked(name):
        original = getattr(InterpreterBuilder, name)

        def access(builder, pointers, *rest):
            mask = rest[0] if name == "create_masked_load" else rest[1]
            used = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
            used = used[np.broadcast_to(mask.data, used.shape).astype(bool)]
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            inside = np.zeros(used.shape, dtype=bool)
            for low, high in extents:
                inside |= (used >= low) & (used + size <= high)
            assert inside.all(), f"{name} outside of every tensor"
            return original(builder, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, access)

    monkeypatch.setattr(GridExecutor, "_init_args_hst", remember)
    checked("create_masked_load")
    checked("create_masked_store")


@triton.jit
def copy_kernel(x_ptr, out_ptr, N, BN: tl.constexpr):
    o_n = tl.arange(0, BN)
    tl.store(out_ptr + o_n, tl.load(x_ptr + o_n, mask=o_n < N), mask=o_n < N)


@pytest.mark.parametrize("lengths", [(5, 4), (4, 5)], ids=["read", "written"])
def test_an_access_outside_of_the_tensors_is_caught(lengths):
    x, out = (torch.zeros(8, dtype=torch.int32)[8 - length :] for length in lengths)
    copy_kernel[(1,)](x, out, 4, BN=8)
    with pytest.raises(InterpreterError, match="outside of every tensor"):
        copy_kernel[(1,)](x, out, 5, BN=8)


def inside_nan(tensor):
    """The same values as a strided view, surrounded by NaN along every axis."""
    padded = torch.full([side + 2 for side in tensor.shape], float("nan"), dtype=tensor.dtype)
    view = padded[tuple(slice(1, -1) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


def randn(*shape, seed, dtype=torch.float32, spread=1.5):
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def masks(B, N, pattern):
    u = torch.rand(B, N, generator=torch.Generator().manual_seed(9))
    every, none, one = torch.ones_like(u) > 0, torch.zeros_like(u) > 0, torch.arange(N).expand(B, N) == N // 2
    return {
        "some": (u < 0.3, u > 0.6),
        "no distraction": (none, u > 0.6),
        "no target": (u < 0.3, none),
        "all distraction": (every, none),
        "all target": (none, every),
        "one and the rest": (one, ~one),
        "the rest and one": (~one, one),
        "overlapping": (u < 0.5, u > 0.2),
    }[pattern]


def check(got, want, dtype):
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert got.isfinite().all()
    error = (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error <= TOLERANCE[dtype], f"relative RMS error {error:.2e}"


def test_the_guards_catch_a_stray_write(guarded):
    torch.zeros(1).new_empty((3,))
    guarded[0][GUARD - 1] = 0
    with pytest.raises(AssertionError):
        assert (guarded[0][:GUARD] == 0xFF).all()
    guarded.clear()


# Distraction ---------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "raw"])
@pytest.mark.parametrize(("B", "N", "d"), [(1, 1, 3), (2, 17, 128), (3, 40, 200)])
def test_distraction(dtype, shifted, B, N, d):
    x = randn(B, N, d, seed=1) + 2
    x[:, ::3, 1] += 60
    x = x.to(dtype)
    want = reference.distraction_scores(x.double(), [1, 2], shifted=shifted)
    got = distraction.distraction_scores(inside_nan(x), [1, 2], shifted=shifted)
    check(got, want, torch.float32)
    clear = (want - 5 / d).abs() > 1e-5
    assert clear.all()
    assert torch.equal(distraction.distraction_mask(inside_nan(x), [1, 2], shifted=shifted), want > 5 / d)
    assert torch.equal(distraction.distraction_mask(x, [1, 2], 0.01, shifted=shifted), want > 0.01)


def test_scores_of_a_large_mean_and_of_equal_values():
    x = randn(1, 20, 256, seed=2) + 1000
    check(distraction.distraction_scores(x, [3]), reference.distraction_scores(x.double(), [3]), torch.float32)
    assert distraction.distraction_scores(torch.full((1, 2, 5), 7.0), [0]).tolist() == [[0.0, 0.0]]
    assert distraction.distraction_scores(x, []).count_nonzero() == 0
    assert not distraction.distraction_mask(x, [], -1.0).any()


@dtypes
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (5, 7)], ids=str)
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("pattern", ["some", "no distraction", "all distraction", "one and the rest"])
def test_redistribution(dtype, grid, size, pattern):
    N = math.prod(grid)
    x, mask = randn(2, N, 20, seed=3, dtype=dtype), masks(2, N, pattern)[0]
    want = reference.redistribute_embeddings(x.double(), mask, [0, 7], grid, size=size)
    got = distraction.redistribute_embeddings(inside_nan(x), mask, [0, 7], grid, size=size)
    check(got, want, dtype)
    view = inside_nan(x)
    assert distraction.redistribute_embeddings(view, mask, [0, 7], grid, size=size, inplace=True) is view
    assert torch.equal(view, got)
    assert view._base.isnan().sum() == view._base.numel() - view.numel()
    untouched = torch.ones(x.shape, dtype=torch.bool)
    untouched[..., [0, 7]] = ~mask[..., None]
    assert torch.equal(got[untouched], x[untouched])


# Attention -----------------------------------------------------------------------------------------------------------


@sizes
def test_refocused_attention(size, dtype):
    B, H, T, D = size
    q, k, v = (randn(*size, seed=seed, dtype=dtype) for seed in range(3))
    dis, target = masks(B, T - 1, "some")
    want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, target, 0.7)
    check(attention.refocused_attention(*map(inside_nan, (q, k, v)), dis, target, 0.7), want, dtype)


@dtypes
@pytest.mark.parametrize(
    "pattern",
    [
        "no distraction",
        "no target",
        "all distraction",
        "all target",
        "one and the rest",
        "the rest and one",
        "overlapping",
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
def test_masks(pattern, beta, dtype):
    q, k, v = (randn(2, 2, 37, 32, seed=seed, dtype=dtype) for seed in range(3))
    dis, target = masks(2, 36, pattern)
    want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, target, beta)
    check(attention.refocused_attention(q, k, v, dis, target, beta), want, dtype)


@pytest.mark.parametrize("target", ["cls", "rest"])
def test_targets_that_hold_cls(target):
    q, k, v = (randn(2, 2, 37, 32, seed=seed) for seed in range(3))
    dis, _ = masks(2, 36, "some")
    cls = torch.ones(2, 1, dtype=torch.bool)
    given = torch.cat([cls, torch.zeros_like(dis) if target == "cls" else ~dis], dim=1)
    want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, given, 0.7)
    check(attention.refocused_attention(q, k, v, dis, given, 0.7), want, torch.float32)


def test_masks_of_any_strides():
    q, k, v = (randn(3, 2, 21, 32, seed=seed) for seed in range(3))
    dis, target = masks(3, 20, "some")
    given = torch.cat([torch.ones(3, 1, dtype=torch.bool), target], dim=1)
    for goal in (target, given):
        want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, goal, 0.7)
        got = attention.refocused_attention(q, k, v, dis.T.contiguous().T, goal.T.contiguous().T, 0.7)
        check(got, want, torch.float32)


def test_images_of_a_batch_keep_their_own_groups():
    q, k, v = (randn(3, 2, 20, 32, seed=seed) for seed in range(3))
    dis, target = masks(3, 19, "some")
    target[1] = False
    dis[2] = False
    batch = attention.refocused_attention(q, k, v, dis, target, 0.7)
    for b in range(3):
        one = [t[b : b + 1] for t in (q, k, v, dis, target)]
        torch.testing.assert_close(attention.refocused_attention(*one, 0.7), batch[b : b + 1], rtol=0, atol=0)


@dtypes
def test_scores_from_minus_sixty_to_sixty(dtype):
    """One query, whose logits run from -60 to 60: the mass on the target can be e^-120 of the row's."""
    T, D = 50, 32
    q, k = torch.zeros(1, 1, T, D), torch.zeros(1, 1, T, D)
    q[..., 0] = 1
    k[0, 0, :, 0] = torch.linspace(-60, 60, T)
    q, k, v = q.to(dtype), k.to(dtype), randn(1, 1, T, D, seed=2, dtype=dtype)
    low, high = torch.arange(T - 1)[None] < 10, torch.arange(T - 1)[None] >= 40
    for dis, target in ((low, high), (high, low)):
        want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, target, 0.7, scale=1.0)
        check(attention.refocused_attention(q, k, v, dis, target, 0.7, scale=1.0), want, dtype)


@pytest.mark.parametrize("L", [1, 3])
@sizes
def test_proxy_attention(size, L, dtype):
    keys, v = randn(L, *size, seed=4, dtype=dtype), randn(*size, seed=5, dtype=dtype)
    want = reference.proxy_attention(keys.double(), v.double())
    check(attention.proxy_attention(inside_nan(keys), inside_nan(v)), want, dtype)


@dtypes
@pytest.mark.parametrize(("grid", "D"), [((1, 1), 32), ((4, 9), 64), ((7, 3), 80), ((9, 16), 32)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_self_attention(grid, D, biased, dtype):
    u, v = (randn(2, 2, math.prod(grid) + 1, D, seed=seed, spread=0.6, dtype=dtype) for seed in (10, 11))
    table = randn(2 * grid[0] - 1, 2 * grid[1] - 1, seed=12) if biased else None
    want = reference.self_attention(u.double(), v.double(), table)
    if biased and grid != (1, 1):
        assert not torch.allclose(want, reference.self_attention(u.double(), v.double()), atol=0.01)
    check(attention.self_attention(inside_nan(u), inside_nan(v), inside_nan(table) if biased else None), want, dtype)


@sizes
def test_key_similarity(size, dtype):
    first, second = (randn(*size, seed=seed, dtype=dtype) for seed in (6, 7))
    want = reference.key_similarity(first.double())
    got = similarity.key_similarity(inside_nan(first))
    check(got, want, torch.float32)
    want = reference.key_similarity(second.double(), want, 1)
    both = similarity.key_similarity(second, got, 1)
    check(both, want, torch.float32)
    view = inside_nan(got)
    assert similarity.key_similarity(second, view, 1, inplace=True) is view
    assert torch.equal(view, both)
    assert view._base.isnan().sum() == view._base.numel() - view.numel()


@sizes
def test_received_attention(size, dtype):
    q, k = (randn(*size, seed=seed, dtype=dtype) for seed in (8, 9))
    want = reference.received_attention(q.double(), k.double())
    check(similarity.received_attention(inside_nan(q), inside_nan(k)), want, torch.float32)


# The graph cut --------------------------------------------------------------------------------------------------------


def clusters(B, grid, dtype=torch.float32):
    """S [B, N, N] of keys in two unequal groups."""
    N = math.prod(grid)
    keys = randn(B, 1, N + 1, 16, seed=0, spread=0.6)
    keys[:, :, : 1 + N // 3, 0] += 3
    keys[:, :, 1 + N // 3 :, 1] += 3
    return reference.key_similarity(keys).to(dtype)


def eigenvalues(S):
    """Of Deg^-1/2 W Deg^-1/2, ascending, [B, N]."""
    W = (S.double() + S.double().mT) / 2
    root = W.sum(dim=-1).rsqrt()
    return torch.linalg.eigvalsh(root[:, :, None] * W * root[:, None, :])


def check_vector(got, similarity, tolerance):
    want = reference.fiedler_vector(similarity.double())
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert (error <= tolerance).all(), error


GRIDS = [((1, 2), torch.bfloat16), ((3, 3), torch.float16), ((5, 7), torch.float16), ((1, 32), torch.bfloat16)]


@pytest.mark.parametrize(("grid", "dtype"), [*GRIDS, ((10, 13), torch.float32), ((15, 20), torch.float32)], ids=str)
def test_fiedler_vector(grid, dtype):
    S = clusters(2, grid, dtype)
    values = eigenvalues(S)
    assert len(S[0]) < 3 or (values[:, -2] - values[:, -3] > 0.15).all()  # resolved
    check_vector(cut.fiedler_vector(inside_nan(S)), S, 2e-5)


def test_a_near_start_ends_nearer():
    keys = randn(1, 1, 101, 16, seed=0, spread=0.7)
    S, before = (reference.key_similarity(k) for k in (keys, keys + 0.05 * randn(1, 1, 101, 16, seed=1)))
    start = reference.fiedler_vector(before)
    with pytest.raises(AssertionError):
        check_vector(start, S, 0.05)
    check_vector(cut.fiedler_vector(S), S, 2e-5)
    check_vector(cut.fiedler_vector(S, start), S, 2e-6)
    several = start.expand(3, -1).T.contiguous().T
    check_vector(cut.fiedler_vector(S.expand(3, -1, -1), several), S.expand(3, -1, -1), 2e-6)


def test_what_fifteen_steps_cannot_resolve():
    """Two eigenvalues less than 0.0015 apart: from nothing the vector is another, from the right one it stays."""
    S = reference.key_similarity(randn(1, 1, 101, 16, seed=0, spread=0.9))
    values = eigenvalues(S)[0]
    assert 0.0001 < values[-2] - values[-3] < 0.0015
    with pytest.raises(AssertionError):
        check_vector(cut.fiedler_vector(S), S, 0.1)
    check_vector(cut.fiedler_vector(S, reference.fiedler_vector(S)), S, 1e-4)


def test_fiedler_vector_of_a_single_patch_and_of_tokens_like_no_other():
    assert cut.fiedler_vector(torch.ones(2, 1, 1)).tolist() == [[0.0], [0.0]]
    S = clusters(2, (3, 4))
    S[:, 5], S[:, :, 5] = 0, 0
    got = cut.fiedler_vector(S)
    check_vector(got, S, 1e-5)
    assert (got[:, 5] == 0).all()
    degree = ((S + S.mT) / 2).sum(dim=-1)
    torch.testing.assert_close((degree * got**2).sum(dim=-1), torch.ones(2))
    assert (got.gather(1, got.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_separate_groups():
    """Without any similarity between two groups the second eigenvalue is 1 as well, and the vector tells them apart."""
    S = torch.block_diag(torch.ones(5, 5), torch.ones(9, 9))[None]
    check_vector(cut.fiedler_vector(S), S, 1e-5)


@dtypes
@pytest.mark.parametrize("threshold", ["mean", "otsu"])
@pytest.mark.parametrize("N", [1, 2, 17, 300])
def test_defocus_mask(N, threshold, dtype):
    y = randn(3, N, seed=13, dtype=dtype)
    y[0] = torch.where(torch.arange(N) % 3 == 0, y[0] + 2, y[0] * 0.1)
    want = reference.defocus_mask(y.double(), threshold=threshold)
    assert N == 1 or want.any(dim=1).all()
    assert torch.equal(cut.defocus_mask(inside_nan(y), threshold=threshold), want)
    equal = cut.defocus_mask(torch.full((1, N), 0.25, dtype=dtype), threshold=threshold)
    assert not equal.any()


def test_packed_projections_are_read_in_place_and_written_as_the_output_projection_reads():
    packed = randn(2, 20, 3 * 64, seed=6)
    q, k, v = packed.unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    dis, target = masks(2, 19, "some")
    got = attention.refocused_attention(q, k, v, dis, target, 0.7)
    assert got.transpose(1, 2).is_contiguous()
    want = reference.refocused_attention(*(t.double() for t in (q, k, v)), dis, target, 0.7)
    check(got, want, torch.float32)
    assert attention.proxy_attention(k[None], v).transpose(1, 2).is_contiguous()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), T=st.integers(2, 70), beta=st.floats(0, 1), spread=st.floats(0.1, 2))
def test_invariants(seed, T, beta, spread):
    """Logits reach about 90 at the largest spread."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (spread * torch.randn(1, 2, T, 32, generator=generator) for _ in range(3))
    u = torch.rand(1, T - 1, generator=generator)
    dis, target = u < 0.3, u > 0.5
    rows = attention.refocused_attention(q, k, torch.ones_like(v), dis, target, beta)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    order = torch.randperm(T - 1, generator=generator)
    tokens = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    out = attention.refocused_attention(q, k, v, dis, target, beta)
    permuted = (*(t[:, :, tokens] for t in (q, k, v)), dis[:, order], target[:, order])
    check(attention.refocused_attention(*permuted, beta), out[:, :, tokens].double(), torch.float32)
    plain = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    check(attention.refocused_attention(q, k, v, dis, target, 0.0), plain, torch.float32)
    check(out[:, :, 0], plain[:, :, 0], torch.float32)
    if target.any():
        hidden = v.clone()
        hidden[0, :, 1:][:, dis[0]] = 1e6
        emptied = attention.refocused_attention(q, k, hidden, dis, target, 1.0)[:, :, 1:]
        want = attention.refocused_attention(q, k, v, dis, target, 1.0)[:, :, 1:]
        check(emptied, want.double(), torch.float32)


# Errors --------------------------------------------------------------------------------------------------------------


def test_what_the_kernels_refuse():
    q, mask = randn(1, 1, 3, 32, seed=0), torch.zeros(1, 2, dtype=torch.bool)
    x = randn(1, 2, 8, seed=0)
    calls = [
        lambda t: attention.refocused_attention(t(q), q.to(t(q).dtype), q.to(t(q).dtype), mask, mask, 0.7),
        lambda t: attention.proxy_attention(t(q)[None], q.to(t(q).dtype)),
        lambda t: attention.self_attention(t(q), q.to(t(q).dtype)),
        lambda t: similarity.key_similarity(t(q)),
        lambda t: similarity.received_attention(t(q), q.to(t(q).dtype)),
        lambda t: distraction.distraction_scores(t(x), [1]),
        lambda t: distraction.distraction_mask(t(x), [1]),
        lambda t: distraction.redistribute_embeddings(t(x), mask, [1], (1, 2)),
        lambda t: cut.fiedler_vector(t(q)[0, :, :3, :3]),
        lambda t: cut.defocus_mask(t(q)[0, 0]),
        lambda t: upsample.average_windows(t(q), [(0, 0)], 2, (2, 2)),
        lambda t: upsample.upsample_argmax(t(x), (2, 2), 1.0, torch.zeros(1, dtype=torch.int64)),
        lambda t: refinement.pamr(t(q), q, 1),
        lambda t: refinement.pamr(q, t(q), 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="is float64: the Triton kernels take.*use the reference"):
            call(torch.Tensor.double)
        with pytest.raises(ValueError, match="requires a gradient.*rfclip.reference"):
            call(lambda t: t.clone().requires_grad_())
        with torch.no_grad():
            call(lambda t: t.clone().requires_grad_())
        with pytest.raises(ValueError, match="must be a floating-point"):
            call(torch.Tensor.int)


def test_heads_too_wide_are_refused():
    q, mask = randn(1, 1, 3, 160, seed=0), torch.zeros(1, 2, dtype=torch.bool)
    for call in (
        lambda: attention.refocused_attention(q, q, q, mask, mask, 0.7),
        lambda: attention.self_attention(q, q),
        lambda: attention.proxy_attention(q[None], q),
        lambda: similarity.key_similarity(q),
        lambda: similarity.received_attention(q, q),
    ):
        with pytest.raises(ValueError, match="at most 128 dimensions, got 160"):
            call()


def test_an_empty_batch():
    q, mask, x = torch.zeros(0, 2, 5, 32), torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0, 4, 8)
    assert attention.refocused_attention(q, q, q, mask, mask, 0.7).shape == (0, 2, 5, 32)
    assert attention.proxy_attention(q[None], q).shape == (0, 2, 4, 32)
    assert attention.self_attention(q, q).shape == (0, 2, 5, 32)
    assert similarity.key_similarity(q).shape == (0, 4, 4)
    assert cut.fiedler_vector(q[:, 0, :4, :4]).shape == (0, 4)
    assert cut.defocus_mask(q[:, 0, :, 0]).shape == (0, 5)
    assert similarity.received_attention(q, q).shape == (0, 4)
    assert distraction.distraction_mask(x, [1]).shape == (0, 4)
    assert distraction.redistribute_embeddings(x, mask, [1], (2, 2)).shape == (0, 4, 8)
    assert refinement.pamr(q, q, 2).shape == (0, 2, 5, 32)
