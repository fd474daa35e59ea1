"""The evaluation that RF-CLIP's authors released against an independent float64 implementation of its formulas."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles.released_evaluation import Tower, released_labels
from PIL import Image
from small_models import DIMS, small_clip

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
MEAN, STD = (0.3, 0.35, 0.25), (0.2, 0.25, 0.2)


def photograph(height, width, seed):
    """Noise on two grounds with bright squares of one colour, over which some tokens become distraction."""
    generator = np.random.default_rng(seed)
    x = 0.5 * generator.standard_normal((height, width, 3))
    x[:, width // 2 :] += np.sin(np.arange(width - width // 2) / 3)[:, None]
    for number in range(6):
        side = min(height, width) // 3
        top, left = generator.integers(height - side), generator.integers(width - side)
        x[top : top + side, left : left + side, number % 3] += 2.5
    return Image.fromarray((255 * (x * STD + MEAN).clip(0, 1)).astype(np.uint8))


@functools.cache
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
        return Tower(tower(), x, dims, 5)


def tower(dtype=torch.float64, **vision):
    model = small_clip(dtype=dtype, **vision)
    model.visual.image_mean, model.visual.image_std = MEAN, STD
    return model


@pytest.fixture
def scorer():
    """Makes a scorer of `released` on a dataset, with text embeddings in place of a text tower."""
    opened = []

    def make(name, text, dtype=torch.float32, **options):
        job = Job(config=CONFIG, method="released", **options)
        made = Scorer(job, find_dataset(name).open(root=Path()), tower(dtype))
        opened.append(made)
        made.segmenter.text_embeddings = lambda names: text.float()[: len(names)]
        return made

    yield make
    for each in opened:
        each.close()


def wanted(name, dataset, picture, text):
    short, window, share, shift, distance, threshold = BENCHMARKS[name]
    return released_labels(
        tower(),
        picture,
        dataset.classes,
        text,
        dims=DIMS,
        tau=5,
        short_side=short // 7,
        window=window and 32,
        stride=16,
        share=share,
        shift=shift,
        distance=distance,
        threshold=threshold,
        own_image=name == "cityscapes",
        long_side=293,
    )[0]


def test_every_benchmark_is_here():
    assert tuple(BENCHMARKS) != () and set(BENCHMARKS) == set(in_paper())


@pytest.mark.parametrize("name", BENCHMARKS)
@torch.inference_mode()
def test_labels_of_the_authors_evaluation(name, scorer):
    dataset = find_dataset(name).open(root=Path())
    text = embeddings(sum(map(len, dataset.classes)))
    made = scorer(name, text)
    seen, agreeing, pixels = set(), 0, 0
    for number, size in enumerate(SIZES):
        picture = photograph(*size, seed=number)
        want = wanted(name, dataset, picture, text)
        got = made.predict(picture).labels
        seen |= set(np.unique(want).tolist())
        agreeing, pixels = agreeing + (got == want).sum(), pixels + got.size
    assert agreeing / pixels >= 0.998
    assert len(seen) >= 8


def test_the_pictures_have_distraction():
    """In most blocks of the plain tower, some tokens but not all would be denoised."""
    plain = oracle_tower(photograph(48, 71, seed=0), ())
    changed = [np.abs(plain.denoised(x, list(DIMS), 5) - x).max(axis=1) > 1e-9 for x in plain.F[1:]]
    assert sum(0 < tokens.sum() < len(tokens) - 1 for tokens in changed) >= 3
