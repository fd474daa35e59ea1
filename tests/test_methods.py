"""Every method against its formula, written once more here, image by image and head by head in float64."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from towers import DIMS, pictures, small_clip

import rfclip
from rfclip import methods
from rfclip.methods import METHODS
from rfclip.tower import read_tower

CONFIG = rfclip.RefocusConfig(distraction_dims=DIMS)
SIZES = [(56, 56), (40, 40), (24, 80), (8, 8), (8, 24)]  # the first is native


@pytest.fixture(autouse=True)
def dino(monkeypatch):
    """A small random DINO in the place of the one that has to be downloaded."""
    made = small_dino(4)
    monkeypatch.setattr(methods, "load_dino", lambda: made)
    return made


def small_dino(patch):
    torch.manual_seed(3)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(img_size=8 * patch, patch_size=patch, **sizes, dynamic_img_size=True).eval().double()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tower(dtype=torch.float64, layers=12):
    model = small_clip(layers=layers, image_size=56, dtype=dtype)
    model.visual.image_mean, model.visual.image_std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    return model


def features(name, model, images, backend="auto"):
    config = CONFIG if METHODS[name].configured else None
    with rfclip.refocus(model, config, method=name, backend=backend):
        return rfclip.dense_features(model, images)


# The formulas --------------------------------------------------------------------------------------------------------


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Plain:
    """The plain tower on one image, by open_clip's own blocks; numpy outside."""

    def __init__(self, model, image):
        self.visual = visual = model.visual
        x = visual.conv1(image[None])
        self.grid = tuple(x.shape[2:])
        positions = visual.positional_embedding
        if self.grid != tuple(visual.grid_size):
            planes = positions[1:].reshape(1, *visual.grid_size, -1).permute(0, 3, 1, 2)
            planes = F.interpolate(planes, size=self.grid, mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:1], planes[0].flatten(1).T])
        x = torch.cat([visual.class_embedding[None, None], x.flatten(2).transpose(1, 2)], dim=1) + positions
        self.F = [visual.ln_pre(x)]
        for block in visual.transformer.resblocks:
            self.F.append(block(self.F[-1]))
        self.F = [x[0].numpy() for x in self.F]
        self.L = len(self.F) - 1

    def block(self, n):
        return self.visual.transformer.resblocks[n - 1]

    def ln_1(self, n, x):
        return self.block(n).ln_1(torch.from_numpy(x)).numpy()

    def qkv(self, n, x):
        """q, k, v of every head, [3, H, T, D], of the input of block n."""
        attn = self.block(n).attn
        packed = self.ln_1(n, x) @ attn.in_proj_weight.numpy().T + attn.in_proj_bias.numpy()
        return packed.reshape(len(x), 3, attn.num_heads, -1).transpose(1, 2, 0, 3)

    def out(self, n, heads):
        out = self.block(n).attn.out_proj
        return heads.transpose(1, 0, 2).reshape(heads.shape[1], -1) @ out.weight.numpy().T + out.bias.numpy()

    def mlp(self, n, u):
        block = self.block(n)
        return u + block.mlp(block.ln_2(torch.from_numpy(u))).numpy()


def SS(u):
    return softmax(u @ u.transpose(0, 2, 1) / u.shape[-1] ** 0.5)


def clip(p):
    return p.F[p.L]


def maskclip(p):
    return p.out(p.L, p.qkv(p.L, p.F[p.L - 1])[2])


def sclip(p):
    x = p.F[p.L - 1]
    q, k, v = p.qkv(p.L, x)
    return p.mlp(p.L, x + p.out(p.L, SS(q) @ v + SS(k) @ v))


def cliptrase(p):
    x = p.F[p.L - 1]
    q, k, v = p.qkv(p.L, x)
    return p.mlp(p.L, x + p.out(p.L, (SS(q) + SS(k) + SS(v)) @ v))


def clearclip(p):
    q, k, v = p.qkv(p.L, p.F[p.L - 1])
    return p.out(p.L, SS(q) @ v)


def naclip(p):
    q, k, v = p.qkv(p.L, p.F[p.L - 1])
    places = [(r, c) for r in range(p.grid[0]) for c in range(p.grid[1])]
    G = np.zeros((len(places) + 1, len(places) + 1))
    for i, a in enumerate(places, 1):
        for j, b in enumerate(places, 1):
            G[i, j] = np.exp(-((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / 50)
    return p.out(p.L, softmax(k @ k.transpose(0, 2, 1) / k.shape[-1] ** 0.5 + G) @ v)


def clip_surgery(p):
    z = p.F[p.L - 6]
    for n in range(p.L - 5, p.L + 1):
        v = p.qkv(n, p.F[n - 1])[2]
        z = z + p.out(n, SS(v) @ v)
    return z


def gem(p):
    z = p.F[p.L - 6]
    for n in range(p.L - 5, p.L + 1):
        q, k, v = p.qkv(n, p.F[n - 1])
        theta = np.linalg.norm(p.ln_1(n, p.F[n - 1]), axis=-1).mean() / v.shape[-1] ** 0.5
        total = 0
        for u in (q, k, v):
            u = unit(u)
            u = unit(softmax(theta * u @ u.transpose(0, 2, 1)) @ u)
            total = total + softmax(theta * u @ u.transpose(0, 2, 1)) @ v
        z = z + p.out(n, total / 3)
    return z


def around(p, i):
    r, c = divmod(i, p.grid[1])
    near = [(r + a, c + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
    return [a * p.grid[1] + b for a, b in near if 0 <= a < p.grid[0] and 0 <= b < p.grid[1]]


def sc_clip(p):
    x = p.F[p.L - 1][1:]
    N = len(x)
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    others = [sorted((j for j in range(N) if j != i), key=lambda j: squared[i, j])[:30] for i in range(N)]
    outliers = np.zeros(N, bool)
    if N > 1:
        d = np.array([squared[i, near[-1]] for i, near in enumerate(others)])
        lof = np.array([np.mean(d[i] / d[near]) for i, near in enumerate(others)])
        outliers = lof > np.quantile(lof, 0.95)

    def M(x):
        out = x.copy()
        for i in np.flatnonzero(outliers):
            good = [j for j in around(p, i) if not outliers[j]]
            if good:
                out[i] = x[good].mean(axis=0)
        return out

    def norm4(W):
        W = np.where(W < 0.4, 0, W)
        return W / (W.sum(axis=1, keepdims=True) + 1e-6)

    def guided(x, cls):
        q, k, v = p.qkv(p.L, x)
        return p.out(p.L, (P + SS(k)) / 2 @ v) + 0.3 * cls

    R = unit(M(p.F[9][1:]))
    W1 = R @ R.T
    P = W1 - W1.mean()
    P = softmax(np.where(P < 0, -np.inf, 3 * P))
    W2 = norm4(unit(p.F[4][1:]) @ unit(p.F[4][1:]).T)
    X = W2 @ guided(norm4(W1) @ M(x), p.F[p.L - 1][0])
    Y = sum(p.F[4:11])
    z = X + W2 @ guided(Y[1:], Y[0])
    return np.concatenate([p.F[p.L][:1], z])


def kk(p):
    q, k, v = p.qkv(p.L, p.F[p.L - 1])
    A = SS(k)
    A[:, :, 0] = 0
    return p.out(p.L, A @ v)


def kk_mean(p):
    A = sum(SS(p.qkv(n, p.F[n - 1])[1]) for n in range(1, p.L + 1)) / p.L
    A[:, :, 0] = 0
    return p.out(p.L, A @ p.qkv(p.L, p.F[p.L - 1])[2])


def released_stream(p):
    """F[0..L]."""

    def denoise(x):
        out = x.copy()
        for i, f in enumerate(x[1:]):
            w = (f - f.min()) / max((f - f.min()).sum(), 1e-8)
            if w[list(DIMS)].max() > 5 / len(f):
                out[1 + i] = 0.6 * f + 0.4 * (f + x[1:][around(p, i)].sum(axis=0)) / 9
        return out

    x = [p.F[0]]
    for n in range(1, p.L + 1):
        x.append(denoise(p.block(n)(torch.from_numpy(x[-1])[None])[0].numpy()))
    return x


def released(p):
    F = released_stream(p)
    keys = [p.qkv(n, F[n - 1])[1] for n in range(1, p.L)]
    g = sum(F[1:]) / p.L
    W = unit(g[1:]) @ unit(g[1:]).T
    W = np.where(W < 0.4, 0, W)
    z = 0
    for x in (F[p.L - 1], g):
        q, k, v = p.qkv(p.L, np.concatenate([x[:1], W @ x[1:]]))
        A = (sum(map(SS, keys)) + SS(k)) / p.L
        A[:, :, 0] = 0
        z = z + p.out(p.L, A @ v) / 2
    return z


FORMULAS = {
    "clip": clip,
    "maskclip": maskclip,
    "sclip": sclip,
    "clearclip": clearclip,
    "naclip": naclip,
    "gem": gem,
    "clip-surgery": clip_surgery,
    "cliptrase": cliptrase,
    "sc-clip": sc_clip,
    "kk": kk,
    "kk-mean": kk_mean,
    "released": released,
}  # rf-clip's is in test_plugin.py, proxyclip's below


def formula(name, model, images):
    """Patch embeddings [B, C, gh, gw] in float64."""
    found = []
    for image in images:
        p = Plain(model, image)
        z = torch.from_numpy(FORMULAS[name](p)[1:])
        found.append((model.visual.ln_post(z) @ model.visual.proj).T.reshape(-1, *p.grid))
    return torch.stack(found)


def proxyclip(model, images, dino):
    found = []
    for image in images:
        p = Plain(model, image)
        q, k, v = p.qkv(p.L, p.F[p.L - 1])
        mean, std, other_mean, other_std = (
            torch.tensor(value, dtype=image.dtype).view(3, 1, 1)
            for value in (
                *(model.visual.image_mean, model.visual.image_std),
                *([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            )
        )
        pixels = (image * std + mean - other_mean) / other_std
        f = unit(dino.forward_features(pixels[None])[0, 1:].numpy())
        W = f @ f.T
        R = 3 * (W - 1.2 * W.mean())
        R = np.where((R < 0) & ~np.eye(len(R), dtype=bool), -np.inf, R)
        grid = [side // 4 for side in image.shape[1:]]
        planes = torch.from_numpy(v[:, 1:].transpose(0, 2, 1).reshape(1, -1, *p.grid))
        planes = F.interpolate(planes, size=grid, mode="bilinear", align_corners=False)
        v = planes.reshape(len(v), -1, len(R)).transpose(1, 2).numpy()
        z = torch.from_numpy(p.out(p.L, softmax(R) @ v))
        found.append((model.visual.ln_post(z) @ model.visual.proj).T.reshape(-1, *grid))
    return torch.stack(found)


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


# The tests -----------------------------------------------------------------------------------------------------------


def test_every_method_has_a_formula():
    assert {*FORMULAS, "rf-clip", "proxyclip"} == set(METHODS)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_the_formula(name, size, backend):
    """To rounding in float64; in float32 every patch's cosine is above 0.9999."""
    images = pictures(count=2, height=size[0], width=size[1])
    want = formula(name, tower(), images)
    assert relative_error(features(name, tower(), images, backend), want) < 1e-10
    single = features(name, tower(torch.float32), images[:1].float(), backend)
    assert single.dtype == torch.float32
    assert F.cosine_similarity(single.double(), want[:1], dim=1).min() > 0.9999


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_proxyclip(size, dino):
    images = pictures(count=2, height=size[0], width=size[1])
    got = features("proxyclip", tower(), images)
    assert got.shape[2:] == (size[0] // 4, size[1] // 4)
    assert relative_error(got, proxyclip(tower(), images, dino)) < 1e-10


def test_proxyclip_on_sides_that_are_no_multiples():
    """Pictures are resized to the nearest multiple of DINO's patch; a blank one gives no NaN."""
    forward = methods.ProxyCLIP(read_tower(tower()), None, "auto", small_dino(5))
    images = torch.zeros(1, 3, 16, 24, dtype=torch.float64)
    found = forward.dense(forward.tower.patches(images), images)
    assert found.shape == (1, 20, 3, 5)
    assert found.isfinite().all()
    with pytest.raises(ValueError, match="images=None"):
        forward.dense(forward.tower.patches(images))


def test_proxyclip_in_windows():
    """The segmenter shows it the pictures, and takes its logits on the grid of its DINO."""
    model = rfclip.load_model()
    with rfclip.Segmenter(model, method="proxyclip") as segmenter:
        assert (segmenter.window, segmenter.short_side, segmenter.stride) == (168, 168, 56)
        found = segmenter(np.zeros((80, 90, 3), np.uint8), "cat, grass", probabilities=True)
    assert found.labels.shape == (80, 90)
    np.testing.assert_allclose(found.probabilities.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["rf-clip", "released", "kk"])
def test_training_mode_is_refused(name):
    model, images = tower(), pictures(height=56, width=56)
    with rfclip.refocus(model, CONFIG if METHODS[name].configured else None, method=name):
        model.train()
        for read in (model.encode_image, lambda images: rfclip.dense_features(model, images)):
            with pytest.raises(RuntimeError, match="training mode"):
                read(images)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_equals_its_images_one_by_one(name):
    images = pictures(count=3, height=40, width=56)
    images[2] = 0  # statistics of a blank image would differ from the others'
    model = tower()
    config = CONFIG if METHODS[name].configured else None
    with rfclip.refocus(model, config, method=name):
        whole = rfclip.dense_features(model, images), model.encode_image(images)
        singles = [(rfclip.dense_features(model, image[None]), model.encode_image(image[None])) for image in images]
    for got, want in zip(whole, map(torch.cat, zip(*singles, strict=True)), strict=True):
        assert got.isfinite().all()
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_the_image_embedding(name):
    """Only RF-CLIP and the released code change it."""
    model, images = tower(), pictures(height=56, width=56)
    plain = model.encode_image(images)
    with rfclip.refocus(model, CONFIG if METHODS[name].configured else None, method=name):
        got = model.encode_image(images)
    if METHODS[name].configured:
        assert relative_error(got, plain) > 1e-3
    else:
        assert relative_error(got, plain) < 1e-12


def test_the_image_embedding_of_the_released_code():
    model, images = tower(), pictures(count=1, height=56, width=56)
    p = Plain(model, images[0])
    p.F[1:] = []
    with rfclip.refocus(model, CONFIG, method="released"):
        got = model.encode_image(images)
    x = released_stream(p)[-1]
    want = model.visual.ln_post(torch.from_numpy(x[:1])) @ model.visual.proj
    assert relative_error(got, want) < 1e-12


def test_methods_are_told_apart():
    model, images = tower(), pictures(height=56, width=56)
    found = {name: features(name, model, images) for name in METHODS if name != "proxyclip"}
    for name, one in found.items():
        for other, two in found.items():
            assert name == other or relative_error(one, two) > 1e-3, (name, other)


def test_refusals():
    model = tower(layers=5)
    for name, blocks in (("gem", 6), ("clip-surgery", 6), ("sc-clip", 11)):
        with pytest.raises(ValueError, match=f"method '{name}' needs {blocks} blocks, and this tower has 5"):
            rfclip.refocus(model, method=name)
    with pytest.raises(ValueError, match="method='lseg': expected one of clip, maskclip"):
        rfclip.refocus(model, method="lseg")
    with pytest.raises(ValueError, match="method 'kk' has nothing to configure"):
        rfclip.refocus(model, CONFIG, method="kk")
    with pytest.raises(ValueError, match="config=None"):
        rfclip.refocus(model, method="released")
    assert "forward" not in vars(model.visual)


def test_dino_that_cannot_be_downloaded(monkeypatch):
    monkeypatch.undo()

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match="DINO ViT-B/8 could not be downloaded .no route to host."):
        rfclip.refocus(tower(), method="proxyclip")
