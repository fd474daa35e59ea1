"""What `rfclip.explanation.explain` returns, against whole attention matrices in float64 and what must hold of them."""

import numpy as np
import pytest
import torch
from small_models import DIMS, small_clip, to_hugging_face

import rfclip
from rfclip import RefocusConfig
from rfclip.explanation import explain, explanation
from rfclip.methods import find_protocol
from rfclip.ops import operations
from rfclip.towers import read_tower
from rfclip.towers.loading import load_model, tiny_folder

CONFIG = RefocusConfig(DIMS, tau=3.0)


def plain_blocks(model, picture):
    """Input and head-averaged attention of every plain block, from open_clip's own modules."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double() / 255
    visual, found = model.visual, []
    x = read_tower(model).embed(visual.conv1((x - 0.5) / 0.25), operations("reference"))
    for block in visual.transformer.resblocks:
        y = block.ln_1(x)
        found.append((x[0], block.attn(y, y, y, average_attn_weights=True)[1][0]))
        x = block(x)
    return found


def test_the_plain_view(seen, model, picture):
    found = seen(model, picture, points=[(0, 0), (39, 23), (17, 9)])
    assert (found.grid, found.points, found.layers) == ((3, 5), ((0, 0), (2, 4), (1, 2)), (1, 2, 3, 4))
    profile = []
    for number, (x, A) in enumerate(plain_blocks(model, picture)):
        close = {"rtol": 0, "atol": 2e-4}  # pictures are normalized in float32, and colours grow in the tower
        np.testing.assert_allclose(found.before.attention[number + 1], A.detach(), **close)
        np.testing.assert_allclose(found.before.received[number], A[1:, 1:].mean(dim=0).detach(), **close)
        for place, row in enumerate((1, 15, 8)):
            np.testing.assert_allclose(found.before.pointed[number, place], A[row, 1:].detach(), **close)
        f = (x - x.min(dim=-1, keepdim=True).values)[1:]
        w = f / f.sum(dim=-1, keepdim=True)
        np.testing.assert_allclose(found.before.weights[number], w[:, list(DIMS)].max(dim=-1).values.detach(), **close)
        profile.append(w.mean(dim=0).detach())
    np.testing.assert_allclose(found.before.profile, torch.stack(profile).mean(dim=0), atol=1e-4)


def test_what_refocusing_moves(seen, model, picture):
    """Attention goes from the distraction tokens to the defocused ones, and none is lost."""
    found = seen(model, picture)
    assert found.distraction.any()
    gave, got = found.moved < -1e-7, found.moved > 1e-7
    assert gave.any()
    assert (gave <= found.distraction).all()
    assert (got <= found.defocused).all()
    assert not (found.distraction & found.defocused).any()
    np.testing.assert_allclose(found.moved.sum(axis=1), 0, atol=1e-6)
    for A in found.after.attention.values():
        np.testing.assert_allclose(A.sum(axis=1), 1, atol=1e-5)
    assert np.isfinite(found.fiedler[found.defocused.any(axis=1)]).all()
    assert (found.after.weights[found.distraction] < found.before.weights[found.distraction]).mean() > 0.9
    assert found.thresholds == (3 / 48, None)
    assert "forward" not in vars(model.visual)


def test_bands_of_rows_change_nothing(seen, model, picture, monkeypatch):
    want = seen(model, picture)
    monkeypatch.setattr(explanation, "CHUNK", 1)
    found = seen(model, picture)
    for name in ("received", "pointed", "weights"):
        np.testing.assert_allclose(getattr(found.after, name), getattr(want.after, name), atol=1e-7)
    np.testing.assert_allclose(found.after.attention[2], want.after.attention[2], atol=1e-7)


def test_hugging_faces_model(seen, model, picture):
    other = to_hugging_face(model)
    other.image_mean, other.image_std = (0.5,) * 3, (0.25,) * 3
    found, want = seen(other, picture), seen(model, picture)
    np.testing.assert_allclose(found.moved, want.moved, atol=1e-6)
    np.testing.assert_allclose(found.after.received, want.after.received, atol=1e-6)


@pytest.mark.parametrize(
    "moves, shown",
    [
        ({}, (3, 6, 9, 12)),
        ({7: 1}, (3, 7, 9, 12)),
        ({7: 1, 2: 5}, (2, 6, 9, 12)),
        ({11: 1}, (3, 6, 11, 12)),
        ({9: 1}, (3, 6, 9, 12)),
    ],
    ids=str,
)
def test_the_block_that_moves_most_is_shown(moves, shown):
    """It replaces the nearest of four; where nothing moves, it is the one with the most distraction tokens."""
    moved, distraction = np.zeros((12, 5)), np.zeros((12, 5), bool)
    for number, amount in moves.items():
        moved[number - 1, :2] = -amount, amount
    assert explanation._with_layer(explanation._layers(None, 12), explanation.busiest(moved, distraction)) == shown
    distraction[4, 1:3] = True
    assert explanation.busiest(np.zeros((12, 5)), distraction) == 5


def test_the_layers_of_a_deep_tower(picture):
    model = small_clip(layers=8)
    model.visual.image_mean, model.visual.image_std = (0.5,) * 3, (0.25,) * 3
    found = explain(model, picture, CONFIG, short_side=24)
    assert 1 + np.abs(found.moved).sum(axis=1).argmax() in found.layers
    assert len(found.layers) == 4 and found.layers[-1] == 8 and set(found.after.attention) == set(found.layers)


@pytest.mark.parametrize("last, protocol", [("rf-clip", "own"), ("released", "own"), ("released", "own:voc21")])
def test_the_small_clip_with_classes(last, protocol):
    """It has no distraction dimensions: nothing moves, and each method segments the picture as usual."""
    model, scene = load_model(), tiny_folder() / "scene.png"
    names = "tiger, mushroom, grass, sky"
    found = explain(model, scene, classes=names, method=last, protocol=protocol)
    assert (found.moved == 0).all() and not found.distraction.any()
    np.testing.assert_array_equal(found.before.received, found.after.received)
    assert found.layers == (2, 3, 4, 6)
    assert set(found.before.attention) == set(found.layers)
    assert list(found.segmentations) == ["clip", "kk-mean", last]
    for post in ("crf", "resclip"):
        with pytest.raises(ValueError, match=f"post='{post}'"):
            explain(model, scene, classes=names, post=post)
    refined = explain(model, scene, classes=names, method=last, protocol=protocol, post="pamr")
    for method in found.segmentations:
        with rfclip.Segmenter(model, method=method, protocol=find_protocol(protocol, method)) as segmenter:
            want = segmenter(scene, names)
            pamr = segmenter(scene, names, post="pamr")
        np.testing.assert_array_equal(refined.segmentations[method].labels, pamr.labels)
        np.testing.assert_array_equal(found.segmentations[method].labels, want.labels)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"layers": [0, 2]}, "expected numbers from 1 to 4"),
        ({"layers": []}, "expected numbers from 1 to 4"),
        ({"points": [(40, 3)]}, "outside the picture of 40 x 24"),
        ({"short_side": 7}, "at least a patch, 8"),
        ({"memory_limit": 100}, "ask for fewer layers"),
        ({"method": "naclip"}, "'naclip': expected 'rf-clip' or 'released'"),
    ],
)
def test_wrong_arguments(model, picture, options, words):
    with pytest.raises(ValueError, match=words):
        explain(model, picture, CONFIG, **options)


def test_a_refocused_model_is_refused(model, picture):
    with rfclip.refocus(model, CONFIG), pytest.raises(RuntimeError, match="refocused: undo that first"):
        explain(model, picture, CONFIG)
