"""Received, refocused, proxy and self-attention, against brute force."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, assert_matches, differs, dtypes, qkv, score_dtype, some_masks
from helpers import float64, randn
from oracles.operations import (
    brute_aggregated,
    brute_apply,
    brute_cosines,
    brute_plain,
    brute_proxy,
    brute_refocused,
    brute_weights,
)

# Received attention ---------------------------------------------------------------------------------------------------


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


# Refocused attention --------------------------------------------------------------------------------------------------


def over_all_tokens(target, cls):
    return torch.cat([torch.full_like(target[:, :1], cls), target], dim=1)


def target_patterns(B, N):
    """Pairs of masks by name, each with whether redistribution has an effect there."""
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
    """Query 3 gives the tokens of one mask a weight that underflows to 0; the other rows are still redistributed."""
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
    """omega / mass would overflow in float32; the target still receives the whole budget."""
    q = torch.zeros(1, 1, 4, 1)
    k = torch.zeros(1, 1, 4, 1)
    q[..., 2, :], k[..., 3, :] = 1, -95  # exp(-95) is 5e-42
    v = torch.tensor([1.0, 2.0, 0.0, 64.0]).reshape(1, 1, 4, 1)
    distraction, target = torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])
    mass = torch.softmax(q @ k.mT, dim=-1)[0, 0, 2, 3]
    assert mass > 0 and torch.isinf(0.2 / mass)
    got = impl.refocused_attention(q, k, v, distraction, target, 0.6)
    assert got[0, 0, 2].item() == pytest.approx(1 / 3 + 0.4 * 2 / 3 + 0.6 * 64 / 3, rel=1e-5)


# Dense prediction -----------------------------------------------------------------------------------------------------


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
        assert_matches(impl.self_attention(u, u, v), brute_plain(u, u, v), dtype)
        return
    bias = randn(2 * gh - 1, 2 * gw - 1, seed=8, dtype=score_dtype(dtype))
    weights = brute_weights(u, u).log()
    for i, j in product(range(1, T), range(1, T)):
        down, right = (i - 1) // gw - (j - 1) // gw, (i - 1) % gw - (j - 1) % gw
        weights[..., i, j] += bias[down + gh - 1, right + gw - 1]
    want = brute_apply(weights.softmax(dim=-1), v)
    assert T == 2 or differs(want, brute_plain(u, u, v))
    assert_matches(impl.self_attention(u, u, v, bias), want, dtype)


@dtypes()
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
def test_self_attention_is_added(impl, dtype, inplace):
    q, k, v = qkv(3, 2, 8, 6, dtype)
    bias, scale = randn(3, 7, 7, seed=8, dtype=dtype), torch.tensor([0.2, 0.0, -1.5], dtype=score_dtype(dtype))
    out = randn(3, 2, 8, 6, seed=9, dtype=dtype)
    logits = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * scale.double()[:, None, None, None]
    for b, i, j in product(range(3), range(7), range(7)):
        logits[b, :, 1 + i, 1 + j] += bias[b, i, j].double()
    gathered = logits.softmax(dim=-1) @ v.double()
    before = out.clone()
    want = before.double() - 0.7 * gathered
    got = impl.self_attention(q, k, v, bias, scale=scale, factor=-0.7, out=out, inplace=inplace)
    assert_matches(got, want.to(score_dtype(dtype)), dtype)
    assert (got is out) is inplace
    assert inplace or torch.equal(out, before)
    got = impl.self_attention(q, k, v, bias, scale=scale, factor=-0.7)
    assert_matches(got, (-0.7 * gathered).to(score_dtype(dtype)), dtype)


# Sums over similar patches --------------------------------------------------------------------------------------------


@dtypes()
@pytest.mark.parametrize("N, d, e", [(1, 3, 2), (9, 4, 7), (20, 3, 5)])
@pytest.mark.parametrize("cut", [0.4, -0.2])
def test_cosine_aggregation(impl, dtype, N, d, e, cut):
    guide, x = randn(2, N, d, seed=4, dtype=dtype), randn(2, N, e, seed=5, dtype=dtype)
    cosines = brute_cosines(guide)
    assert ((cosines - cut).abs() > 1e-6).all()  # or else rounding might decide
    want = brute_aggregated(cosines, x, cut)
    assert N == 1 or differs(want, brute_aggregated(cosines, x, -1.5)) and differs(want, x)
    assert_matches(impl.cosine_aggregation(guide, x, cut), want, dtype)


@dtypes()
@pytest.mark.parametrize("N, d, e", [(1, 3, 2), (9, 4, 7), (20, 3, 5)])
def test_cosine_aggregation_with_a_gain(impl, dtype, N, d, e):
    guide, x = randn(2, N, d, seed=4, dtype=dtype), randn(2, N, e, seed=5, dtype=dtype)
    guide[1, 0] = 0  # whose cosines are 0, also that with itself, which counts all the same
    cosines, cuts = brute_cosines(guide), [0.2, 1.5]
    want = torch.zeros(2, N, e, dtype=torch.float64)
    for b, i in product(range(2), range(N)):
        kept = [j for j in range(N) if cosines[b, i, j] >= cuts[b] or j == i]
        shares = torch.stack([cosines[b, i, j] for j in kept]).mul(3).exp()
        want[b, i] = sum(share * x[b, j].double() for share, j in zip(shares, kept, strict=True)) / shares.sum()
    got = impl.cosine_aggregation(guide, x, torch.tensor(cuts, dtype=score_dtype(dtype)), gain=3)
    assert_matches(got, want.to(score_dtype(dtype)), dtype)
    assert_matches(got[1], x[1].to(score_dtype(dtype)), dtype)  # no other patch counts
    assert_matches(impl.cosine_aggregation(guide[:1], x[:1], 0.2, gain=3), want[:1].to(score_dtype(dtype)), dtype)


@dtypes()
def test_a_cosine_equal_to_the_cut_counts(impl, dtype):
    guide = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, -1], [1, -1, 1, -1], [0, 0, 0, 0]]], dtype=dtype)
    x = torch.tensor([[[1], [10], [100], [1000]]], dtype=dtype)
    got = impl.cosine_aggregation(guide, x, 0.5)  # cosines 1 / 2, 0 and, of zeros, 0
    assert got.flatten().tolist() == [6.0, 60.5, 105.0, 0.0]
    assert impl.cosine_aggregation(guide, x, 0.51).flatten().tolist() == [1.0, 10.0, 100.0, 0.0]
