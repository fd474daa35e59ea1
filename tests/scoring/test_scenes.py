"""The procedural scenes, and the scores on them."""

import numpy as np
import pytest
import torch
from miniatures import scores_of
from PIL import Image

import rfclip
from rfclip import RefocusConfig, Segmenter, reference
from rfclip.datasets.scenes import Scenes
from rfclip.explanation.explanation import busiest, explain
from rfclip.scoring.metrics import Scores, confusion_matrix
from rfclip.scoring.run import Scorer
from rfclip.segment.job import Job
from rfclip.simulated_distraction import INJECTED_DIMS, inject_distraction
from rfclip.tiny.scenes import CLASSES, GROUNDS, OBJECTS, make_scene, sprites
from rfclip.towers.loading import tiny_folder


def scored(folder, method, **options):
    dataset = Scenes(**options)
    return scores_of(Scorer(Job(method=method), dataset), folder / method)


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
    monkeypatch.setattr("rfclip.tiny.scenes._ground", lambda name, rng, size: np.tile(blue, (size, size, 1)))
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


def test_the_small_clip_reaches_its_figures(tmp_path):
    """On a few scenes, with a margin for their spread; docs/results.md gives the figures for 300."""
    averaged, plain = (scored(tmp_path, method, count=24) for method in ("kk-mean", "clip"))
    assert averaged.top1 >= 0.85
    assert averaged.miou >= 0.40
    assert averaged.pixel_accuracy >= 0.88
    assert plain.miou < 0.5 * averaged.miou
    assert (averaged.images, averaged.singles, len(averaged.iou)) == (24, 24, len(CLASSES))


def test_scenes_with_objects_of_other_sizes():
    usual, small = Scenes(), Scenes(object_size=(20, 21))
    item = usual.items(1)[0]
    labels = small.read(item)[1]
    assert np.array_equal(usual.read(item)[1], make_scene((1, 0, 0)).labels)
    assert np.array_equal(labels, make_scene((1, 0, 0), object_size=(20, 21)).labels)
    for kind in np.unique(labels[labels < len(OBJECTS)]):
        rows, columns = np.nonzero(labels == kind)
        assert max(np.ptp(rows), np.ptp(columns)) < 21
    assert usual.described() != small.described()


def test_without_dimensions_rf_clip_is_the_averaged_kk(tmp_path):
    averaged, refocused = (scored(tmp_path, method, count=2) for method in ("kk-mean", "rf-clip"))
    assert np.array_equal(averaged.confusion, refocused.confusion)
    assert averaged.hits == refocused.hits


def test_injection_makes_distraction_tokens_and_leaves_no_trace():
    model = rfclip.load_model()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    plain = RefocusConfig(distraction_dims=())
    with torch.inference_mode(), rfclip.refocus(model, plain):
        before = rfclip.dense_features(model, images)
        seen = []
        block = model.visual.transformer.resblocks[3]
        with inject_distraction(model, 0.1):
            hook = block.ln_1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
            during = rfclip.dense_features(model, images)
        hook.remove()
        after = rfclip.dense_features(model, images)
    masks = reference.distraction_mask(seen[0][:, 1:], INJECTED_DIMS, 5 / 128)
    assert masks.sum(1).tolist() == [20, 20]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(before, after)
    assert not torch.allclose(before, during, atol=1e-2)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_injected_tokens_draw_more_attention_than_their_share_until_refocused():
    """Relative to their share of the tokens: on the scene of the docs, and on average over a few more."""
    model, config = rfclip.load_model(), RefocusConfig(distraction_dims=INJECTED_DIMS)
    scenes = [Image.open(tiny_folder() / "scene.png"), *(make_scene((1, 0, number)).picture() for number in range(3))]
    received = []
    for options in ({"attraction": 0}, {}):
        with inject_distraction(model, 0.1, **options):
            found = [explain(model, scene, config=config) for scene in scenes]
        block = busiest(found[0].moved, found[0].distraction) - 1
        tokens = found[0].distraction[block]
        received.append([[view.received[block][tokens].sum() / tokens.mean() for view in one.views] for one in found])
    (unmoved, _), (before, after) = np.transpose(received, (0, 2, 1))
    assert unmoved.max() < 0.5
    assert before[0] > 1 > after[0]
    assert after.mean() < 0.6 * before.mean()


def test_refocusing_recovers_what_injection_costs():
    model = rfclip.load_model()
    scenes = [make_scene((1, 0, number)) for number in range(6)]

    def accuracy(config, share):
        with inject_distraction(model, share), Segmenter(model, config=config) as segmenter:
            return np.mean([segmenter(scene.picture(), CLASSES).labels == scene.labels for scene in scenes])

    averaged, refocused = RefocusConfig(distraction_dims=()), RefocusConfig(distraction_dims=INJECTED_DIMS)
    clean, hurt, repaired = accuracy(averaged, 0), accuracy(averaged, 0.3), accuracy(refocused, 0.3)
    assert hurt < clean - 0.01
    assert repaired > (hurt + clean) / 2


def test_confusion_against_a_loop():
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(0, 5, (2, 13, 7))
    labels[labels == 4], predicted[:3, :2] = 255, 255  # neither a label nor a class
    want = np.zeros((5, 6), int)
    for label, prediction in zip(labels.ravel(), predicted.ravel(), strict=True):
        if label != 255:
            want[label, min(prediction, 5)] += 1
    found = confusion_matrix(labels, predicted, 5)
    assert np.array_equal(found, want) and found[:, 5].any()
    missed = (labels == 0) & (predicted != 0)
    wrong = (labels != 0) & (labels != 255) & (predicted == 0)
    hit = (labels == 0) & (predicted == 0)
    assert Scores(1, 0.0, found).iou[0] == hit.sum() / (hit | missed | wrong).sum()


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_wrong_shares(share):
    with pytest.raises(ValueError, match="from 0 to 1"), inject_distraction(rfclip.load_model(), share):
        pass
