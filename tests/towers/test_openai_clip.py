"""OpenAI's own package through the same calls: equal to itself, and to an open_clip model of the same weights."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, relative_error
from openai_models import SIZES, clip, small_openai, to_openai
from refocusing import PLAIN
from small_models import DIMS, pictures, small_clip

import rfclip
from rfclip.config import RefocusConfig
from rfclip.methods import METHODS
from rfclip.ops import backend
from rfclip.towers import read_tower
from rfclip.towers.loading import load_model, tiny_folder

pytestmark = pytest.mark.usefixtures("no_grad")
CONFIG = RefocusConfig(DIMS, tau=3.0)
ROUNDING = 2e-6  # of towers in float32 that differ only in their order of summation
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def at(dtype):
    """A model as `clip.load` makes it on a CPU (float32) and on a GPU: norms and embeddings stay in float32."""
    model = small_openai()
    if dtype == torch.float16:
        clip.model.convert_weights(model)
    return model


@pytest.fixture
def images():
    return pictures(dtype=torch.float32)


@pytest.fixture
def pair():
    """The same weights in both libraries, float32."""
    plain = small_clip(**SIZES, quick_gelu=True, dtype=torch.float32)
    return plain, to_openai(plain)


@precisions
@pytest.mark.parametrize("refocus", [False, True], ids=["plain", "proxy-none-without-dims"])
def test_plain_tower_is_the_packages_own(images, dtype, refocus):
    model, seen = at(dtype), []
    hook = model.visual.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
    want = model.encode_image(images)
    hook.remove()
    patches = model.visual.ln_post(seen[0].transpose(0, 1)[:, 1:]) @ model.visual.proj
    tolerance = ROUNDING if dtype == torch.float32 else 5e-3  # some tens of roundings of 2^-11
    with rfclip.refocus(model, PLAIN) if refocus else rfclip.refocus(model, method="clip"):
        assert_close(model.encode_image(images), want, tolerance, dtype)
        assert_close(rfclip.dense_features(model, images).flatten(2).mT, patches, tolerance, dtype)


@precisions
def test_blocks_are_the_packages_own(dtype):
    """On streams of 17 tokens, three at a time, sequence first in the package."""
    model = at(dtype)
    x = torch.randn(3, 17, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    ops = backend("reference")
    for block, own in zip(read_tower(model).blocks, model.visual.transformer.resblocks, strict=True):
        heads = F.scaled_dot_product_attention(*block.query_key_value(x))
        stream, branch = block.finish(x, heads, ops)
        assert_close(
            stream + branch,
            own(x.transpose(0, 1)).transpose(0, 1),
            *(ROUNDING if dtype == torch.float32 else 2e-3, dtype),
        )


@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("method", ["rf-clip", "released", "naclip", "sclip", "maskclip"])
def test_methods_equal_open_clips(pair, method, size):
    images, found = pictures(height=size[0], width=size[1], dtype=torch.float32), []
    config = CONFIG if METHODS[method].configured else None
    for model in pair:
        with rfclip.refocus(model, config, method=method):
            found.append((rfclip.dense_features(model, images), model.encode_image(images)))
    for open_clips, openais in zip(*found, strict=True):
        assert_close(openais, open_clips, ROUNDING)


def test_it_is_undone(images):
    model = small_openai()
    before, state = model.encode_image(images), copy.deepcopy(model.state_dict())
    handle = rfclip.refocus(model, CONFIG)
    assert not torch.allclose(model.encode_image(images), before, atol=1e-3)
    with pytest.raises(RuntimeError, match="already refocused"):
        rfclip.refocus(model, CONFIG)
    twin = pickle.loads(pickle.dumps(model))
    handle.remove()
    assert torch.equal(model.encode_image(images), before)
    assert not torch.equal(twin.encode_image(images), before)  # a copy stays refocused
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(model.visual)


def test_half_precision(pair, images):
    """About as close to float32 as open_clip's own model of that precision, whose norms are in float32 too."""
    with rfclip.refocus(pair[0], CONFIG):
        want = rfclip.dense_features(pair[0], images)
    half, errors = small_clip(**SIZES, quick_gelu=True, dtype=torch.float32, lp_norms=True), []
    for model in (half, pair[1]):
        clip.model.convert_weights(model)
        with rfclip.refocus(model, CONFIG):
            found = rfclip.dense_features(model, images)
        assert found.dtype == torch.float16
        errors.append(relative_error(found, want))
    assert errors[1] <= 1.5 * errors[0]


def test_calibration(pair):
    images = pictures(bright=1.0, colours=(0,), dtype=torch.float32)
    want, found = (rfclip.calibrate(model, images) for model in pair)
    assert found.dims == want.dims and set(found.dims) == set(DIMS)
    torch.testing.assert_close(found.profile, want.profile)


def test_texts_are_the_packages_own():
    """By its own tokenizer and text tower."""
    model, names = to_openai(load_model()), ["dog", "a sailboat, at night", "Straße"]
    tokens = clip.tokenize([f"a photo of a {name}." for name in names], context_length=32)
    want = F.normalize(model.encode_text(tokens), dim=-1)
    found = rfclip.text_embeddings(model, names, templates=["a photo of a {}.".format], cache=False)
    assert_close(found, want, ROUNDING)
    with pytest.raises(ValueError, match="CLIP knows 32 tokens"):
        rfclip.text_embeddings(small_openai(), names, cache=False)


def test_pictures_are_segmented_and_explained_as_with_open_clip():
    plain, names = load_model(), ["tiger", "mushroom", "pizza", "grass", "sky"]
    config, picture = RefocusConfig((3, 60), tau=2.0), tiny_folder() / "scene.png"
    labels, explained = [], []
    for model in (plain, to_openai(plain)):
        explained.append(rfclip.explain(model, picture, config, classes=names, cache=False))
        with rfclip.Segmenter(model, config=config, cache=False) as segmenter:
            labels.append(segmenter(picture, names).labels)
    assert (labels[0] == labels[1]).mean() > 0.999 and len(np.unique(labels[0])) > 2
    np.testing.assert_allclose(explained[1].after.received, explained[0].after.received, rtol=1e-4, atol=1e-6)


def test_the_compiler_traces_it_in_one_graph(images, fresh_compiler):
    model = small_openai()
    with rfclip.refocus(model, CONFIG):
        want = model.visual(images)
        assert_close(torch.compile(model.visual, fullgraph=True, backend="eager")(images), want, ROUNDING)


def test_what_is_refused(images):
    resnet = clip.model.CLIP(64, 32, (1, 1, 1, 1), 8, None, 8, 32, 16, 2, 1).eval()
    for call in (lambda: rfclip.refocus(resnet, CONFIG), lambda: rfclip.calibrate(resnet, images)):
        with pytest.raises(ValueError, match="image tower of class ModifiedResNet; .* OpenAI's package clip"):
            call()
    model = small_openai()
    with pytest.raises(ValueError, match="config=None, and this model does not say which checkpoint"):
        rfclip.refocus(model)
    with pytest.raises(RuntimeError, match="training mode"):
        rfclip.refocus(model.train(), CONFIG)
