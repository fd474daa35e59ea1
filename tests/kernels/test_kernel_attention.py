"""The attention kernels against the float64 reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, check, dtypes, inside_nan, masks, one_dtype_each, randn, sizes

import rfclip_kernels
from rfclip import reference


@sizes
def test_refocused_attention(size, dtype):
    B, H, T, D = size
    q, k, v = (randn(*size, seed=seed, dtype=dtype) for seed in range(3))
    dis, target = masks(B, T - 1, "some")
    want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, target, 0.7)
    check(rfclip_kernels.refocused_attention(*map(inside_nan, (q, k, v)), dis, target, 0.7), want, dtype)


@one_dtype_each(
    pattern=[
        "no distraction",
        "no target",
        "all distraction",
        "all target",
        "one and the rest",
        "the rest and one",
        "overlapping",
    ],
    beta=[0.0, 0.7, 1.0],
)
def test_masks(dtype, pattern, beta):
    q, k, v = (randn(2, 2, 37, 32, seed=seed, dtype=dtype) for seed in range(3))
    dis, target = masks(2, 36, pattern)
    want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, target, beta)
    check(rfclip_kernels.refocused_attention(q, k, v, dis, target, beta), want, dtype)


@pytest.mark.parametrize("target", ["cls", "rest"])
def test_targets_that_hold_cls(target):
    q, k, v = (randn(2, 2, 37, 32, seed=seed) for seed in range(3))
    dis, _ = masks(2, 36, "some")
    cls = torch.ones_like(dis[:, :1])
    given = torch.cat([cls, torch.zeros_like(dis) if target == "cls" else ~dis], dim=1)
    want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, given, 0.7)
    check(rfclip_kernels.refocused_attention(q, k, v, dis, given, 0.7), want, torch.float32)


def test_masks_of_any_strides():
    q, k, v = (randn(3, 2, 21, 32, seed=seed) for seed in range(3))
    dis, target = masks(3, 20, "some")
    given = torch.cat([torch.ones_like(target[:, :1]), target], dim=1)
    for goal in (target, given):
        want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, goal, 0.7)
        got = rfclip_kernels.refocused_attention(q, k, v, dis.T.contiguous().T, goal.T.contiguous().T, 0.7)
        check(got, want, torch.float32)


def test_images_of_a_batch_keep_their_own_groups():
    q, k, v = (randn(3, 2, 20, 32, seed=seed) for seed in range(3))
    dis, target = masks(3, 19, "some")
    target[1] = False
    dis[2] = False
    batch = rfclip_kernels.refocused_attention(q, k, v, dis, target, 0.7)
    for b in range(3):
        one = [t[b : b + 1] for t in (q, k, v, dis, target)]
        torch.testing.assert_close(rfclip_kernels.refocused_attention(*one, 0.7), batch[b : b + 1], rtol=0, atol=0)


@dtypes
def test_scores_from_minus_sixty_to_sixty(dtype):
    """All queries are alike, with logits from -60 to 60: the mass on the target can be e^-120 of the row's."""
    T, D = 50, 32
    v = randn(1, 1, T, D, seed=2, dtype=dtype)
    q, k, patch = torch.zeros_like(v), torch.zeros_like(v), torch.arange(T - 1, device=DEVICE)[None]
    q[..., 0] = 1
    k[0, 0, :, 0] = torch.linspace(-60, 60, T)
    low, high = patch < 10, patch >= 40
    for dis, target in ((low, high), (high, low)):
        want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, target, 0.7, scale=1.0)
        check(rfclip_kernels.refocused_attention(q, k, v, dis, target, 0.7, scale=1.0), want, dtype)


def test_scales_of_zero_and_nan():
    """Without a scale all logits are alike, and what is not a number gives none."""
    q, k, v = (randn(2, 1, 37, 32, seed=seed) for seed in range(3))
    dis, target = masks(2, 36, "some")
    want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, target, 0.7, scale=0.0)
    check(rfclip_kernels.refocused_attention(q, k, v, dis, target, 0.7, scale=0.0), want, torch.float32)
    got = rfclip_kernels.self_attention(q, k, v, scale=torch.tensor([0.0, math.nan], device=DEVICE))
    check(got[0], v[0].double().mean(dim=1, keepdim=True).expand_as(v[0]), torch.float32)
    assert got[1].isnan().all()


def test_packed_projections_are_read_in_place_and_written_as_the_output_projection_reads():
    packed = randn(2, 20, 3 * 64, seed=6)
    q, k, v = packed.unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    dis, target = masks(2, 19, "some")
    got = rfclip_kernels.refocused_attention(q, k, v, dis, target, 0.7)
    assert got.transpose(1, 2).is_contiguous()
    want = reference.refocused_attention(*(t.double() for t in (q, k, v)), dis, target, 0.7)
    check(got, want, torch.float32)
    assert rfclip_kernels.proxy_attention(k[None], v).transpose(1, 2).is_contiguous()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), T=st.integers(2, 70), beta=st.floats(0, 1), spread=st.floats(0.1, 2))
def test_invariants(seed, T, beta, spread):
    """Logits reach about 90 at the largest spread."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (spread * torch.randn(1, 2, T, 32, generator=generator).to(DEVICE) for _ in range(3))
    u = torch.rand(1, T - 1, generator=generator).to(DEVICE)
    dis, target = u < 0.3, u > 0.5
    rows = rfclip_kernels.refocused_attention(q, k, torch.ones_like(v), dis, target, beta)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    order = torch.randperm(T - 1, generator=generator).to(DEVICE)
    tokens = torch.cat([torch.zeros_like(order[:1]), order + 1])
    out = rfclip_kernels.refocused_attention(q, k, v, dis, target, beta)
    permuted = (*(t[:, :, tokens] for t in (q, k, v)), dis[:, order], target[:, order])
    check(rfclip_kernels.refocused_attention(*permuted, beta), out[:, :, tokens].double(), torch.float32)
    plain = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    check(rfclip_kernels.refocused_attention(q, k, v, dis, target, 0.0), plain, torch.float32)
    check(out[:, :, 0], plain[:, :, 0], torch.float32)
    if target.any():
        hidden = v.clone()
        hidden[0, :, 1:][:, dis[0]] = 1e6
        emptied = rfclip_kernels.refocused_attention(q, k, hidden, dis, target, 1.0)[:, :, 1:]
        want = rfclip_kernels.refocused_attention(q, k, v, dis, target, 1.0)[:, :, 1:]
        check(emptied, want.double(), torch.float32)


@pytest.mark.parametrize("L", [1, 3])
@sizes
def test_proxy_attention(size, L, dtype):
    keys, v = randn(L, *size, seed=4, dtype=dtype), randn(*size, seed=5, dtype=dtype)
    want = reference.proxy_attention(keys.double(), v.double())
    check(rfclip_kernels.proxy_attention(inside_nan(keys), inside_nan(v)), want, dtype)


@dtypes
@pytest.mark.parametrize(("grid", "D"), [((1, 1), 32), ((4, 9), 64), ((7, 3), 80), ((9, 16), 32)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_self_attention(grid, D, biased, dtype):
    u, v = (randn(2, 2, math.prod(grid) + 1, D, seed=seed, spread=0.6, dtype=dtype) for seed in (10, 11))
    table = randn(2 * grid[0] - 1, 2 * grid[1] - 1, seed=12) if biased else None
    wide = u.double(), u.double(), v.double()
    want = reference.self_attention(*wide, table)
    if biased and grid != (1, 1):
        assert not torch.allclose(want, reference.self_attention(*wide), atol=0.01)
    u, v = inside_nan(u), inside_nan(v)
    check(rfclip_kernels.self_attention(u, u, v, inside_nan(table) if biased else None), want, dtype)


@one_dtype_each(bias_dtype=[torch.float32, torch.float16], prefix=[0, 1, 5])
def test_self_attention_is_added(dtype, bias_dtype, prefix):
    """To memory of any strides, of which nothing else is written."""
    (B, H, N, D), T = (3, 2, 70, 48), 70 + prefix
    q, k, v, start = (randn(B, H, T, D, seed=seed, spread=0.6, dtype=dtype) for seed in range(20, 24))
    bias = randn(B, N, N, seed=24, dtype=bias_dtype)
    scale = torch.tensor([0.1, 0.4, -0.3], device=DEVICE)
    options = {"scale": scale, "prefix": prefix, "factor": -0.7}
    wide = {"out": start.double(), **options}
    want = reference.self_attention(q.double(), k.double(), v.double(), bias.double(), **wide)
    without = reference.self_attention(q.double(), k.double(), v.double(), **wide)
    assert not torch.allclose(want, without, atol=0.01)
    out = inside_nan(start)
    around = out._base.clone()
    given = [inside_nan(tensor) for tensor in (q, k, v, bias)]
    got = rfclip_kernels.self_attention(*given, out=out, inplace=True, **options | {"scale": inside_nan(scale)})
    check(got, want, dtype)
    assert got is out
    around[tuple(slice(1, -1) for _ in out.shape)] = out
    assert torch.equal(around.nan_to_num(7.5), out._base.nan_to_num(7.5))
    got = rfclip_kernels.self_attention(q, k, v, bias, out=start, **options)
    assert got is not start and torch.equal(got, out)
