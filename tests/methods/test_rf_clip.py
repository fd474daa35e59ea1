"""RF-CLIP in towers of every kind and with every choice, against the brute-force tower in float64."""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from helpers import relative_error
from oracles.tower import brute_tower
from refocusing import (
    DEFAULT,
    NO_DIMS,
    ONLY_DENSE,
    PLAIN,
    PRECISIONS,
    TOWERS,
    VARIANTS,
    assert_each_close,
    assert_each_equal,
    at_precision,
    differs,
    refocused,
)
from small_models import DIMS, PATCH, pictures, small_clip

import rfclip
from rfclip import RefocusConfig

pytestmark = pytest.mark.usefixtures("no_grad")
towers = pytest.mark.parametrize("tower", TOWERS)


# The equations, in a tower --------------------------------------------------------------------------------------------


@towers
def test_default_config_in_every_tower(tower):
    model, images = small_clip(**TOWERS[tower]), pictures()
    got, trace = refocused(model, images), []
    want = brute_tower(model, images, DEFAULT, quick_gelu=tower == "quick-gelu", trace=trace)
    assert_each_close(got, want)
    assert len(trace) == 12 and sum(0 < len(taken) < 16 for taken in trace) >= 8  # the masks of 3 images in 4 blocks
    for a, b in zip(got, refocused(model, images, NO_DIMS), strict=True):
        assert differs(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_choice(model, variant):
    images, config = pictures(), replace(DEFAULT, **VARIANTS[variant])
    dense, pooled = got = refocused(model, images, config)
    assert_each_close(got, brute_tower(model, images, config))
    default_dense, default_pooled = refocused(model, images)
    assert differs(dense, default_dense)
    assert differs(pooled, default_pooled) or variant in ONLY_DENSE


def test_the_choices_cover_every_value():
    for field in fields(RefocusConfig):
        values = {getattr(replace(DEFAULT, **changes), field.name) for changes in VARIANTS.values()}
        assert values.issuperset(rfclip.config.CHOICES.get(field.name, ())), field.name
        assert len(values) > 1, field.name


def test_preset_of_vit_l_style(model):
    """Dimensions and the joint criterion, both halves of which matter here."""
    config = replace(RefocusConfig.preset("ViT-L-14", "openai"), distraction_dims=DIMS, tau_attn=1.5)
    images, trace, without = pictures(), [], []
    assert_each_close(refocused(model, images, config), brute_tower(model, images, config, trace=trace))
    brute_tower(model, images, replace(config, tau_attn=None), trace=without)
    assert 0 < sum(map(len, trace)) < sum(map(len, without))


@pytest.mark.parametrize(
    "size", [(48, 32), (24, 64), (40, 40), (8, 16), (8, 8)], ids=lambda size: f"{size[0]}x{size[1]}"
)
@pytest.mark.parametrize("tower", ["clip", "not-square"])
def test_other_sizes(tower, size):
    model, images = small_clip(**TOWERS[tower]), pictures(height=size[0], width=size[1], bright=0.4)
    got = refocused(model, images)
    assert got[0].shape == (3, 20, size[0] // PATCH, size[1] // PATCH)
    assert_each_close(got, brute_tower(model, images, DEFAULT))


@pytest.mark.parametrize("config", [DEFAULT, replace(DEFAULT, tokens="random")], ids=["default", "random"])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)], ids=["native", "24x48"])
def test_a_batch_equals_its_images_one_by_one(model, size, config):
    images = pictures(height=size[0], width=size[1])
    singles = [refocused(model, image[None], config) for image in images]
    assert_each_close(refocused(model, images, config), [torch.cat(parts) for parts in zip(*singles, strict=True)])


@pytest.mark.parametrize("name", ["channels-last", "flipped", "strided", "broadcast"])
def test_images_of_any_strides(model, name):
    images = pictures()
    images = {
        "channels-last": images.to(memory_format=torch.channels_last),
        "flipped": images.flip(-1).transpose(-1, -2),
        "strided": torch.stack([images, 0 * images], dim=-1)[..., 0],
        "broadcast": images[:1].expand(3, -1, -1, -1),
    }[name]
    assert not images.is_contiguous()
    assert_each_close(refocused(model, images), refocused(model, images.contiguous()))


def test_beta_0_without_repair_is_the_layer_averaged_proxy_alone(model):
    images, config = pictures(), replace(DEFAULT, beta=0, embedding="none")
    assert_each_equal(refocused(model, images, config), refocused(model, images, NO_DIMS))


@pytest.mark.parametrize("variant", ["default", "mean", "median", "clamp", "to-cls", "masked", "otsu"])
def test_images_without_distraction_are_left_alone(model, variant):
    """Up to rounding: attention that moves nothing is still computed by another function."""
    images, config = pictures(bright=0), replace(DEFAULT, **VARIANTS.get(variant, {}))
    trace = []
    brute_tower(model, images, config, trace=trace)
    assert trace == [[]] * 12
    assert_each_close(refocused(model, images, config), refocused(model, images, NO_DIMS))


def test_an_image_keeps_its_result_beside_one_with_distraction(model):
    calm, busy = pictures(count=1, bright=0), pictures(count=1)
    dense, pooled = refocused(model, torch.cat([calm, busy]))
    assert_each_close((dense[:1], pooled[:1]), refocused(model, calm, NO_DIMS))


# Precision ------------------------------------------------------------------------------------------------------------

# Of pairs of pictures. Some lose more than the median, up to 2.3 times as much as the plain tower; that comes from the
# repair, on every backend. In one pair, rounding moves a token to the other side of a threshold.
SEEDS = (26, *range(8))


@pytest.mark.parametrize(("tower", "size"), [("clip", (32, 32)), ("custom-block", (24, 48))], ids=["native", "24x48"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision, size, tower):
    """Errors against float64 on the same rounded weights and images, compared with those of the plain tower.

    Refocusing adds a rounding or two to some ten per block, so that it loses little more: in the median over
    pictures, at most half as much again.
    """
    model, dtype = at_precision(precision, **TOWERS[tower])
    for config in (DEFAULT, NO_DIMS):
        assert (losses(model, dtype, config, size) <= 1.5).all()


def test_autocast():
    """Under torch.autocast, the usual way to run open_clip."""
    model = small_clip(dtype=torch.float32)
    assert (losses(model, torch.float32, DEFAULT, (32, 32), autocast=True) <= 1.5).all()


def losses(model, dtype, config, size, autocast=False):
    """The error of the refocused tower over that of the plain one, the median over pictures: dense features and CLS."""
    exact, found = copy.deepcopy(model).double(), []
    for seed in SEEDS:
        images = pictures(count=2, seed=seed, height=size[0], width=size[1]).to(dtype)
        errors = []
        for each in (config, PLAIN):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                got = refocused(model, images, each)
            assert all(a.isfinite().all() and (autocast or a.dtype == dtype) for a in got)
            want = brute_tower(exact, images, each)
            errors.append([relative_error(a, b) for a, b in zip(got, want, strict=True)])
        found.append(errors)
    refocusing, plain = np.array(found).swapaxes(0, 1)
    return np.median(refocusing / plain, axis=0)
