"""Every method's own protocol: its constants, and its rules against independent ones in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import rand, randn, relative_error
from oracles import rules
from oracles.methods import Plain, cliper_rounds, cliptrase, formula, itaclip_views, proxyclip
from oracles.post import propagated
from oracles.released_evaluation import resize_planes, resized_size, windows
from PIL import Image
from small_models import DIMS, pictures, small_clip
from timm.models.vision_transformer import VisionTransformer

import rfclip
from rfclip.datasets import in_paper
from rfclip.methods import METHODS, Protocol, find_protocol
from rfclip.methods import proxyclip as proxyclip_file
from rfclip.methods.cliper import Fused, _balanced
from rfclip.methods.cliptrase import dbscan_constants
from rfclip.methods.peers import AreaRule
from rfclip.methods.rule import Rule
from rfclip.methods.two_streams import FeatureSurgery, min_max
from rfclip.ops import operations
from rfclip.segment.windows import resized_as_opencv
from rfclip.towers import read_tower

pytestmark = pytest.mark.usefixtures("no_grad")

COMMON = {
    "short_side": 336,
    "window": 224,
    "stride": 112,
    "resizing": "antialiased",
    "padding": None,
    "position_offset": 0,
    "imagenet": False,
    "templates": "imagenet",
    "logit_scale": 40,
    "threshold": 0.1,
    "post": "none",
    "refined": "resized",
    "rule": "rule:Rule",
    "options": {},
}
WHOLE = {"window": None}
WHOLE_VOC = {"cityscapes": {"short_side": 560}, "voc20": WHOLE, "voc21": WHOLE}
AREA = {"rule": "peers:AreaRule", "options": {"share": 0.1}}


def fused_options(cut, scale, score, least, stretched=False):
    """CLIPer's constants in the order of the published table."""
    return {"options": {"cut": cut, "scale": scale, "score": score, "least": least, "stretched": stretched}}


# What differs from RF-CLIP's protocol, and from that on some datasets.
TABLE = {
    "sclip": (
        {"resizing": "mmcv"},
        {
            "cityscapes": {"short_side": 560},
            "coco_stuff": {"short_side": 448},
            "voc21": {"logit_scale": 65, **AREA},
            "context60": {"logit_scale": 50},
            "coco_object": {"logit_scale": 50},
        },
    ),
    "naclip": (
        {"resizing": "mmcv", "post": "pamr", "refined": "given"},
        {
            "cityscapes": {"short_side": 560},
            "voc20": WHOLE | {"rule": "peers:AtOnce"},
            "voc21": WHOLE | {"rule": "peers:AtOnce"},
        },
    ),
    "resclip-rcs": ({"resizing": "mmcv"}, WHOLE_VOC),
    "resclip": ({"resizing": "mmcv", "post": "resclip"}, WHOLE_VOC),
    "pearl": ({"resizing": "mmcv", "post": "pearl"}, WHOLE_VOC),
    **{
        method: (
            {"resizing": "mmcv", "stride": 28, "post": "pamr", "refined": "given", "rule": rule},
            {
                "cityscapes": {"short_side": 560},
                "coco_stuff": {"short_side": 448},
                "voc21": {"logit_scale": 60, "rule": on_voc21, "options": {"share": 0.1}},
                "context60": {"logit_scale": 55},
                "coco_object": {"logit_scale": 50},
            },
        )
        for method, rule, on_voc21 in (
            ("itaclip", "rule:Rule", "peers:AreaRule"),
            ("itaclip-views", "itaclip:MeanOfViews", "itaclip:MeanOfViewsByArea"),
        )
    },
    "clearclip": (
        {"resizing": "mmcv", "short_side": 448, "window": 448, "stride": 224, "logit_scale": 50, "padding": "patch"}
        | {"threshold": 0.5},
        {
            "cityscapes": {"window": 224},
            "context60": {"threshold": 0.15},
            "coco_object": {"threshold": 0.4},
        },
    ),
    "sc-clip": (
        {"resizing": "mmcv", "threshold": 0.15},
        {
            "cityscapes": {"short_side": 560},
            "voc21": {"logit_scale": 50, **AREA},
            "coco_object": {"logit_scale": 55, "threshold": 0.35},
        },
    ),
    "cliper": (
        WHOLE
        | {"resizing": "patches", "logit_scale": 1, "threshold": None, "rule": "cliper:Fused"}
        | fused_options(0.2, 100, 0.3, 0.3),
        {
            "voc21": fused_options(0.1, 100, 0.7, 0.6, stretched=True),
            "voc20": fused_options(0.1, 100, 0, 0.001),
            "context60": fused_options(0.2, 100, 0.45, 0.45),
            "coco_object": fused_options(0.2, 50, 0.3, 0.3),
            "coco_stuff": fused_options(0.2, 50, 0.1, 0.1),
            "cityscapes": {"short_side": 560} | fused_options(0.35, 100, 0, 1e-4),
        },
    ),
    "sfp": (
        {"resizing": "mmcv", "threshold": 0.15},
        {
            "cityscapes": {"short_side": 560},
            "ade20k": {"short_side": 384},
            "voc21": {"logit_scale": 50, **AREA},
            "coco_object": {"logit_scale": 55, "threshold": 0.35},
        },
    ),
    "proxyclip": (
        {"resizing": "mmcv", "window": 336, "padding": 56, "threshold": 0.2},
        {
            "cityscapes": {"short_side": 448, "window": 224},
            "ade20k": {"short_side": 448},
            "context60": {"threshold": 0.15},
            "coco_object": {"threshold": 0.25},
        },
    ),
    "cliptrase": (
        WHOLE
        | {"short_side": 224, "resizing": "crop", "logit_scale": 100, "threshold": None}
        | {"rule": "cliptrase:Regions"},
        {"voc20": {"rule": "cliptrase:RegionsByPicture"}},
    ),
    "clip-surgery": (
        WHOLE
        | {"short_side": 512, "resizing": "square", "templates": "scene", "logit_scale": 1, "threshold": None}
        | {"rule": "two_streams:FeatureSurgery"},
        {},
    ),
    "gem": (
        WHOLE
        | {"short_side": 448, "resizing": "square", "templates": "photo", "logit_scale": 1, "threshold": None}
        | {"rule": "two_streams:MinMax"},
        {},
    ),
    "maskclip": (
        WHOLE
        | {"short_side": 512, "resizing": "mmcv", "padding": "patch", "imagenet": True, "templates": "scene"}
        | {"logit_scale": 100, "threshold": None},
        {"context59": {"short_side": 520}},
    ),
    **dict.fromkeys(("clip", "registers", "kk", "kk-mean", "rf-clip"), ({}, {"cityscapes": {"short_side": 560}})),
}  # test_released_evaluation.py has that of `released`


def test_the_protocols():
    assert {*TABLE, "released"} == set(METHODS)
    for method, (own, datasets) in TABLE.items():
        for dataset in in_paper():
            protocol = METHODS[method].protocol.on(dataset)
            want = COMMON | own | datasets.get(dataset, {})
            assert {key: getattr(protocol, key) for key in COMMON} == want, (method, dataset)
            fixed = find_protocol(f"own:{dataset}", method)
            assert fixed == replace(protocol, datasets={}) == fixed.on("cityscapes")


# The area rule


@pytest.mark.parametrize("threshold", [None, 0.3, 0.6])
@pytest.mark.parametrize("names", [[0], [0, 1], [0, 0, 1, 2, 2, 3], [0, 0, 0], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("size", [(41, 33), (1, 1)], ids=str)
def test_the_area_rule(names, size, threshold, monkeypatch):
    """Bands of a few rows."""
    monkeypatch.setattr("rfclip.methods.peers.BAND", 5 * len(names) * size[1])
    class_of_name, removed = torch.tensor(names), 0
    for seed in range(4):
        logits = randn(len(names), 5, 6, seed=seed) * 0.05
        logits[-1] -= 0.03
        probabilities = rules.class_probabilities(logits.numpy(), np.array(names), size, 40)
        for share in (0.1, 0.25):
            want = rules.labels_by_area(probabilities, share, threshold)
            for backend in ("eager", "reference"):
                ops = operations(backend, dtype=torch.float64)
                got = AreaRule(share).labels(ops, logits, size, 40.0, class_of_name, threshold)
                assert got.dtype == torch.int32
                np.testing.assert_array_equal(got.numpy(), want)
            removed += (want != rules.labels_by_area(probabilities, -1, threshold)).any()
    assert removed or len(set(names)) < 4 or size == (1, 1)


def area_labels(probabilities, share=0.1, threshold=None):
    """Labels of one row of pixels with these probabilities of classes [W, C]."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().T[:, None]
    classes = torch.arange(len(logits))
    ops = operations("reference", dtype=torch.float64)
    return AreaRule(share).labels(ops, logits, (1, len(probabilities)), 1.0, classes, threshold)[0].tolist()


def test_a_class_of_just_the_share_is_removed():
    """Of ten foreground pixels, one is class 2's: it goes to the class that is next, and the threshold is for that."""
    row = [[0.1, 0.8, 0.1]] * 9 + [[0.2, 0.3, 0.5]] + [[0.8, 0.1, 0.1]] * 5
    assert area_labels(row) == [1] * 10 + [0] * 5
    assert area_labels(row, threshold=0.4) == [1] * 9 + [-1] + [0] * 5
    assert area_labels(row, share=0.09) == [1] * 9 + [2] + [0] * 5
    assert area_labels([[0.1, 0.8, 0.1]] * 8 + [[0.2, 0.3, 0.5]]) == [1] * 8 + [2]


def test_the_area_rule_without_a_background():
    """A class 0 without a pixel is not removed, and gets those of small classes if it comes next."""
    assert area_labels([[0.1, 0.8, 0.1]] * 10 + [[0.4, 0.1, 0.5]]) == [1] * 10 + [0]
    assert area_labels([[0.8, 0.1, 0.1]] * 4) == [0] * 4


# CLIP Surgery and GEM


@pytest.mark.parametrize("K", [1, 2, 7])
def test_feature_surgery(K):
    rule = METHODS["clip-surgery"].protocol.load_rule()
    patches, image = F.normalize(randn(3, 20, 4, 5, seed=1), dim=1), F.normalize(randn(3, 20, seed=2), dim=-1)
    text, empty = F.normalize(randn(K, 20, seed=3), dim=-1), F.normalize(randn(1, 20, seed=4), dim=-1)
    asked = []
    known = rule.knows(text, lambda names: asked.append(names) or empty, torch.zeros(K, dtype=torch.bool))
    assert asked == ([("",)] if K == 1 else []) and (known is None) == (K > 1)
    got = rule.window(patches, image, text, known)
    want = [rules.surgery(*(u.numpy() for u in (*each, text, empty[0]))) for each in zip(patches, image, strict=True)]
    assert relative_error(got, torch.from_numpy(np.stack(want))) < 1e-12
    assert got.amin() == 0 and got.amax() == 1


def test_constant_maps():
    """A blank picture, and names that are all the same."""
    maps = torch.stack([torch.ones(3, 4), torch.arange(12.0).view(3, 4)])
    assert min_max(maps).tolist() == [[[0.0] * 4] * 3, (maps[1] / 11).tolist()]
    maps[1, 0, 0] = torch.nan  # or the segmenter would not see that a model is damaged
    assert min_max(maps).isnan().flatten(1).any(dim=1).tolist() == [False, True]
    patches, image = torch.eye(4)[:1, :, None, None].expand(-1, -1, 2, 3), torch.eye(4)[:1]
    for text in (torch.eye(4)[:2], torch.eye(4)[:1].expand(2, -1)):
        assert not FeatureSurgery().window(patches, image, text, None).any()


def test_min_max_over_pixels():
    rule = METHODS["gem"].protocol.load_rule()
    logits = rand(3, 9, 7, seed=0)
    want = np.stack([rules.stretched(plane) for plane in logits.numpy()])
    assert relative_error(rule.picture(logits), torch.from_numpy(want)) < 1e-12


# CLIPtrase


def test_constants_of_dbscan():
    """Those of the authors at 224 and 336."""
    for side, eps, least in ((14, 0.7, 3), (21, 1.1, 7)):
        found = dbscan_constants(side**2)
        assert (found["eps"], found["min_samples"]) == (pytest.approx(eps, rel=1e-12), least)
    assert dbscan_constants(1)["min_samples"] == 2


def on_tower(name, model):
    return METHODS[name](read_tower(model), None, "auto")


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (5, 9), (2, 2), (1, 1)], ids=str)
def test_regions(grid):
    model = small_clip(image_size=56, planted=False)
    method, rule, regions = on_tower("cliptrase", model), METHODS["cliptrase"].protocol.load_rule(), set()
    for seed in range(4):
        image = four_grounds(grid[0] * 8, grid[1] * 8, seed)
        labels = np.random.default_rng(seed).choice([-1, 0, 1, 1, 4], (37, 52)).astype(np.int32)
        labels[18:, ::2], labels[:, 30::2] = 4, 0
        got = rule.regions(method, method.tower.patches(image), torch.from_numpy(labels))
        want = rules.labels_by_region(rules.correlations(Plain(model, image[0])), grid, labels)
        np.testing.assert_array_equal(got.numpy(), want)
        regions |= set() if (want == labels).all() else {len(np.unique(want))}
    assert max(regions, default=0) > (0 if grid[0] < 5 else 1) or grid == (1, 1)


def four_grounds(height, width, seed):
    """A picture [1, 3, H, W] of four colours and a little noise."""
    places = torch.zeros(height, width, dtype=torch.int64)
    places[:, width // 2 :], places[height // 3 :, : width // 3], places[height // 2 :, width // 2 :] = 1, 2, 3
    return (0.1 * randn(3, height, width, seed=seed) + randn(3, 4, seed=seed)[:, places])[None]


def test_no_region_no_vote():
    """A single patch is noise."""
    method = on_tower("cliptrase", small_clip())
    labels = torch.tensor([[3, 1], [1, -1]], dtype=torch.int32)
    patches = method.tower.patches(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert METHODS["cliptrase"].protocol.load_rule().regions(method, patches, labels).equal(labels)


def test_a_tie_goes_to_the_first_class():
    """A blank picture is a single region."""
    method, labels = on_tower("cliptrase", small_clip(planted=False)), torch.tensor([[3, 1], [1, 3]]).int()
    model_input = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    method.tower.module.positional_embedding.zero_()
    found = METHODS["cliptrase"].protocol.load_rule().regions(method, method.tower.patches(model_input), labels)
    assert found.tolist() == [[1, 1], [1, 1]]


def test_logits_of_the_picture():
    """Those of the class token of the changed block."""
    model, images = small_clip(), pictures(count=2, height=32, width=40)
    method, rule = on_tower("cliptrase", model), METHODS["cliptrase"].protocol.on("voc20").load_rule()
    dense, image = method.dense_and_image(method.tower.patches(images))
    assert relative_error(dense, formula("cliptrase", model, images)) < 1e-12
    first = torch.stack([torch.from_numpy(cliptrase(Plain(model, each))[0]) for each in images])
    assert relative_error(image, model.visual.ln_post(first) @ model.visual.proj) < 1e-12
    text = F.normalize(randn(3, 20, seed=0), dim=-1)
    dense, image = F.normalize(dense, dim=1), F.normalize(image, dim=-1)
    got = 100 * rule.window(dense, image, text, None)
    want = torch.einsum("kc,bchw,bk->bkhw", 100 * text, dense, 100 * image @ text.T)
    assert relative_error(got, want) < 1e-12


# CLIPer


def random_scores(K, seed, grid=(5, 6)):
    z, text = F.normalize(randn(2, 4, 20, *grid, seed=seed), dim=2), F.normalize(randn(K, 20, seed=seed + 1), dim=-1)
    return z, rand(2, grid[0] * grid[1], grid[0] * grid[1], seed=seed + 2).softmax(dim=-1), text


@pytest.mark.parametrize("background", [[], [0], [1, 2], [0, 1, 2, 3, 4]], ids=str)
def test_fused_scores(background):
    """Names of a background only take part in the softmax; without others, there is nothing to find."""
    z, B, text = random_scores(5, 0)
    rule = METHODS["cliper"].protocol.on("voc21").load_rule()
    mask = torch.tensor([c in background for c in range(5)])
    known = rule.knows(text, None, mask)
    got = rule.window((z, B), None, text, known)
    assert not got[:, mask].any() and (got[:, ~mask] > 0).all()
    if not mask.all():
        want = [rules.fused(*(u.numpy() for u in (*each, text, mask)), 100, 0.1) for each in zip(z, B, strict=True)]
        assert relative_error(got, torch.from_numpy(np.stack(want))) < 1e-12


@pytest.mark.parametrize("size", [(41, 33), (5, 6), (3, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("stretched", [False, True])
def test_fused_labels(stretched, size, monkeypatch):
    """The extrema of a few maps at a time, some of them out of reach."""
    monkeypatch.setattr("rfclip.methods.cliper.BAND", 3 * size[0] * size[1])
    class_of_name, kinds = torch.tensor([0, 0, 1, 2, 3, 3]), set()
    weight = torch.linspace(0.2, 1, 6, dtype=torch.float64)[:, None, None]
    for seed in range(4):
        scores = 0.25 + 0.7 * weight * rand(6, 5, 6, seed=seed)
        scores[1] = 0.8  # a constant map, which is not stretched
        for score, least, threshold in ((0.5, 0.6, None), (0, 0.4, None), (0, 0.4, 0.9)):
            deciding = score, threshold or least, stretched
            want = rules.labels_by_score(scores.numpy(), size, class_of_name.numpy(), *deciding)
            kinds |= set(np.unique(want))
            for backend in ("eager", "reference"):
                ops = operations(backend, dtype=torch.float64)
                rule = Fused(100, 0.1, score, least, stretched)
                got = rule.labels(ops, scores, size, 1.0, class_of_name, threshold)
                np.testing.assert_array_equal(got.numpy(), want)
    assert len(kinds) > 2 or size == (1, 1)


def test_a_name_that_just_reaches_the_score_is_out():
    ops, maps = operations("reference", dtype=torch.float64), torch.tensor([0.3, 0.3 + 1e-9], dtype=torch.float64)
    rule, maps = Fused(100, 0.2, 0.3, 0.1), maps[:, None, None]
    assert rule.labels(ops, maps[:1], (1, 2), 1.0, torch.tensor([0]), None).tolist() == [[-1, -1]]
    assert rule.labels(ops, maps, (1, 2), 1.0, torch.arange(2), None).tolist() == [[1, 1]]


def test_what_blocks_gather():
    """The embeddings of all blocks and the map, on any grid; one where all queries attend alike has no NaN."""
    model = small_clip(layers=5, planted=False)
    method = on_tower("cliper", model)
    for images in (pictures(count=2, height=32, width=40), torch.zeros(1, 3, 8, 8, dtype=torch.float64)):
        z, B = method.fused(method.tower.patches(images))
        for image, got, attention in zip(images, z, B, strict=True):
            rounds = cliper_rounds(Plain(model, image))
            for of_block, (want, _) in zip(got, rounds, strict=True):
                want = model.visual.ln_post(torch.from_numpy(want[1:])) @ model.visual.proj
                assert relative_error(of_block.flatten(1).T, want) < 1e-11
            assert relative_error(attention, torch.from_numpy(rounds[-1][1].mean(axis=0)[1:, 1:])) < 1e-11


def test_maps_without_anything_left():
    """As of a tower whose blocks attend evenly: every token attends to itself."""
    A = list(_balanced(torch.full((1, 2, 4, 4), 0.25), 3))
    assert all(each.equal(torch.eye(4).expand(1, 2, 4, 4)) for each in A)


@pytest.mark.parametrize("dataset", ["voc21", "context59"])
def test_cliper_on_whole_pictures(dataset, segmenter):
    """Both sides are whole patches; labels by the rule, probabilities by the softmax of scores."""
    model, picture = model_with_statistics(layers=5), photograph(61, 83)
    made, text, names = segmenter("cliper", dataset, model)
    x = made.windows.picture(picture, made.tower).double()
    assert x.shape == (3, 48, 64)
    rounds = cliper_rounds(Plain(model, x))
    z = [model.visual.ln_post(torch.from_numpy(u[1:])) @ model.visual.proj for u, _ in rounds]
    z, B = [u.T.reshape(-1, 6, 8).numpy() for u in z], rounds[-1][1].mean(axis=0)[1:, 1:]
    names[0], (scale, cut, *deciding) = ("background",), METHODS["cliper"].protocol.on(dataset).options.values()
    scores = rules.fused(z, B, text.numpy(), np.arange(5) == 0, scale, cut)
    want = rules.labels_by_score(scores, (61, 83), np.arange(5), *deciding)
    found = made.segment(picture, names, probabilities=True)
    np.testing.assert_allclose(
        found.probabilities, rules.class_probabilities(scores, np.arange(5), (61, 83), 1), atol=1e-3
    )
    assert len(np.unique(want)) > 2 and (want < 0).any()
    assert agreeing(np.where(want < 0, 0, want), found.labels) > 0.99


@pytest.mark.parametrize(
    "size, want",
    [((100, 100), (48, 48)), ((61, 83), (48, 64)), ((75, 51), (72, 48)), ((90, 100), (48, 56)), ((1, 7), (48, 336))],
    ids=str,
)
def test_whole_patches(size, want, segmenter):
    """Halves are rounded up."""
    model = model_with_statistics()
    made, *_ = segmenter("cliper", "voc20", model)
    assert made.windows.resized(*size) == want
    assert replace(made.windows, long_side=40).resized(30, 70) == (16, 40)
    assert replace(made.windows, window=32, stride=16, short_side=36).resized(10, 30) == (40, 112)


def test_another_method_has_no_such_maps():
    with pytest.raises(ValueError, match="the protocol of cliper needs what only that method computes, and .* 'kk'"):
        rfclip.Segmenter(small_clip(), method="kk", protocol=METHODS["cliper"].protocol, tokenizer=list)


# From pictures to labels


def photograph(height, width, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 60, (height, width, 3))
    x[:, width // 2 :, 0] += 120
    x[height // 3 :, : width // 3, 1] += 150
    return Image.fromarray(x.astype(np.uint8))


@pytest.fixture
def segmenter():
    """Makes a segmenter on the small tower with embeddings of names in place of a text tower."""
    opened = []

    def make(method, dataset, model, names=5):
        made = rfclip.Segmenter(
            model, method=method, protocol=METHODS[method].protocol.on(dataset), tokenizer=lambda prompts: None
        )
        opened.append(made)
        # Patches of a picture without what its patches have in common, or one name would win everywhere.
        seen = formula("maskclip" if method == "proxyclip" else method, model, photographed(model, 80, 120))
        seen = seen.flatten(2)[0].T
        common = F.normalize(seen.mean(dim=0), dim=0)
        chosen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(5))[:names]]
        embeddings = F.normalize(chosen - (chosen @ common)[:, None] * common, dim=-1)
        made.text_embeddings = lambda asked: embeddings.float()
        return made, embeddings, [(str(number),) for number in range(names)]

    yield make
    for each in opened:
        each.close()


def photographed(model, height, width):
    """A photograph as the tower takes it, [1, 3, height, width]."""
    return normalized(model, photograph(height, width))[None]


def normalized(model, pixels, mean=None, std=None):
    mean, std = (np.array(value) for value in (mean or model.visual.image_mean, std or model.visual.image_std))
    return torch.from_numpy(((np.asarray(pixels) / 255 - mean) / std).transpose(2, 0, 1).copy())


def as_mmcv(picture, short, long):
    pixels = np.asarray(picture)
    size = resized_size(*pixels.shape[:2], short, long)
    return resized_as_opencv(torch.from_numpy(pixels.copy()).movedim(2, 0), size).movedim(0, 2).numpy()


def model_with_statistics(**vision):
    model = small_clip(planted=False, **vision)
    model.visual.image_mean, model.visual.image_std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    return model


def logits_of(features, text):
    return np.einsum("kc,chw->khw", text.numpy(), F.normalize(features[0], dim=0).numpy())


def agreeing(got, want):
    return (got == want).mean()


def check(made, picture, names, logits, **options):
    """A segmentation by one name per class against logits [K, h, w] in float64: probabilities and labels."""
    found = made.segment(picture, names, probabilities=True, **options)
    size = picture.size[::-1]
    want = rules.class_probabilities(logits, np.arange(len(names)), size, made.protocol.logit_scale)
    np.testing.assert_allclose(found.probabilities, want, atol=1e-4)
    assert agreeing(found.labels, want.argmax(axis=0)) > 0.998
    assert len(np.unique(found.labels)) > 1 or min(size) <= 30


def in_windows(x, window, stride, padding, features_of, text, logits_of=logits_of):
    """Logits [K, h, w] of a normalized picture, of windows that are padded to a multiple on both sides."""
    h, w = x.shape[1:]
    total, count = np.zeros((len(text), h, w)), np.zeros((h, w))
    for top, bottom in windows(h, window, stride):
        for left, right in windows(w, window, stride):
            part = x[None, :, top:bottom, left:right]
            down, across = -(bottom - top) % padding, -(right - left) % padding
            padded = F.pad(part, (across // 2, across - across // 2, down // 2, down - down // 2))
            planes = resize_planes(logits_of(features_of(padded), text), *padded.shape[2:])
            planes = planes[:, down // 2 :, across // 2 :][:, : bottom - top, : right - left]
            total[:, top:bottom, left:right] += planes
            count[top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize("size", [(75, 111), (30, 900), (900, 30), (1, 1)], ids=str)
def test_padded_windows_of_clearclip(size, segmenter):
    """Only pictures so long that a side falls below the window are padded."""
    model = model_with_statistics()
    made, text, names = segmenter("clearclip", "context59", model)
    assert (made.windows.window, made.windows.stride, made.windows.long_side) == (64, 32, 293)
    picture = photograph(*size)
    x = normalized(model, as_mmcv(picture, 64, 293))
    logits = in_windows(x, 64, 32, 8, lambda images: formula("clearclip", model, images), text)
    check(made, picture, names, logits)


@pytest.mark.parametrize("size", [(75, 90), (10, 300), (1, 1)], ids=str)
def test_padded_windows_of_proxyclip(size, segmenter, monkeypatch):
    """The sides, multiples of 56, are none of the patch, 16."""
    torch.manual_seed(3)
    kind = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
    dino = VisionTransformer(img_size=32, patch_size=4, **kind).eval().double()
    monkeypatch.setattr(proxyclip_file, "load_dino", lambda: dino)
    model = model_with_statistics(image_size=112, patch_size=16)
    made, text, names = segmenter("proxyclip", "context59", model)
    windows = made.windows
    assert (windows.window, windows.stride, windows.padding, windows.long_side) == (160, 53, 56, 1024)
    picture = photograph(*size)
    x = normalized(model, as_mmcv(picture, 160, 1024))
    logits = in_windows_where_short(x, lambda images: proxyclip(model, images, dino), text)
    check(made, picture, names, logits)


def in_windows_where_short(x, features_of, text):
    """The window of this tower, 160, is no multiple of 56 itself: sides that reach it are not padded."""
    (h, w), side = x.shape[1:], 160
    if min(h, w) >= side:
        return in_windows(x, side, 53, 1, features_of, text)
    tall = h < side
    padding = -(h if tall else w) % 56
    before, after = padding // 2, padding - padding // 2
    padded = F.pad(x, (0, 0, before, after) if tall else (before, after, 0, 0))
    logits = in_windows(padded, side, 53, 1, features_of, text)
    return logits[:, before : before + h] if tall else logits[:, :, before : before + w]


def test_naclip_on_whole_pictures(segmenter):
    """One step from patches to the picture's own pixels, then PAMR there."""
    model, picture = model_with_statistics(), photograph(61, 83)
    made, text, names = segmenter("naclip", "voc20", model)
    x = normalized(model, as_mmcv(picture, 48, 293))[None]
    whole = x[:, :, : x.shape[2] // 8 * 8, : x.shape[3] // 8 * 8]
    logits = resize_planes(logits_of(formula("naclip", model, whole), text), 61, 83)
    check(made, picture, names, logits, post="none")
    image = torch.from_numpy(resize_planes(x[0].numpy(), 61, 83))[None]
    refined = rfclip.reference.pamr(image, torch.from_numpy(logits)[None], iterations=10, dilations=[8, 16])[0]
    check(made, picture, names, refined.numpy())
    assert np.abs(refined.numpy() - logits).max() > 0.01


@pytest.mark.parametrize("size", [(61, 83), (200, 90), (1, 30)], ids=str)
def test_pearl_on_whole_pictures(size, segmenter):
    """Propagated at the size of the picture as given, along the edges of the resized one."""
    model, picture = model_with_statistics(), photograph(*size)
    made, text, names = segmenter("pearl", "voc21", model)
    x = normalized(model, as_mmcv(picture, 48, 293))
    logits = in_whole(x, lambda images: formula("pearl", model, images), text)
    check(made, picture, names, logits, post="none")
    check(made, picture, names, propagated(logits, x.numpy(), text.double().numpy(), size))


def in_whole(x, features_of, text):
    """Logits [K, h, w] of a normalized picture that is seen as a whole, without what is beyond its whole patches."""
    part = x[None, :, : x.shape[1] // 8 * 8, : x.shape[2] // 8 * 8]
    return resize_planes(logits_of(features_of(part), text), *x.shape[1:])


def test_maskclip_on_whole_pictures(segmenter):
    """ImageNet's statistics, padded to whole patches."""
    model, picture = model_with_statistics(), photograph(61, 84)
    made, text, names = segmenter("maskclip", "voc20", model)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = normalized(model, as_mmcv(picture, 73, 293), mean, std)
    logits = in_windows(x, None, None, 8, lambda images: formula("maskclip", model, images), text)
    check(made, picture, names, logits)


@pytest.mark.parametrize("method", ["gem", "clip-surgery"])
def test_maps_of_whole_pictures(method, segmenter):
    model = model_with_statistics(layers=6)
    made, text, names = segmenter(method, "voc20", model)
    side = made.windows.short_side
    assert side == {"gem": 64, "clip-surgery": 72}[method]
    for size in ((60, 90), (1, 1)):
        picture = photograph(*size)
        x = made.windows.picture(picture, made.tower).double()[None]
        features = formula(method, model, x)
        if method == "gem":
            logits = resize_planes(logits_of(features, text), side, side)
            maps = np.stack([rules.stretched(plane) for plane in logits])
        else:
            image = F.normalize(plain_image(model, x), dim=-1)[0]
            maps = rules.surgery(F.normalize(features[0], dim=0).numpy(), image.numpy(), text.numpy(), None)
        check(made, picture, names, maps)


def plain_image(model, x):
    return model.visual.ln_post(torch.from_numpy(Plain(model, x[0]).F[-1][:1])) @ model.visual.proj


def test_cliptrase_on_whole_pictures(segmenter):
    """Its crop is square, and what is beyond it has no class."""
    model, picture = model_with_statistics(image_size=56), photograph(60, 90)
    made, text, names = segmenter("cliptrase", "voc20", model)
    x = made.windows.picture(picture, made.tower).double()
    assert x.shape == (3, 56, 56)
    p = Plain(model, x)
    z = model.visual.ln_post(torch.from_numpy(cliptrase(p))) @ model.visual.proj
    z = F.normalize(z, dim=-1)
    logits = (100 * text @ z[1:].T) * (100 * text @ z[0])[:, None]
    labels = resize_planes(logits.numpy().reshape(-1, *p.grid), 60, 60).argmax(axis=0)
    want = rules.labels_by_region(rules.correlations(p), p.grid, labels)
    found = made.segment(picture, names).labels
    assert agreeing(want, labels) < 0.9
    assert (found[:, :15] == 255).all() and (found[:, 75:] == 255).all()
    assert agreeing(found[:, 15:75], want) > 0.995


def test_area_rule_in_the_segmenter(segmenter):
    """SCLIP on VOC21, against its labels without the rule."""
    model = model_with_statistics()
    made, text, names = segmenter("sclip", "voc21", model, names=8)
    picture = photograph(75, 111)
    x = normalized(model, as_mmcv(picture, 48, 293))
    logits = in_windows(x, 32, 16, 1, lambda images: formula("sclip", model, images), text)
    probabilities = rules.class_probabilities(logits, np.arange(8), (75, 111), 65)
    want = rules.labels_by_area(probabilities, 0.1, None)
    assert agreeing(made.segment(picture, names).labels, want) > 0.998
    assert agreeing(want, probabilities.argmax(axis=0)) < 1


@pytest.mark.parametrize("dataset, c", [("voc21", 0.7), ("cityscapes", 0.7), ("ade20k", 0.75)])
def test_views_in_windows(dataset, c, segmenter):
    """Their mean is not normalized again, and on VOC21 small classes are removed."""
    model, picture = model_with_statistics(layers=12), photograph(40, 46)
    made, text, names = segmenter("itaclip-views", dataset, model)
    assert (made.windows.window, made.windows.stride, made.protocol.post) == (32, 4, "pamr")
    x = normalized(model, as_mmcv(picture, made.windows.short_side, 293))

    def features_of(images):
        return itaclip_views(model, images, c)

    def plain_logits(features, text):
        return np.einsum("kc,chw->khw", text.numpy(), features[0].numpy())

    logits = in_windows(x, 32, 4, 1, features_of, text, plain_logits)
    if dataset != "voc21":
        check(made, picture, names, logits, post="none")
    else:
        probabilities = rules.class_probabilities(logits, np.arange(5), (40, 46), 60)
        want = rules.labels_by_area(probabilities, 0.1, None)
        assert agreeing(made.segment(picture, names, post="none").labels, want) > 0.998


def test_another_method_has_no_views():
    protocol = METHODS["itaclip-views"].protocol
    with pytest.raises(ValueError, match="the protocol of itaclip-views needs the views of that method, and .* 'kk'"):
        rfclip.Segmenter(small_clip(), method="kk", protocol=protocol, tokenizer=list)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "proxyclip"])
def test_windows_that_the_caller_asks_for(method, segmenter):
    """Rules about whole pictures work with windows as well, several lists of names, and one name for two classes."""
    model = model_with_statistics(layers=12)
    config = rfclip.RefocusConfig(distraction_dims=DIMS) if METHODS[method].configured else None
    protocol = METHODS[method].protocol.on("voc21")
    with rfclip.Segmenter(
        model, config=config, method=method, protocol=protocol, window=32, short_side=48, stride=16, tokenizer=list
    ) as made:
        made.text_embeddings = lambda names: F.normalize(randn(len(names), 20, seed=5), dim=-1).float()
        found = made.segment_by(photograph(60, 90), [[("a", "b"), ("a",)], [("a",)]], probabilities=True)
    for each, classes in zip(found, (2, 1), strict=True):
        assert each.labels.shape == (60, 90)
        assert np.isfinite(each.probabilities).all() and each.probabilities.shape == (classes, 60, 90)


def test_a_protocol_of_another_method():
    """Regions of a method that has another forward, on a tower of one block."""
    model = small_clip(layers=1)
    protocol = Protocol(window=None, resizing="crop", rule="cliptrase:Regions")
    with rfclip.Segmenter(model, method="kk", protocol=protocol, tokenizer=list) as made:
        made.text_embeddings = lambda names: F.normalize(randn(len(names), 20, seed=5), dim=-1).float()
        assert made.segment(photograph(20, 20), [("a",), ("b",)]).labels.shape == (20, 20)


# What a rule may ask for


class Seeing(Rule):
    """Takes the windows' pictures instead of patch embeddings, and refuses a method."""

    sees_images = True

    def check(self, method):
        if method.name == "kk":
            raise ValueError("not with kk")

    def look(self, method, patches, images):
        return patches, images

    def window(self, patches, image, text, known):
        seen, images = patches
        assert len(seen) == len(images) and images.shape[2:] == (32, 32) and seen.shape[2:] == (4, 4)
        return F.avg_pool2d(images, 8)[:, : len(text)]


def test_a_rule_that_looks_for_itself(monkeypatch):
    monkeypatch.setattr(Protocol, "load_rule", lambda protocol: Seeing())
    model, picture = small_clip(planted=False), photograph(48, 64)
    with rfclip.Segmenter(model, method="clip", short_side=48, window=32, stride=16, tokenizer=list, batch=2) as made:
        made.text_embeddings = lambda names: F.normalize(randn(len(names), 20, seed=5), dim=-1).float()
        found = made.segment(picture, [("a",), ("b",)], probabilities=True)
        x = made.windows.picture(picture, made.tower)
    total, count = np.zeros((2, 48, 64)), np.zeros((48, 64))
    for top, bottom in windows(48, 32, 16):
        for left, right in windows(64, 32, 16):
            means = F.avg_pool2d(x[:2, top:bottom, left:right], 8)
            total[:, top:bottom, left:right] += resize_planes(means.double().numpy(), 32, 32)
            count[top:bottom, left:right] += 1
    probabilities = rules.class_probabilities(total / count, np.arange(2), (48, 64), 40)
    np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-4)
    with pytest.raises(ValueError, match="not with kk"):
        rfclip.Segmenter(model, method="kk", tokenizer=list)
    assert "forward" not in vars(model.visual)
