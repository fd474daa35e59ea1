"""The procedural scenes, and the scores on them."""

import numpy as np
import pytest
import torch

import rfclip
from rfclip import RefocusConfig, Segmenter
from rfclip.evaluate import INJECTED_DIMS, choices, confusion_matrix, evaluate_scenes, inject_distraction
from rfclip.scenes import CLASSES, GROUNDS, OBJECTS, make_scene, sprites

METHODS = {name: {"method": name} for name in ("clip", "kk", "kk-mean")} | {
    "rf-clip": {"config": RefocusConfig(distraction_dims=())}
}


def test_fifty_objects_on_six_grounds():
    assert len(OBJECTS) == 50
    assert CLASSES[50:] == GROUNDS
    assert len(sprites()) == 50
    assert all(sprite.mode == "RGBA" and max(sprite.size) >= 80 for sprite in sprites())


def test_a_seed_is_a_scene():
    one, same, other = make_scene((1, 0, 5)), make_scene((1, 0, 5)), make_scene((1, 0, 6))
    assert np.array_equal(one.image, same.image)
    assert np.array_equal(one.labels, same.labels)
    assert not np.array_equal(one.image, other.image)


@pytest.mark.parametrize("size", [64, 112, 200])
def test_shapes_and_labels(size):
    for seed in range(10):
        scene = make_scene(seed, size, objects=(2, 3), object_size=(20, 40))
        assert scene.image.shape == (size, size, 3)
        assert scene.image.dtype == scene.labels.dtype == np.uint8
        assert scene.labels.max() < len(CLASSES)
        present = scene.present()
        assert len([c for c in present if c < 50]) in (1, 2, 3)  # one may hide another
        assert len([c for c in present if c >= 50]) in (1, 2)


def test_labels_follow_the_cut_outs(monkeypatch):
    """On a plain ground, the pixels that differ from it in colour are those of the object, up to its soft edge."""
    blue = np.array((0, 0, 255), np.uint8)
    monkeypatch.setattr("rfclip.scenes._ground", lambda name, rng, size: np.tile(blue, (size, size, 1)))
    for seed in range(20):
        scene = make_scene(seed, 112, objects=(1, 1))
        covered = scene.labels == min(scene.present())
        ground = np.median(scene.image[~covered], axis=0)
        differs = np.abs(scene.image - ground).max(axis=2) > 40
        edge = np.zeros_like(covered)
        for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            edge |= np.roll(covered, shift, (0, 1)) != covered
        assert covered.sum() > 100
        assert (differs == covered)[~edge].mean() > 0.97


@pytest.mark.parametrize(
    "options",
    [{"objects": (3, 2)}, {"objects": (0, 51)}, {"object_size": (10, 300)}, {"object_size": (0, 10)}],
    ids=str,
)
def test_impossible_scenes(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_scene(0, 112, **options)


def test_the_small_clip_reaches_its_figures():
    """On a few scenes, with a margin for their spread; the README gives the figures for 300."""
    scores = {s.method: s for s in evaluate_scenes(rfclip.load_model(), METHODS, count=24)}
    assert list(scores) == list(METHODS)
    averaged = scores["kk-mean"]
    assert averaged.top1 >= 0.85
    assert averaged.miou >= 0.40
    assert averaged.pixel_accuracy >= 0.88
    assert scores["clip"].miou < 0.5 * averaged.miou
    assert set(averaged.iou) == set(CLASSES)


def test_without_dimensions_rf_clip_is_the_averaged_kk():
    model = rfclip.load_model()
    rows = list(
        evaluate_scenes(model, choices(model, ["clip", "kk", "kk-mean", "rf-clip"], model.refocus_config)[0], count=2)
    )
    if not model.refocus_config.distraction_dims:
        assert rows[3].iou == pytest.approx(rows[2].iou, abs=0, nan_ok=True)
        assert rows[3].top1 == rows[2].top1
    assert "forward" not in vars(model.visual)


def test_injection_makes_distraction_tokens_and_leaves_no_trace():
    model = rfclip.load_model()
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    plain = RefocusConfig(distraction_dims=())
    with torch.inference_mode(), rfclip.refocus(model, plain):
        before = rfclip.dense_features(model, images)
        seen = []
        block = model.visual.transformer.resblocks[3]
        hook = block.ln_1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with inject_distraction(model, 0.1):
            during = rfclip.dense_features(model, images)
        hook.remove()
        after = rfclip.dense_features(model, images)
    masks = rfclip.plugin.reference.distraction_mask(seen[0][:, 1:], INJECTED_DIMS)
    assert masks.sum(1).tolist() == [20, 20]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(before, after)
    assert not torch.allclose(before, during, atol=1e-2)


def test_refocusing_wins_back_what_injection_costs():
    model = rfclip.load_model()
    scenes = [make_scene((1, 0, number)) for number in range(6)]

    def accuracy(config, share):
        with inject_distraction(model, share), Segmenter(model, config=config) as segmenter:
            return np.mean([segmenter(scene.image, CLASSES).labels == scene.labels for scene in scenes])

    averaged, refocused = RefocusConfig(distraction_dims=()), RefocusConfig(distraction_dims=INJECTED_DIMS)
    clean, hurt, repaired = accuracy(averaged, 0), accuracy(averaged, 0.2), accuracy(refocused, 0.2)
    assert hurt < clean - 0.01
    assert repaired > (hurt + clean) / 2


def test_confusion_against_a_loop():
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(0, 5, (2, 13, 7))
    labels[labels == 4] = 255
    want = np.zeros((5, 5), int)
    for label, prediction in zip(labels.ravel(), predicted.ravel(), strict=True):
        if label != 255:
            want[label, prediction] += 1
    assert np.array_equal(confusion_matrix(labels, predicted, 5), want)


@pytest.mark.parametrize(
    "options, words", [({"count": 0}, "at least one scene"), ({"count": 1, "inject": 1.5}, "from 0 to 1")]
)
def test_wrong_evaluations(options, words):
    with pytest.raises(ValueError, match=words):
        list(evaluate_scenes(rfclip.load_model(), METHODS, **options))
