"""Every method against its formula, in float64."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import relative_error
from oracles.methods import FORMULAS, Plain, formula, itaclip_views, proxyclip, released_stream, sfp_outliers
from safetensors.torch import save_file
from small_models import DIMS, pictures, small_clip
from timm.models.vision_transformer import VisionTransformer

import rfclip
from rfclip.methods import METHODS
from rfclip.methods import proxyclip as proxyclip_file
from rfclip.methods.sfp import SFP
from rfclip.towers import read_tower

pytestmark = pytest.mark.usefixtures("no_grad")

CONFIG = rfclip.RefocusConfig(distraction_dims=DIMS)
SIZES = [(56, 56), (40, 40), (24, 80), (8, 8), (8, 24)]  # the first is native


@pytest.fixture(autouse=True)
def dino(monkeypatch):
    """A small random DINO in place of the one that would have to be downloaded."""
    made = small_dino(4)
    monkeypatch.setattr(proxyclip_file, "load_dino", lambda: made)
    return made


def small_dino(patch):
    torch.manual_seed(3)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(img_size=8 * patch, patch_size=patch, **sizes, dynamic_img_size=True).eval().double()


def tower(dtype=torch.float64, layers=12):
    model = small_clip(layers=layers, image_size=56, dtype=dtype)
    model.visual.image_mean, model.visual.image_std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    return model


def features(name, model, images, backend="auto"):
    config = CONFIG if METHODS[name].configured else None
    with rfclip.refocus(model, config, method=name, backend=backend):
        return rfclip.dense_features(model, images)


def test_every_method_has_a_formula():
    assert {*FORMULAS, "rf-clip", "proxyclip", "itaclip-views"} == set(METHODS)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [*FORMULAS, "itaclip-views"])
def test_the_formula(name, size, backend):
    """Up to rounding in float64; in float32, the cosine of every patch is above 0.9999."""
    images = pictures(count=2, height=size[0], width=size[1])
    want = formula(name, tower(), images)
    assert relative_error(features(name, tower(), images, backend), want) < 1e-10
    single = features(name, tower(torch.float32), images[:1].float(), backend)
    assert single.dtype == torch.float32
    assert F.cosine_similarity(single.double(), want[:1], dim=1).min() > 0.9999


def test_views_of_pictures():
    """They are made of whole patches, of windows that have less room than the blur wants, too."""
    model = small_clip(layers=12, patch_size=4, image_size=32)
    method = METHODS["itaclip-views"](read_tower(model), None, "auto")
    images = pictures(count=2, height=16, width=32)[..., :14, :27]
    patches = method.tower.patches(images[..., :12, :24])
    assert relative_error(method.dense(patches, images), itaclip_views(model, images[..., :12, :24], 0.75)) < 1e-10
    assert method.dense(patches[..., :1, :1], images).isfinite().all()
    with pytest.raises(ValueError, match="images=None: ITACLIP's views"):
        method.dense(patches)


def test_outliers_of_sfp():
    """Some of the patches, and at most ten."""
    model, found = tower(), []
    method = METHODS["sfp"](read_tower(model), None, "auto")
    for side in (56, 24, 16):
        for image in pictures(count=3, height=side, width=side):
            *_, (_, _, (q, k, _)), _ = method.inputs(method.tower.patches(image[None]))
            want = sfp_outliers(Plain(model, image))
            got = method._outliers(torch.zeros(1, len(want), 1), q, k)[0]
            np.testing.assert_array_equal(got.numpy(), want)
            found.append(want)
    assert max(each.sum() for each in found) == 10
    assert any(0 < each.sum() < min(10, len(each)) for each in found)


def test_outliers_of_sfp_in_a_corner(monkeypatch):
    """The patch in the corner has no inlier beside it and stays, as do all if all are outliers."""
    corner = torch.zeros(5, 6, dtype=torch.bool)
    corner[:2, :2] = True
    for outliers in (corner, torch.ones_like(corner)):
        monkeypatch.setattr(SFP, "_outliers", lambda *_, outliers=outliers: outliers.view(1, -1))
        monkeypatch.setattr("oracles.methods.sfp_outliers", lambda p, outliers=outliers: outliers.flatten().numpy())
        images = pictures(count=1, height=40, width=48)
        assert relative_error(features("sfp", tower(), images), formula("sfp", tower(), images)) < 1e-10


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_proxyclip(size, dino):
    images = pictures(count=2, height=size[0], width=size[1])
    got = features("proxyclip", tower(), images)
    assert got.shape[2:] == (size[0] // 4, size[1] // 4)
    assert relative_error(got, proxyclip(tower(), images, dino)) < 1e-10


def test_proxyclip_on_sides_that_are_no_multiples():
    """Pictures are resized to the nearest multiple of DINO's patch; a blank one gives no NaN."""
    forward = METHODS["proxyclip"](read_tower(tower()), None, "auto", dino=small_dino(5))
    images = torch.zeros(1, 3, 16, 24, dtype=torch.float64)
    found = forward.dense(forward.tower.patches(images), images)
    assert found.shape == (1, 20, 3, 5)
    assert found.isfinite().all()
    with pytest.raises(ValueError, match="images=None"):
        forward.dense(forward.tower.patches(images))


@pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")
def test_proxyclip_in_windows():
    """The segmenter passes it the pictures, and takes its logits on the grid of its DINO."""
    model = rfclip.load_model()
    with rfclip.Segmenter(model, method="proxyclip") as segmenter:
        assert (segmenter.windows.window, segmenter.windows.short_side, segmenter.windows.stride) == (168, 168, 56)
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
    """Only RF-CLIP, the released code and registers change it."""
    model, images = tower(), pictures(height=56, width=56)
    plain = model.encode_image(images)
    with rfclip.refocus(model, CONFIG if METHODS[name].configured else None, method=name):
        got = model.encode_image(images)
    if METHODS[name].configured or METHODS[name].registers:
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


def test_the_released_code_on_a_single_block():
    """Its proxy attention then has no keys but the last block's."""
    images = pictures(count=2, height=40, width=40)
    got = features("released", tower(layers=1), images)
    assert relative_error(got, formula("released", tower(layers=1), images)) < 1e-10


def test_methods_differ():
    model, images = tower(), pictures(height=56, width=56)
    left_out = {"proxyclip", "resclip"}  # one needs a download, and the other is resclip-rcs but for its protocol
    found = {name: features(name, model, images) for name in METHODS if name not in left_out}
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

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", offline)
    with pytest.raises(ConnectionError, match="DINO ViT-B/8 could not be downloaded .no route to host."):
        rfclip.refocus(tower(), method="proxyclip")


def test_dino_comes_from_safetensors(monkeypatch, tmp_path):
    """The real loading path but for the download."""
    monkeypatch.undo()
    real = timm.create_model(proxyclip_file.DINO)
    save_file(real.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(
        "open_clip.factory.download_pretrained_from_hf",
        lambda *place, **named: asked.append((place, named)) or str(tmp_path / "model.safetensors"),
    )
    assert torch.equal(proxyclip_file.load_dino().pos_embed, real.pos_embed)
    assert asked == [(("timm/vit_base_patch8_224.dino",), {"filename": "model.safetensors"})]
