"""The evaluation that RF-CLIP's authors released against an independent float64 implementation of its formulas."""

import functools
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from oracles.released_evaluation import Tower, released_labels, resized_size
from small_models import DIMS, MEAN, STD, photograph, photographic_clip

from rfclip import RefocusConfig
from rfclip.datasets import find_dataset, in_paper
from rfclip.scoring.run import Scorer
from rfclip.segment.job import Job

# ../shared/released.md: short side, window (None: the whole picture), w, mu, theta and threshold at 224, of which the
# small tower's 32 is a seventh.
BENCHMARKS = {
    "voc21": (336, None, 0.10, 0.03, 0.10, 0.1),
    "voc20": (336, 224, 0.40, 0.02, 0.10, 0),
    "context60": (336, 224, 0.25, 0.04, 0.09, 0.1),
    "context59": (336, 224, 0.25, 0.04, 0.09, 0),
    "coco_object": (336, 224, 0.25, 0.01, 0.10, 0.1),
    "coco_stuff": (336, 224, 0.20, 0.02, 0.02, 0),
    "cityscapes": (560, 224, 0.10, 0.03, 0.14, 0),
    "ade20k": (336, 224, 0.30, 0.05, 0.06, 0),
}
CONFIG = RefocusConfig(distraction_dims=DIMS)
SIZES = [(75, 111), (61, 50), (31, 333)]  # height and width; the last is so long that its short side is under a window


@functools.cache
@torch.no_grad()
def seen_patches():
    """Patch embeddings [N, 20] of pictures, by the oracle."""
    found = [oracle_tower(photograph(48, 71, seed), DIMS).patch_embeddings() for seed in range(4)]
    return np.concatenate(found)


def embeddings(count):
    """Embeddings of names [K, 20]: patches of pictures, each varied three times, so that names have clusters."""
    generator = np.random.default_rng(0)
    centres = generator.permutation(seen_patches())[: -(-count // 3)].repeat(3, axis=0)[:count]
    text = centres + generator.random((count, 1)) * 0.15 * generator.standard_normal((count, 20))
    return F.normalize(torch.from_numpy(text), dim=-1)


def oracle_tower(picture, dims):
    x = (np.asarray(picture) / 255 - np.array(MEAN)) / np.array(STD)
    with torch.no_grad():
        return Tower(photographic_clip(), x, dims, 5)


# Like ViT-L/14: patches of another size, more blocks, other windows.
OTHER = {"image_size": 42, "patch_size": 14, "layers": 6}


@pytest.fixture
def scorer():
    """Makes a scorer of `released` on a dataset, with text embeddings in place of a text tower."""
    opened = []

    def make(name, text, dtype=torch.float32, vision=MappingProxyType({}), **options):
        job = Job(config=CONFIG, **{"method": "released"} | options)
        model = photographic_clip(dtype, **vision)
        model.tokenizer = open_clip.SimpleTokenizer()  # its vocabulary is larger than the model's, which reads nothing
        made = Scorer(job, find_dataset(name).open(root=Path()), model)
        opened.append(made)
        made.segmenter.text_embeddings = lambda names: text.float()[: len(names)]
        return made

    yield make
    for each in opened:
        each.close()


def wanted(name, dataset, picture, text, vision=MappingProxyType({})):
    short, window, share, shift, distance, threshold = BENCHMARKS[name]
    side = vision.get("image_size", 32)
    return released_labels(
        photographic_clip(**vision),
        picture,
        dataset.classes,
        text,
        dims=DIMS,
        tau=5,
        short_side=short * side // 224,
        window=window and side,
        stride=side // 2,
        share=share,
        shift=shift,
        distance=distance,
        threshold=threshold,
        own_image=name == "cityscapes",
        long_side=round(2048 * side / 224),
    )[0]


def test_every_benchmark_is_here():
    assert tuple(BENCHMARKS) != () and set(BENCHMARKS) == set(in_paper())


@pytest.mark.parametrize(
    ("name", "vision"),
    [(name, vision) for name in BENCHMARKS for vision in ({}, OTHER)],
    ids=lambda value: "other-tower" if value is OTHER else str(value or ""),
)
@torch.inference_mode()
def test_labels_of_the_authors_evaluation(name, vision, scorer):
    dataset = find_dataset(name).open(root=Path())
    text = embeddings(sum(map(len, dataset.classes)))
    made = scorer(name, text, vision=vision)
    seen, agreeing, pixels = set(), 0, 0
    for number, size in enumerate(SIZES):
        picture = photograph(*size, seed=number)
        want = wanted(name, dataset, picture, text, vision)
        got = made.predict(picture).labels
        seen |= set(np.unique(want).tolist())
        agreeing, pixels = agreeing + (got == want).sum(), pixels + got.size
    assert agreeing / pixels >= 0.998
    assert len(seen) >= 6


@pytest.mark.parametrize("vision", [{}, OTHER], ids=["tower", "other-tower"])
@pytest.mark.parametrize("seed, size", list(enumerate(SIZES)))
@torch.no_grad()
def test_the_pictures_have_distraction(seed, size, vision):
    """In several blocks, some tokens but not all are denoised, of each of these pictures as the tower sees it."""
    side = vision.get("image_size", 32)
    height, width = resized_size(*size, 48 * side // 32, round(2048 * side / 224))
    x = cv2.resize(np.asarray(photograph(*size, seed)), (width, height)) / 255
    run = Tower(photographic_clip(**vision), (x - np.array(MEAN)) / np.array(STD), DIMS, 5)
    changed = [np.abs(run.denoised(x, list(DIMS), 5) - x).max(axis=1) > 1e-9 for x in run.F[1:]]
    assert sum(0 < tokens.sum() < len(tokens) - 1 for tokens in changed) >= 2


@pytest.mark.parametrize("name", ["voc21", "context60", "cityscapes"])
def test_batches_and_backends_agree(name, scorer):
    """In float64, whatever the batch: one window at a time, or all of them; and reference and eager."""
    dataset, picture = find_dataset(name).open(root=Path()), photograph(75, 111, seed=0)
    text = embeddings(sum(map(len, dataset.classes)))
    options = [{"batch": 1}, {"batch": 3}, {"backend": "reference"}, {"backend": "eager"}]
    found = []
    for option in options:
        made = scorer(name, text, torch.float64, **option)
        found.append(made.predict(picture).labels)
        made.close()
    for option, labels in zip(options, found, strict=True):
        assert (labels == found[0]).mean() > 0.9999, option
    assert len(np.unique(found[0])) > 3


@pytest.mark.parametrize("name", ["voc21", "ade20k"])
def test_what_half_precision_changes(name, scorer):
    """Little, but more than nothing: docs/method.md says how much, of the authors' runs in fp16."""
    dataset = find_dataset(name).open(root=Path())
    text = embeddings(sum(map(len, dataset.classes)))
    pictures = [photograph(*size, seed) for seed, size in enumerate(SIZES)]
    found = []
    for dtype in (torch.float32, torch.float16):
        with scorer(name, text, dtype) as made:
            found.append(np.concatenate([made.predict(picture).labels.ravel() for picture in pictures]))
    assert 0.985 < (found[0] == found[1]).mean() < 1


def test_rf_clip_by_the_same_rules(scorer):
    """The paper's equations under the authors' evaluation: other labels than under the paper's, and than theirs."""
    dataset, picture = find_dataset("context60").open(root=Path()), photograph(75, 111, seed=0)
    text = embeddings(sum(map(len, dataset.classes)))
    found = {}
    for method, protocol in (("rf-clip", "own"), ("rf-clip", "released"), ("released", "own"), ("released", "common")):
        with scorer("context60", text, method=method, protocol=protocol) as made:
            found[method, protocol] = made.predict(picture).labels
            assert made.segmenter.protocol.rule == (
                "released:AdjustedNames" if "released" in (protocol, method) and protocol != "common" else "rule:Rule"
            )
    labels = list(found.values())
    assert all((a != b).mean() > 0.01 for n, a in enumerate(labels) for b in labels[:n])
