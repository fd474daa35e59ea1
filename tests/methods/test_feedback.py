"""ResCLIP's feedback: a second pass whose attention the classes of the first correct."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import relative_error
from oracles import feedback as oracle
from oracles.methods import Plain, formula
from oracles.operations import brute_pamr
from oracles.released_evaluation import resize_planes
from PIL import Image
from small_models import DIMS, pictures, small_clip

import rfclip
from rfclip import Segmenter
from rfclip.methods import METHODS, feedback
from rfclip.ops.dispatch import backend
from rfclip.towers import read_tower

pytestmark = pytest.mark.usefixtures("no_grad")

CONSTANTS = {"confidence": 0.5, "gain": 1.8, "agreement": 0.6}
NAMES = "one, two, three"


def tower(dtype=torch.float64):
    return small_clip(layers=12, image_size=56, dtype=dtype)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (1, 7), (6, 1), (5, 5), (4, 7), (7, 4), (6, 9)], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_the_agreement_of_patches(grid, classes):
    """Sides of both parities: half-way points of lines are rounded to even."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (2, *grid), generator=generator)
    got = feedback.agreement(labels)
    for one, each in zip(got, labels, strict=True):
        np.testing.assert_allclose(one, oracle.agreement(each.numpy()), atol=2e-6)
    assert got.amax() == 1


@pytest.mark.parametrize("confidence", [0.0, 0.75])
def test_the_classes_of_patches(confidence):
    """What is beyond whole patches has none, and PAMR sees the picture without it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64) / 20
    images = torch.randn(2, 3, 26, 35, generator=generator, dtype=torch.float64)
    got = feedback.patch_labels(backend("reference"), logits, images, (8, 8), 40.0, confidence)
    unsure = 0
    for one, image, window in zip(got, images[:, :, :24, :32], logits, strict=True):
        pixels = brute_pamr(image[None], torch.from_numpy(resize_planes(window.numpy(), 24, 32))[None], 10, [8, 16])[0]
        probability = (40 * pixels).softmax(dim=0).numpy()
        labels = np.where(probability.max(axis=0) < confidence, 0, probability.argmax(axis=0))
        unsure += (probability.max(axis=0) < confidence).sum()
        np.testing.assert_array_equal(one, oracle.patch_labels(labels, (3, 4)))
    assert (unsure > 20) == (confidence > 0)


def test_equal_numbers_of_pixels():
    """Of two classes with half of a patch each, the first wins, wherever it is."""
    scores = torch.tensor([[[1.0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 1]]]).reshape(1, 1, 2, 6)
    scores = torch.cat([torch.full_like(scores, 0.1), scores, 0.5 * torch.ones_like(scores)], dim=1)
    ops = SimpleNamespace(pamr=lambda image, pixels, dilations: scores)
    got = feedback.patch_labels(ops, torch.zeros(1, 3, 1, 3), torch.zeros(1, 3, 2, 6), (2, 2), 1.0, 0.0)
    assert got.tolist() == [[[1, 2, 1]]]


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("size", [(56, 56), (24, 80)], ids=str)
def test_the_second_pass(size, backend):
    images, model = pictures(count=2, height=size[0], width=size[1]), tower()
    grid = size[0] // 8, size[1] // 8
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (2, *grid), generator=generator)
    M = feedback.agreement(labels).double()
    for name in ("resclip", "clearclip"):
        card = METHODS[name]
        method = card(read_tower(model), None, backend)
        got = feedback.fed_back(method, method.tower.patches(images), M, CONSTANTS)
        want = []
        for image, one in zip(images, M.numpy(), strict=True):
            p = Plain(model, image)
            z = oracle.resclip(p, one, 0.3, 1.8, 0.6) if name == "resclip" else oracle.clearclip(p, one, 1.8, 0.6)
            z = torch.from_numpy(z[1:])
            want.append((model.visual.ln_post(z) @ model.visual.proj).T.reshape(-1, *grid))
        assert relative_error(got, torch.stack(want)) < 1e-10
        first = method.dense(method.tower.patches(images))
        assert relative_error(first, got) > 1e-3


def able():
    return [
        name for name, card in METHODS.items() if card.load().last_block is not rfclip.methods.base.Method.last_block
    ]


@pytest.mark.parametrize("name", able())
def test_the_last_block_is_that_of_the_method(name):
    """Where a method has both, its tokens are what its last block gathers; and without agreement nothing changes."""
    model, images = tower(), pictures(count=2, height=40, width=56)
    config = rfclip.RefocusConfig(distraction_dims=DIMS) if METHODS[name].configured else None
    with rfclip.refocus(model, config, method=name):
        method = rfclip.plugin.installed(model)
        patches = method.tower.patches(images)
        plain = method.dense(patches)
        none = {"confidence": 0.5, "gain": 1.0, "agreement": 0.0}
        again = feedback.fed_back(method, patches, torch.zeros(2, 35, 35, dtype=torch.float64), none)
        assert relative_error(again, plain) < 1e-10
        together = feedback.fed_back(method, patches, torch.rand(2, 35, 35, dtype=torch.float64), CONSTANTS)
        assert relative_error(together, plain) > 1e-6


@pytest.mark.parametrize("proxy", ["none", "qk", "qq", "kk", "vv", "kk-mean"])
def test_the_last_block_of_every_proxy(proxy):
    model, images = tower(), pictures(count=2, height=40, width=56)
    with rfclip.refocus(model, rfclip.RefocusConfig(distraction_dims=DIMS, proxy=proxy)):
        method = rfclip.plugin.installed(model)
        patches = method.tower.patches(images)
        z = method.after(method.last_block(patches))
        assert relative_error(z, method.tokens(patches)) < 1e-10


@pytest.mark.filterwarnings("ignore:rfclip-tiny is a demonstration")
def test_pictures_in_windows():
    """Several pictures, of sides that are no whole patches, get what each gets alone, and one list of names as many."""
    generator = np.random.default_rng(0)
    shapes = [(70, 90), (90, 61), (70, 90)]
    images = [Image.fromarray(generator.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    model = rfclip.load_model()
    with Segmenter(model, method="naclip", protocol=METHODS["rf-clip"].protocol, cache=False) as segmenter:
        plain = [segmenter(image, "cat, grass, bus", probabilities=True, post="none") for image in images]
        alone = [segmenter(image, "cat, grass, bus", probabilities=True, post="resclip") for image in images]
        together = segmenter(images, "cat, grass, bus", probabilities=True, post="resclip")
    for one, each in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.probabilities, each.probabilities, atol=1e-5)
    assert any(abs(one.probabilities - each.probabilities).max() > 1e-3 for one, each in zip(plain, alone, strict=True))


def test_methods_that_refuse_it():
    model = rfclip.load_model()
    for name in ("maskclip", "released"):
        with Segmenter(model, method=name, cache=False) as segmenter, pytest.raises(ValueError, match="not one sum"):
            segmenter(np.zeros((60, 60, 3), np.uint8), "cat, dog", post="resclip")
    with (
        Segmenter(model, method="sclip", cache=False, across_windows=True) as segmenter,
        pytest.raises(ValueError, match="leave out across_windows"),
    ):
        segmenter(np.zeros((60, 60, 3), np.uint8), "cat, dog", post="resclip")


def test_constants_of_data_sets():
    """Of methods that are tuned by data set, as the authors publish them."""
    protocol = METHODS["resclip"].protocol
    tuned = {"share": 0.4, "confidence": 0.11, "gain": 1.8, "agreement": 0.7}
    assert protocol.on("coco_stuff").constants == {"resclip": tuned}
    assert protocol.on("voc20").constants["resclip"]["share"] == 0.6
    assert METHODS["resclip-rcs"].protocol.on("cityscapes").constants == {"resclip-rcs": {"share": 0.2}}
    assert protocol.on("cityscapes").short_side == METHODS["resclip-rcs"].protocol.on("cityscapes").short_side == 560
    of_steps = {"resclip": {*feedback.DEFAULTS}, "pearl": {"cells"}}
    for name, card in METHODS.items():
        for each in card.protocol.datasets:
            for owner, constants in card.protocol.on(each).constants.items():
                assert owner == name and set(constants) <= {*card.load().defaults, *of_steps.get(name, ())}


def test_constants_change_the_features():
    model, images = tower(), pictures(height=40, width=56)
    for name, dataset in (("resclip-rcs", "voc20"), ("pearl", "ade20k")):
        protocol = METHODS[name].protocol.on(dataset)
        with Segmenter(model, method=name, protocol=protocol, tokenizer=list) as segmenter:
            got = rfclip.dense_features(model, images)
            with pytest.raises(ValueError, match="it has the constants {}, and this model is refocused with"):
                Segmenter(model, protocol=METHODS[name].protocol, tokenizer=list)
            assert Segmenter(model, protocol=protocol, tokenizer=list).method == segmenter.method
        assert relative_error(got, formula(name, model, images, 0.6 if name == "resclip-rcs" else 0.3)) < 1e-10
