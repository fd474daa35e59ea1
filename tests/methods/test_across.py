"""Attention across all windows of a picture in the last block."""

import numpy as np
import pytest
import torch
from helpers import relative_error
from oracles.methods import Plain, softmax, unit
from PIL import Image
from small_models import DIMS, pictures, small_clip

import rfclip
from rfclip import RefocusConfig, Segmenter
from rfclip.methods import METHODS
from rfclip.methods.across import across_windows
from rfclip.towers import read_tower

pytestmark = pytest.mark.usefixtures("no_grad")

COMMON = METHODS["rf-clip"].protocol


def tower(dtype=torch.float64):
    return small_clip(layers=12, image_size=56, dtype=dtype)


def maps(us):
    """softmax(E) over the patches of all windows, of vectors [W, N, d]."""
    u = unit(us.reshape(-1, us.shape[-1]))
    C = u @ u.T
    E = 3 * (C - 1.2 * C.mean())
    least = np.minimum(E.max(axis=1, keepdims=True), 0)
    return softmax(np.where(least - 1e-12 > E, -np.inf, E))  # a patch is not under its own maximum by rounding


def crossed(name, model, images):
    """z of each window, [W, N, d], in float64."""
    windows = [Plain(model, image) for image in images]
    qkv = [p.qkv(p.L, p.F[p.L - 1]) for p in windows]

    def joined(place):
        return np.stack([each[place][:, 1:].transpose(1, 0, 2).reshape(each.shape[2] - 1, -1) for each in qkv])

    q, k, v = map(joined, range(3))
    if name == "sclip":
        A = maps(q) + maps(k)
    elif name == "clearclip":
        A = maps(q)
    else:  # kk-mean
        A = 0
        for n in range(1, windows[0].L + 1):
            keys = [p.qkv(n, p.F[n - 1])[1][:, 1:].transpose(1, 0, 2).reshape(v.shape[1], -1) for p in windows]
            A = A + maps(np.stack(keys)) / windows[0].L
    gathered = (A @ v.reshape(-1, v.shape[-1])).reshape(v.shape)
    found = []
    for p, heads in zip(windows, gathered, strict=True):
        heads = heads.reshape(len(heads), qkv[0].shape[1], -1).transpose(1, 0, 2)
        z = p.out(p.L, heads)
        found.append(p.mlp(p.L, p.F[p.L - 1][1:] + z) if name == "sclip" else z)
    return np.stack(found)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", ["clearclip", "sclip", "kk-mean"])
def test_the_formula(name, batch, backend):
    """However many windows go through the tower at a time."""
    model, images = tower(), pictures(count=5, height=24, width=40)
    method = METHODS[name](read_tower(model), None, backend)
    got = across_windows(method, method.tower.patches(images).split(batch))
    z = torch.from_numpy(crossed(name, model, images))
    want = (model.visual.ln_post(z) @ model.visual.proj).mT.unflatten(-1, (3, 5))
    assert relative_error(got, want) < 1e-10
    within = method.dense(method.tower.patches(images))
    assert relative_error(within, want) > 1e-2


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_it_or_refuses(name):
    """Blank windows, whose vectors are all alike, give no NaN."""
    if name == "proxyclip":  # its DINO is downloaded
        assert not METHODS[name].load().crosses
        return
    model, images = tower(), pictures(count=3, height=24, width=40)
    images[1:] = 0
    config = RefocusConfig(distraction_dims=DIMS) if METHODS[name].configured else None
    with rfclip.refocus(model, config, method=name):
        method = rfclip.plugin.installed(model)
        if method.crosses:
            got = across_windows(method, [method.tower.patches(images)])
            assert got.isfinite().all() and got.shape == (3, 20, 3, 5)
        else:
            with pytest.raises(ValueError, match="no self-attention without a bias, as of sclip, clearclip"):
                rfclip.methods.across.check_across(method)


@pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")
def test_in_the_segmenter():
    """Pictures of several sizes together are as each alone; windows of another picture do not matter."""
    generator = np.random.default_rng(0)
    shapes = [(70, 90), (90, 61), (70, 90)]
    images = [Image.fromarray(generator.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    model = rfclip.load_model()
    options = {"method": "clearclip", "protocol": COMMON, "cache": False}
    with Segmenter(model, **options) as segmenter:
        plain = segmenter(images[0], "cat, grass, bus", probabilities=True)
    with Segmenter(model, **options, across_windows=True, batch=3) as segmenter:
        alone = [segmenter(image, "cat, grass, bus", probabilities=True) for image in images]
        together = segmenter(images, "cat, grass, bus", probabilities=True)
    for one, each in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.probabilities, each.probabilities, atol=1e-5)
    assert abs(alone[0].probabilities - plain.probabilities).max() > 1e-2


@pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")
def test_rules_that_ask_for_the_image():
    """Of each window, or of a picture that is one window."""
    model = rfclip.load_model()
    picture = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    for name in ("voc21", "cityscapes"):
        protocol = METHODS["released"].protocol.on(name)
        with Segmenter(model, method="clearclip", protocol=protocol, across_windows=True) as segmenter:
            found = segmenter(picture, "cat, grass", probabilities=True)
        np.testing.assert_allclose(found.probabilities.sum(axis=0), 1, atol=1e-5)
