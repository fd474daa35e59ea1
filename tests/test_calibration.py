"""Calibration: it finds the planted dimensions, and its profile is that of the brute-force tower."""

import copy

import numpy as np
import pytest
import torch
from helpers import relative_error
from oracles.tower import brute_profile
from PIL import Image
from refocusing import DEFAULT, NO_DIMS, PRECISIONS, TOWERS, at_precision
from small_models import DIMS, pictures, small_clip

import rfclip
from rfclip import RefocusConfig

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("tower", ["clip", "custom-block", "next-release", "wide"])
def test_calibration_finds_the_planted_dims(tower):
    model, images = small_clip(**TOWERS[tower]), pictures(bright=1.0, colours=(0,))
    want = brute_profile(model, images)
    got = rfclip.calibrate(model, images)
    assert (got.profile.dtype, got.threshold) == (torch.float32, 5 / len(want))
    torch.testing.assert_close(got.profile.double(), want, rtol=1e-6, atol=0)  # one rounding to float32
    peaks = [d for d in want.argsort(descending=True).tolist() if want[d] > 5 / len(want)]
    assert got.dims == tuple(peaks)
    assert set(peaks) == set(DIMS)
    assert got.config() == RefocusConfig(tuple(peaks))
    assert all(f"{d} (" in got.report() for d in peaks)
    assert got.report().startswith("Distraction dimensions: ")


@pytest.mark.parametrize("planted", [(7,), (3, 40), (1, 2, 3, 10, 20, 30, 40, 50), tuple(range(0, 60, 6))], ids=len)
def test_calibration_keeps_the_eight_largest(planted):
    model = small_clip(planted=False, width=64, head_width=16)
    strength = torch.linspace(1.3, 1, len(planted))
    model.visual.ln_pre.bias[list(planted)] += 300 * strength  # nothing that follows matters next to this
    found = rfclip.calibrate(model, pictures())
    want = brute_profile(model, pictures())
    assert (want > 5 / 64).sum() == len(planted)
    assert found.dims == planted[:8]
    assert found.config().distraction_dims == tuple(sorted(planted[:8]))


def test_calibration_that_finds_nothing():
    model = small_clip(planted=False)
    found = rfclip.calibrate(model, pictures())
    assert found.dims == ()
    assert found.config() == NO_DIMS
    assert "no distraction dimensions" in found.report()
    largest = found.profile.argmax().item()
    assert f"{largest} ({found.profile.max().item() * 48:.2f})" in found.report()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_on_what_is_not_finite(model, value):
    images = pictures()
    images[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        rfclip.calibrate(model, images)


def test_calibration_takes_batches_of_any_kind(model):
    images = pictures(count=5, bright=0.6)
    want = rfclip.calibrate(model, images)
    for batches in ([images[:1], images[1:]], (image[None] for image in images), images.split(2)):
        got = rfclip.calibrate(model, batches)
        assert got.dims == want.dims
        torch.testing.assert_close(got.profile, want.profile, rtol=1e-6, atol=0)


def test_calibration_weighs_every_token_alike(model):
    small, large = pictures(count=2), pictures(count=3, height=48, width=64)
    sums = [16 * 2 * rfclip.calibrate(model, small).profile, 48 * 3 * rfclip.calibrate(model, large).profile]
    got = rfclip.calibrate(model, [small, large])
    torch.testing.assert_close(got.profile, sum(sums) / (16 * 2 + 48 * 3), rtol=1e-6, atol=0)


def test_calibration_looks_at_the_plain_blocks(model):
    images = pictures(bright=0.6)
    want = rfclip.calibrate(model, images)
    with rfclip.refocus(model, DEFAULT):
        got = rfclip.calibrate(model, images)
    assert torch.equal(got.profile, want.profile)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_calibration_at_other_precisions(precision):
    model, dtype = at_precision(precision)
    images = pictures(bright=1.0, colours=(0,)).to(dtype)
    want = brute_profile(copy.deepcopy(model).double(), images.double())
    found = rfclip.calibrate(model, images)
    assert set(found.dims) == {d for d in range(48) if want[d] > 5 / 48}
    assert relative_error(found.profile, want) <= 2 * torch.finfo(dtype).eps  # roundings average out


@pytest.mark.parametrize("images", [[], iter(())], ids=["list", "iterator"])
def test_calibration_without_images(model, images):
    with pytest.raises(ValueError, match="at least one"):
        rfclip.calibrate(model, images)


@pytest.mark.parametrize(
    "images",
    [Image.new("RGB", (32, 32)), [Image.new("RGB", (32, 32))], None, np.zeros((1, 3, 32, 32))],
    ids=["picture", "pictures", "none", "array"],
)
def test_what_are_no_images(images):
    with pytest.raises(ValueError, match=r"got an object of class .*expected a float tensor \[B, 3, height, width\]"):
        rfclip.calibrate(small_clip(), images)
