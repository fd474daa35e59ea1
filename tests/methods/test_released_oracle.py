"""The pieces of oracles/released_evaluation.py against libraries, so that the oracle itself can be trusted."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles.methods import formula
from oracles.released_evaluation import (
    Tower,
    adjusted_names,
    bicubic,
    clusters_of_names,
    released_labels,
    resize_planes,
    resized_size,
    windows,
)
from PIL import Image
from small_models import DIMS, pictures, small_clip

pytestmark = pytest.mark.usefixtures("no_grad")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("grid", [(5, 7), (3, 4), (9, 6), (4, 9), (4, 4), (1, 2)])
def test_bicubic_by_factors(grid):
    planes, factors = noise(2, 4, 4), [(g + 0.1) / 4 for g in grid]
    want = F.interpolate(
        torch.from_numpy(planes)[None],
        scale_factor=factors,
        recompute_scale_factor=False,
        mode="bicubic",
        align_corners=False,
    )[0].numpy()
    rows, columns = (bicubic(g, 4, factor) for g, factor in zip(grid, factors, strict=True))
    assert want.shape[1:] == grid
    np.testing.assert_allclose(rows @ planes @ columns.T, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [(32, 32), (20, 47), (3, 2), (5, 7)])
def test_bilinear(size):
    planes = noise(3, 5, 7)
    want = F.interpolate(torch.from_numpy(planes)[None], size=size, mode="bilinear", align_corners=False)[0].numpy()
    np.testing.assert_allclose(resize_planes(planes, *size), want, rtol=0, atol=1e-13)


def test_sizes_and_windows():
    assert resized_size(500, 375, 336, 2048) == (448, 336)
    assert resized_size(100, 1000, 336, 2048) == (205, 2048)
    assert windows(336, 224, 112) == [(0, 224), (112, 336)]
    assert windows(505, 224, 112) == [(0, 224), (112, 336), (224, 448), (281, 505)]
    assert windows(225, 224, 112) == [(0, 224), (1, 225)]
    assert windows(200, 224, 112) == [(0, 200)]


@pytest.fixture
def trusted():
    model = small_clip()
    model.visual.image_mean, model.visual.image_std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    return model


def test_plain_image_embedding(trusted):
    for image in pictures(count=2):
        want = F.normalize(trusted.visual(image[None])[0], dim=0).numpy()
        got = Tower(trusted, image.permute(1, 2, 0).numpy(), (), 5).image_embedding()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_patches_as_the_other_oracle(trusted):
    images = pictures(count=2)
    for image, want in zip(images, formula("released", trusted, images), strict=True):
        got = Tower(trusted, image.permute(1, 2, 0).numpy(), DIMS, 5).patch_embeddings()
        np.testing.assert_allclose(got, F.normalize(want, dim=0).flatten(1).T.numpy(), rtol=0, atol=1e-12)


def test_clusters_and_adjusted_names():
    angles = np.array([0.0, 0.1, 0.2, 1.5])  # cosine distances 0.005, 0.02 and far
    text = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert sorted(clusters_of_names(text, 0.01)) == [[0, 1], [2], [3]]
    assert sorted(clusters_of_names(text, 0.03)) == [[0, 1, 2], [3]]
    patches = text[[3, 0, 2]]
    adjusted = adjusted_names(text, np.array([0.3, 0.4, 0.2, 0.1]), [[0, 1, 2], [3]], patches, 0.5)
    np.testing.assert_allclose(adjusted[[0, 1, 2]], text[[0, 1, 2]], rtol=0, atol=1e-15)  # 0.1 is between 0 and 0.2
    assert np.arctan2(*adjusted[3, ::-1]) == pytest.approx((1.5 + (1.5 + 0.2) / 2) / 2)


@pytest.mark.parametrize("window, own_image", [(None, False), (32, False), (32, True)])
def test_whole(trusted, window, own_image):
    """The shape of the answer, a picture whose short side is no multiple of a patch, and what the options do."""
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (37, 60, 3), dtype=np.uint8))
    text = noise(4, 20)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    named = [("a",), ("b", "c"), ("d",)]
    options = dict(dims=DIMS, tau=5, short_side=48, window=window, stride=16, share=0.2, shift=0.05, distance=0.9)
    options |= {"own_image": own_image}
    labels, classes = released_labels(trusted, picture, named, text, threshold=None, **options)
    assert labels.shape == (37, 60) and classes.shape == (3, 37, 60)
    assert (labels == classes.argmax(axis=0)).all() and (classes > 0).all() and (classes.sum(axis=0) < 1).all()
    best = classes.max(axis=0)
    cut = np.median(best)
    below, _ = released_labels(trusted, picture, named, text, threshold=cut, **options)
    assert (below == np.where(best < cut, 0, labels)).all()
    _, flat = released_labels(trusted, picture, named, text, threshold=0, **options | {"share": 1.0})
    varies = np.ptp(flat, axis=(1, 2)).max()
    assert varies > 1e-3 if own_image else varies < 1e-12  # the image embedding alone decides
