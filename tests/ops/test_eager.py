"""The fast PyTorch backend on shapes of real towers, against the float64 reference.

The other tests in this folder cover it on small shapes.
"""

import pytest
import torch
from helpers import assert_close, clear_threshold, relative_error
from scene_cuts import cuts_of_scenes
from small_models import DIMS, pictures, small_clip

import rfclip
from rfclip import reference
from rfclip.methods.cosines import cosines
from rfclip.ops import eager as implementation
from rfclip.ops import operations
from rfclip.ops.dispatch import REFERENCE

eager = operations("eager")

SIZES = [(1, 12, 197, 64), (2, 3, 258, 80), (1, 2, 700, 32)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "B{}-H{}-T{}-D{}".format(*s))


def randn(*shape, seed):  # drawn in float32
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(got, want, tolerance=1e-5):
    assert_close(got, want, tolerance)


def packed(size, seed=0):
    B, H, T, D = size
    return randn(B, T, 3 * H * D, seed=seed).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind()


@pytest.fixture(params=["matrix", "flash", "tiles", "compiled"])
def path(request, monkeypatch):
    """Refocused attention of groups, in one matrix or merged, and the ways of other devices and of compilers."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param == "compiled")
    monkeypatch.setattr(implementation, "FLASH_TOKENS", 1 if request.param == "flash" else 1 << 20)
    return request.param


@sizes
@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
def test_refocused_attention(path, size, beta):
    q, k, v = packed(size)
    q.requires_grad_(path == "tiles")
    u = torch.rand(size[0], size[2] - 1, generator=torch.Generator().manual_seed(1))
    for dis, target in ((u < 0.3, u > 0.6), (u < 0.3, u < 0), (u < 0, u > 0.6), (u < 0.05, u >= 0.05), (u < 2, u < 0)):
        want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, target, beta).detach()
        check(eager.refocused_attention(q, k, v, dis, target, beta).detach(), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_refocused_attention_in_other_dtypes(path, dtype):
    q, k, v = (t.to(dtype) for t in packed((2, 3, 50, 16)))
    dis = torch.arange(98).view(49, 2).T % 7 == 0
    target = torch.arange(98).view(49, 2).T % 3 == 1
    dis[1], target[1] = False, torch.arange(49) == 5  # one image without distraction
    want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, target, 0.7)
    for queries in (q, q.mT.contiguous().mT):
        got = eager.refocused_attention(queries.requires_grad_(path == "tiles"), k, v, dis, target, 0.7)
        check(got.detach(), want, {torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype])


def test_a_target_with_cls(path):
    q, k, v = packed((2, 2, 50, 16))
    q.requires_grad_(path == "tiles")
    dis = torch.rand(2, 49, generator=torch.Generator().manual_seed(1)) < 0.3
    for target in (torch.zeros_like(dis), ~dis):
        target = torch.nn.functional.pad(target, (1, 0), value=True)
        want = reference.refocused_attention(q.double(), k.double(), v.double(), dis, target, 0.7).detach()
        check(eager.refocused_attention(q, k, v, dis, target, 0.7).detach(), want)


@sizes
def test_attention_of_keys(size):
    q, k, v = packed(size)
    check(eager.received_attention(q, k), reference.received_attention(q.double(), k.double()))
    check(eager.self_attention(q, k, v), reference.self_attention(*(t.double() for t in (q, k, v))))
    first, second = reference.key_similarity(q.double()), None
    second = reference.key_similarity(k.double(), first, 1)
    got = eager.key_similarity(q)
    check(got, first)
    check(eager.key_similarity(k, got, 1), second)


@pytest.fixture(params=[(1, 32, 1), (1, 32, 2), (1 << 15, 50, 3), (1 << 19, 320, 1), "compiled"], ids=str)
def tile(request, monkeypatch):
    """Tiles of a few rows, of one head, of several for as many threads, and of all; and the path for compilers."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param == "compiled")
    if request.param != "compiled":
        size, rows, threads = request.param
        monkeypatch.setattr(implementation, "TILE", size)
        monkeypatch.setattr(implementation, "ROWS", rows)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


@pytest.mark.parametrize("size", [(2, 5, 130, 32), (1, 2, 197, 64), (1, 1, 700, 16)], ids=str)
@pytest.mark.parametrize("L", [2, 3, 5])
def test_proxy_attention_of_layers(tile, size, L):
    keys, v = torch.stack([packed(size, seed=seed)[1] for seed in range(L)]), packed(size)[2]
    for prefix in (0, 1, 3):
        want = reference.proxy_attention(keys.double(), v.double(), prefix=prefix)
        check(eager.proxy_attention(keys, v, prefix=prefix), want)


@pytest.mark.parametrize("N", [33, 196, 600])
def test_cosine_aggregation(tile, N):
    guide, x = randn(2, N, 48, seed=0) + 0.8, randn(2, N, 96, seed=1)
    cut = clear_threshold(cosines(guide.double()))
    check(eager.cosine_aggregation(guide, x, cut), reference.cosine_aggregation(guide.double(), x.double(), cut))


@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_blend_embeddings(tile, share):
    x = randn(2, 589, 96, seed=0)[:, 1:]
    mask = torch.rand(2, 588, generator=torch.Generator().manual_seed(1)) < share
    check(eager.blend_embeddings(x, mask, (21, 28)), reference.blend_embeddings(x.double(), mask, (21, 28)))


@sizes
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_the_running_average(monkeypatch, size, budget):
    q, k, v = packed(size)
    keys = torch.stack([q, k, v])
    want = reference.proxy_attention(keys.double(), v.double())
    check(eager.proxy_attention(keys, v), want)
    monkeypatch.setattr(implementation, "HEADS_BUDGET", budget)
    average = eager.key_average(layers=3, similar=2, gathers=True, prefix=1)
    for key in keys:
        average.add(key)
    assert (average._heads is None) == (budget == 0)
    assert len(average.keys) == (3 if budget == 0 else 1)
    check(average.gather(v), want)
    first = reference.key_similarity(q.double())
    check(average.similarity, reference.key_similarity(k.double(), first, 1))


def clusters(B, N, noise):
    keys = noise * randn(B, 1, N + 1, 16, seed=0)
    keys[:, :, : 1 + N // 3, 0] += 3
    keys[:, :, 1 + N // 3 :, 1] += 3
    return reference.key_similarity(keys)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("N", [2, 17, 196, 588])
def test_fiedler_vector(monkeypatch, N, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    S = clusters(2, N, noise=0.4)
    want = reference.fiedler_vector(S.double())
    for start in (None, reference.fiedler_vector(clusters(2, N, noise=0.5))):
        got = eager.fiedler_vector(S, start)
        check(got, want, 2e-5)
        assert torch.equal(reference.defocus_mask(got), reference.defocus_mask(want))


def test_masks_of_scenes(monkeypatch):
    """Next to each other lie the first eigenvalues of scenes with several objects, and only exact vectors tell."""
    _, _, target, want = cuts_of_scenes(monkeypatch, range(16))
    assert len(target) == 64 and (target != want).float().mean() < 0.001


@pytest.mark.parametrize("budget", [0, 1 << 30])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tau_attn": 1.0}, {"layers": (2, 3)}, {"target": "rest"}, {"similarity": "vv"}, {"cut_threshold": "otsu"}],
    ids=str,
)
def test_towers(monkeypatch, changes, budget):
    config = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0, **changes)
    images = pictures(height=40)
    monkeypatch.setattr(implementation, "HEADS_BUDGET", budget)
    found = {}
    for backend, dtype in (("reference", torch.float64), ("eager", torch.float32)):
        model = small_clip(dtype=dtype)
        with rfclip.refocus(model, config, backend=backend), torch.inference_mode():
            found[backend] = [rfclip.dense_features(model, images.to(dtype)), model.encode_image(images.to(dtype))]
    for got, want in zip(found["eager"], found["reference"], strict=True):
        check(got, want)


@pytest.mark.parametrize("method", ["rf-clip", "released"])
def test_gradients_are_those_of_the_reference(method):
    config, found = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0), {}
    for backend in ("reference", "eager"):
        model, images = small_clip(), pictures().requires_grad_()
        with rfclip.refocus(model, config, method=method, backend=backend):
            rfclip.dense_features(model, images).square().sum().backward()
        found[backend] = {name: p.grad for name, p in model.visual.named_parameters() if p.grad is not None}
    assert found["eager"].keys() == found["reference"].keys()
    for name, want in found["reference"].items():
        torch.testing.assert_close(found["eager"][name], want, rtol=1e-6, atol=1e-6 * want.abs().max().item())


def test_bf16_autocast():
    """Under autocast, the tower on the fast backend is about as close to float64 as on the reference."""
    config, images = rfclip.RefocusConfig(distraction_dims=DIMS, tau=3.0), pictures()
    model, errors = small_clip(dtype=torch.float32), {}
    with rfclip.refocus(small := small_clip(), config, backend="reference"), torch.inference_mode():
        want = rfclip.dense_features(small, images)
    for backend in ("reference", "eager"):
        with (
            rfclip.refocus(model, config, backend=backend),
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
        ):
            got = rfclip.dense_features(model, images.float())
        errors[backend] = relative_error(got, want)
    assert errors["eager"] <= 1.5 * errors["reference"] < 0.2


def test_what_it_borrows():
    own = set(implementation.__all__)
    assert eager.borrowed == sorted(REFERENCE.keys() - own)
    for name in REFERENCE:
        assert eager._run[name] is (getattr(implementation, name) if name in own else REFERENCE[name])
