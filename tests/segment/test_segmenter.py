"""The segmenter against a plain loop over windows, at other sizes, thresholds and precisions; wrong options."""

import copy
import warnings
from pathlib import Path

import cv2
import numpy as np
import open_clip
import pytest
import torch
from miniatures import SCENE
from oracles.segmenter import plain_loop
from PIL import Image

import rfclip
from rfclip import RefocusConfig, Segmenter
from rfclip.methods import Protocol, find_protocol
from rfclip.plugin import installed
from rfclip.segment.classes import parse_classes
from rfclip.segment.windows import resized_as_opencv
from rfclip.tiny.scenes import CLASSES
from rfclip.towers.loading import tiny_folder

NAMES = [[CLASSES[c], f"{CLASSES[c]}s"] for c in SCENE.present()]
NAMES[1:] = [*(names[0] for names in NAMES[1:]), "cat"]
# Its pictures are small, and most are no scenes of the size that the bundled CLIP knows.
pytestmark = pytest.mark.filterwarnings("ignore:rfclip-tiny")


@torch.inference_mode()
def test_equals_a_plain_loop(segmenter, picture):
    want = plain_loop(segmenter.model, picture, parse_classes(NAMES))
    result = segmenter(picture, NAMES, probabilities=True)
    np.testing.assert_allclose(result.probabilities, want, atol=2e-5)
    assert result.labels.shape == (130, 200)
    assert result.labels.dtype == np.uint8
    assert len(np.unique(result.labels)) > 1
    top = np.sort(want, axis=0)
    clear = top[-1] - top[-2] > 1e-4
    assert clear.mean() > 0.99
    assert np.array_equal(result.labels[clear], want.argmax(0)[clear])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_give_no_labels(model, picture, value):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.visual.ln_post.bias[0] = value
    with Segmenter(model, cache=False) as segmenter, pytest.raises(ValueError, match="not finite.*another precision"):
        segmenter(picture, NAMES)
    with pytest.raises(ValueError, match="logit_scale=.*expected a finite number"):
        Segmenter(model, cache=False, logit_scale=value)


LONG = "a very " + "long " * 40


def test_a_name_that_is_cut_is_named(segmenter, picture):
    """A name that just fits is not, whatever the template puts around it."""
    with pytest.warns(UserWarning, match="classes: 'a very long .* cat' is cut, as the model reads 32 tokens"):
        segmenter.check_names([(f"{LONG}cat",), ("dog",)])
    fits = " ".join(["cat"] * 24)
    tokens = open_clip.get_tokenizer(f"local-dir:{tiny_folder()}")(open_clip.OPENAI_IMAGENET_TEMPLATES[0](fits))[0]
    assert tokens.count_nonzero() == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segmenter.check_names([(fits,), ("dog",)])


@pytest.mark.filterwarnings("ignore:classes.* is cut")
@pytest.mark.parametrize(
    "names",
    [["Dog", "dog"], ["caf\u00e9", "cafe\u0301"], ["salt & pepper", "salt &amp; pepper"], [f"{LONG}cat", f"{LONG}dog"]],
    ids=["case", "accents", "entities", "cut"],
)
def test_names_that_are_the_same_to_the_model(segmenter, picture, names):
    with pytest.raises(ValueError, match="are the same 32 tokens to the model.*never be found"):
        segmenter(picture, [*names, "grass"])
    for one in names:
        assert segmenter(picture, [one, "grass"]).classes == (one, "grass")


def test_memory_limit_changes_nothing_but_the_batches(model, segmenter, picture):
    want = segmenter(picture, NAMES, probabilities=True).probabilities
    batches = []
    dense = model.visual.forward.dense
    model.visual.forward.dense = lambda windows, images: batches.append(len(windows)) or dense(windows)
    segmenter.memory_limit = 1
    np.testing.assert_allclose(segmenter(picture, NAMES, probabilities=True).probabilities, want, atol=1e-5)
    assert len(batches) > 1
    assert set(batches) == {1}
    del model.visual.forward.dense


@pytest.mark.parametrize("seed", range(20))
def test_pictures_are_resized_as_opencv_does(seed):
    """Its INTER_LINEAR, by which mmcv resizes, to the bit: up, down, and both, from one pixel on."""
    random = np.random.default_rng(seed)
    before, after = random.integers(1, 200 if seed else 2, 2), random.integers(1, 300, 2)
    pixels = random.integers(0, 256, (*before, 3), dtype=np.uint8)
    want = cv2.resize(pixels, (int(after[1]), int(after[0])))
    got = resized_as_opencv(torch.from_numpy(pixels).permute(2, 0, 1), (int(after[0]), int(after[1])))
    assert np.array_equal(got.permute(1, 2, 0), want)


@pytest.mark.parametrize("stride", [56, 32, 50, 55, 112])
@torch.inference_mode()
def test_the_patch_convolution_runs_once(model, stride):
    """Each window gets the patches of a convolution over it alone, and together they cost no more than that."""
    with Segmenter(model, stride=stride) as segmenter:
        tower, windows = segmenter.tower, segmenter.windows
        side = windows.window
        x = torch.randn(3, 168, 301, generator=torch.Generator().manual_seed(0))
        corners = windows.corners(168, 301)
        areas = []
        counted = model.visual.conv1.register_forward_pre_hook(lambda _, given: areas.append(given[0][0, 0].numel()))
        patches = windows.patches(tower, x, corners)
        counted.remove()
    assert sum(areas) <= len(corners) * side**2
    if stride % 8 == 0:  # whole patches: the picture, and what the last column of windows does not share with it
        assert sum(areas) <= 168 * (301 + side)
    for window, (top, left) in zip(patches, corners, strict=True):
        alone = tower.patches(x[None, :, top : top + side, left : left + side])[0]
        torch.testing.assert_close(window, alone, atol=1e-5, rtol=1e-5)


def test_threshold(segmenter, picture):
    plain = segmenter(picture, NAMES, probabilities=True)
    unsure = plain.probabilities.max(0) < 0.6
    assert 0 < unsure.mean() < 1
    below = segmenter(picture, NAMES, threshold=0.6)
    assert np.array_equal(below.labels, np.where(unsure, 255, plain.labels))
    assert below.nothing == 255
    assert sum(below.shares.values()) == pytest.approx(1 - unsure.mean())
    with pytest.raises(ValueError, match="threshold=1.5.*from 0 to 1"):
        segmenter(picture, NAMES, threshold=1.5)


def test_post_of_another_name(segmenter, picture):
    """Refused before anything is segmented."""
    for act in (segmenter, segmenter.stream):
        with pytest.raises(ValueError, match="post='smooth': expected one of none, pamr.*or None"):
            act(picture, NAMES, post="smooth")
    with pytest.raises(ValueError, match="post=True: expected one of none"):
        Protocol(post=True)


def test_threshold_with_a_background_class(segmenter, picture):
    named = [*NAMES, ["background", "wall"]]
    plain = segmenter(picture, named, probabilities=True)
    below = segmenter(picture, named, threshold=0.6).labels
    assert np.array_equal(below, np.where(plain.probabilities.max(0) < 0.6, len(NAMES), plain.labels))


def test_wide_pictures_and_small_ones(segmenter):
    for size in ((1, 1), (3, 200), (500, 20), (40, 40)):
        result = segmenter(Image.new("RGB", size, "tan"), ["sand", "sky"])
        assert result.labels.shape == size[::-1]
        assert result.overlay().width >= size[0]


def test_the_shipped_scene(segmenter):
    """The picture in the README: what is there is found, and no other class is."""
    result = segmenter(Path(tiny_folder()) / "scene.png", CLASSES)
    found = {name for name, share in result.shares.items() if share > 0.005}
    assert found == {"tiger", "mushroom", "pizza", "cake", "grass", "sky"}


# Models and options ---------------------------------------------------------------------------------------------------


def test_a_ready_model_is_given_back(model):
    with Segmenter(model) as segmenter:
        assert "forward" in vars(model.visual)
        assert segmenter.config == model.refocus_config
    assert "forward" not in vars(model.visual)
    segmenter.close()
    with pytest.raises(RuntimeError, match="closed"):
        segmenter(Image.new("RGB", (9, 9)), ["cat"])


def test_a_refocused_model_keeps_its_config(model, picture):
    config = RefocusConfig(distraction_dims=(1, 2), proxy="kk")
    with rfclip.refocus(model, config):
        segmenter = Segmenter(model)
        assert segmenter.config == config
        segmenter(picture, NAMES)
        segmenter.close()
        assert "forward" in vars(model.visual)
        with pytest.raises(ValueError, match="already refocused"):
            Segmenter(model, config=config)


def test_positions_of_a_protocol(model, picture):
    """They are those of the segmenter's protocol; a model refocused already keeps its own, and another is refused."""
    released = find_protocol("released", "rf-clip")
    for method, offset in (("rf-clip", 0.0), ("released", 0.1)):
        with Segmenter(model, method=method):
            assert installed(model).tower.position_offset == offset
    with Segmenter(model, method="kk", protocol=released):
        assert installed(model).tower.position_offset == 0.1
    with rfclip.refocus(model, method="kk"):
        with pytest.raises(
            ValueError, match="an offset of 0.1, and this model is refocused with 0: give the plain model"
        ):
            Segmenter(model, protocol=released)
        assert Segmenter(model, protocol=Protocol(short_side=300)).windows.short_side == 150


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_agrees(segmenter, picture, precision):
    want = segmenter(picture, NAMES).labels
    with Segmenter(precision=precision) as half:
        assert (half(picture, NAMES).labels == want).mean() > 0.97


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 60}, "window 60.*multiple of the patch, 8"),
        ({"stride": 200}, "stride 200"),
        ({"short_side": 100}, "short side 100"),
        ({"templates": []}, "at least one function"),
        ({"pretrained": "openai"}, "goes with a model's name"),
        ({"backend": "fast"}, "backend='fast'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options(model, options, words):
    with pytest.raises(ValueError, match=words):
        Segmenter(model, **options)
    assert "forward" not in vars(model.visual)


def test_another_vocabulary_needs_its_tokenizer():
    cfg = {"vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}}
    text = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
    other = open_clip.CLIP(8, text_cfg=text, **cfg).eval()
    with pytest.raises(ValueError, match="tokenizer=open_clip.get_tokenizer"):
        Segmenter(other, config=RefocusConfig(distraction_dims=()))
