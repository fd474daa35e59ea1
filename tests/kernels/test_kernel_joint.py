"""The kernels of the joint criterion: received attention, and the repair of the tokens that meet it."""

import math

import pytest
import torch
from kernel_cases import DEVICE, check, dtypes, inside_nan, one_dtype_each, randn, sizes

import rfclip_kernels
from rfclip import reference

DIMS = [3, 40]
PATTERNS = ["none", "one", "some", "all"]


def marked(B, N, pattern):
    """Patches of each image, bool [B, N]."""
    u = torch.rand(B, N, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    one = torch.arange(N, device=DEVICE).expand(B, N) == N - 1
    return {"none": u < 0, "one": one, "some": u < 0.3, "all": u >= 0}[pattern]


def joint(grid, candidates, dtype=torch.float32, d=48, D=32, threshold=1.0):
    """The arguments of `joint_repair`, by name, on an image of each row of the candidates."""
    B, N = candidates.shape
    x, y = (randn(B, N + 1, d, seed=seed, dtype=dtype) for seed in (1, 2))
    q, k = (randn(B, 2, N + 1, D, seed=seed, dtype=dtype) for seed in (3, 4))
    weight, bias = (randn(d, seed=seed) for seed in (5, 6))
    inputs = {"x": x, "y": y, "before": x[:, 1:][..., DIMS], "candidates": candidates, "q": q, "k": k}
    return inputs | {"weight": weight, "bias": bias, "dims": DIMS, "threshold": threshold / (N + 1), "grid": grid}


def exact(inputs):
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@sizes
def test_received_attention(size, dtype):
    q, k = (randn(*size, seed=seed, dtype=dtype) for seed in (8, 9))
    want = reference.received_attention(q.double(), k.double())
    check(rfclip_kernels.received_attention(inside_nan(q), inside_nan(k)), want, torch.float32)


@one_dtype_each(pattern=PATTERNS, grid=[(1, 1), (1, 9), (5, 7), (9, 11)])
def test_joint_repair(dtype, pattern, grid):
    N = math.prod(grid)
    candidates = marked(3, N, pattern)
    candidates[1] = False  # an image without, between others
    inputs = joint(grid, candidates, dtype)
    want = reference.joint_repair(**exact(inputs))
    given = {
        name: value if name in ("candidates", "dims", "grid", "threshold") else inside_nan(value)
        for name, value in inputs.items()
    }
    got = rfclip_kernels.joint_repair(**given)
    for one, other in zip(got[:2], want[:2], strict=True):
        check(one, other, dtype)
    assert torch.equal(got[2], want[2])
    if N > 30 and pattern in ("some", "all"):
        assert 0 < got[2].sum() < candidates.sum()
    kept = ~torch.nn.functional.pad(got[2], (1, 0))
    assert torch.equal(got[0][kept], inputs["x"][kept]) and torch.equal(got[1][kept], inputs["y"][kept])
    others = [j for j in range(inputs["x"].shape[2]) if j not in DIMS]
    assert torch.equal(got[0][..., others], inputs["x"][..., others])
    views = {name: inside_nan(inputs[name]) for name in ("x", "y")}
    back = rfclip_kernels.joint_repair(**inputs | views, inplace=True)
    for name, one, other in zip("xy", got, back, strict=False):
        assert other is views[name] and torch.equal(one, other)
        assert other._base.isnan().sum() == other._base.numel() - other.numel()


def test_many_candidates():
    """More than a program lists at a time, and than one adds up at a time."""
    grid = 20, 30
    inputs = joint(grid, marked(1, 600, "some"))
    want, got = reference.joint_repair(**exact(inputs)), rfclip_kernels.joint_repair(**inputs)
    assert torch.equal(got[2], want[2]) and 0 < got[2].sum() < inputs["candidates"].sum()
    for one, other in zip(got[:2], want[:2], strict=True):
        check(one, other, torch.float32)


def test_the_repair_is_that_of_its_parts():
    inputs = joint((5, 7), marked(2, 35, "some"))
    x, y, mask = rfclip_kernels.joint_repair(**inputs)
    received = rfclip_kernels.received_attention(inputs["q"], inputs["k"])
    assert torch.equal(mask, inputs["candidates"] & (received > inputs["threshold"]))
    patches = rfclip_kernels.redistribute_embeddings(inputs["x"][:, 1:], mask, DIMS, (5, 7))
    assert torch.equal(x[:, 1:], patches)
    zero = torch.zeros_like(x)
    normed = rfclip_kernels.add_layer_norm(x, zero, inputs["weight"], inputs["bias"])[1]
    assert torch.equal(y[:, 1:][mask], normed[:, 1:][mask])


def test_an_image_without_candidates_costs_nothing():
    """Its queries and keys are not even read, and neither is the projection where no token changed."""
    candidates = marked(2, 35, "some")
    candidates[0] = False
    inputs = joint((5, 7), candidates)
    want = rfclip_kernels.joint_repair(**inputs)
    inputs["q"][0] = inputs["k"][0] = float("nan")
    for one, other in zip(rfclip_kernels.joint_repair(**inputs), want, strict=True):
        assert torch.equal(one, other)
    assert not want[2][0].any() and want[2][1].any()
    y, out = inputs["y"], randn(2, 36, 20, seed=3)
    y[0] = float("nan")
    got = rfclip_kernels.project_tokens(y, want[2], randn(20, 48, seed=4), None, out)
    assert torch.equal(got[0], out[0]) and got.isfinite().all() and not torch.equal(got[1], out[1])


@dtypes
def test_a_batch_equals_its_images(dtype):
    candidates = marked(3, 70, "some")
    candidates[1] = False
    inputs = joint((7, 10), candidates, dtype)
    batch = rfclip_kernels.joint_repair(**inputs)
    layer = {"weight": randn(50, 48, seed=7, dtype=dtype), "bias": randn(50, seed=8, dtype=dtype)}
    out = randn(3, 71, 50, seed=9, dtype=dtype)
    projected = rfclip_kernels.project_tokens(batch[1], batch[2], **layer, out=out)
    for b in range(3):
        names = ("x", "y", "before", "candidates", "q", "k")
        one = rfclip_kernels.joint_repair(**inputs | {name: inputs[name][b : b + 1] for name in names})
        for alone, together in zip(one, batch, strict=True):
            assert torch.equal(alone, together[b : b + 1])
        alone = rfclip_kernels.project_tokens(one[1], one[2], **layer, out=out[b : b + 1])
        assert torch.equal(alone, projected[b : b + 1])


@one_dtype_each(pattern=PATTERNS, sizes=[(1, 5, 3, 1), (40, 70, 130, 0), (150, 128, 64, 5)])
def test_project_tokens(dtype, pattern, sizes):
    N, d, e, prefix = sizes
    y, out = randn(2, N + prefix, d, seed=1, dtype=dtype), randn(2, N + prefix, e, seed=2, dtype=dtype)
    weight, bias = randn(e, d, seed=3, dtype=dtype), randn(e, seed=4, dtype=dtype)
    mask = marked(2, N, pattern)
    for given in (bias, None):
        exactly = [None if t is None else t.double() for t in (y, weight, given, out)]
        want = reference.project_tokens(exactly[0], mask, *exactly[1:], prefix=prefix)
        padded = None if given is None else inside_nan(given)
        got = rfclip_kernels.project_tokens(
            inside_nan(y), mask.T.contiguous().T, inside_nan(weight), padded, inside_nan(out), prefix=prefix
        )
        check(got, want, dtype)
        kept = ~torch.nn.functional.pad(mask, (prefix, 0))
        assert torch.equal(got[kept], out[kept])
    view = inside_nan(out)
    assert rfclip_kernels.project_tokens(y, mask, weight, None, view, prefix=prefix, inplace=True) is view
    assert torch.equal(view, got)
    assert view._base.isnan().sum() == view._base.numel() - view.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_projection_under_autocast(dtype, other):
    """Its factors are rounded to the dtype of what the linear layer returned."""
    y, weight, bias = randn(1, 9, 40, seed=1, dtype=other), randn(30, 40, seed=2), randn(30, seed=3)
    out, mask = randn(1, 9, 30, seed=4, dtype=dtype), marked(1, 8, "some")
    got = rfclip_kernels.project_tokens(y, mask, weight, bias, out)
    rounded = (t.to(dtype).double() for t in (y, weight))
    want = torch.nn.functional.linear(*rounded, bias.double())
    check(got[:, 1:][mask], want[:, 1:][mask], dtype)
