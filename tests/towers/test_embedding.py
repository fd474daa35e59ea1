"""Patches and position embeddings as matrix products, against PyTorch's convolution and its bicubic resizing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import pictures
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, weight_norm

from rfclip.ops import operations
from rfclip.towers import read_tower
from rfclip.towers.embedding import embed_patches, resize_positions, resizing

GRIDS = [(1, 1), (3, 5), (4, 4), (7, 2)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Patches --------------------------------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize("patch", [(8, 8), (3, 5)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_patches_are_those_of_the_convolution(grid, patch, bias):
    height, width = (count * side for count, side in zip(grid, patch, strict=True))
    picture = noise(2, 3, height + 4, width + 9)
    for images in (picture[:, :, 4:, 9:], picture.flip(1)[:, :, :height, :width].mT.contiguous().mT):
        weight, shift = noise(6, 3, *patch, seed=1), noise(6, seed=2) if bias else None
        found = embed_patches(images, weight, shift)
        torch.testing.assert_close(found, F.conv2d(images, weight, shift, patch), rtol=1e-12, atol=1e-12)
        assert found.flatten(2).mT.is_contiguous()  # the tokens lie side by side


def test_patches_are_cast_as_they_are_copied():
    images, weight = noise(1, 3, 16, 24).float(), noise(6, 3, 8, 8)
    assert torch.equal(embed_patches(images, weight, None), embed_patches(images.double(), weight, None))
    assert embed_patches(images, weight.half(), None).dtype == torch.float16


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def subclassed(conv):
    conv.__class__ = Doubled


def hooked(conv):
    conv.register_forward_hook(lambda module, args, out: 2 * out)


def hooked_before(conv):
    conv.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def own_forward(conv):
    conv.forward = lambda x: 2 * type(conv).forward(conv, x)


def parametrized(conv):
    parametrizations.weight_norm(conv).parametrizations.weight.original0.data *= 2


def normalized(conv):
    weight_norm(conv).weight_g.data *= 2


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", [subclassed, hooked, hooked_before, own_forward, parametrized, normalized])
@torch.no_grad()
def test_a_convolution_that_does_more_runs_itself(model, change):
    images = pictures()
    want = 2 * read_tower(model).patches(images)
    change(model.visual.conv1)
    torch.testing.assert_close(read_tower(model).patches(images), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "setting",
    [{"padding": 4}, {"dilation": 2, "padding": 4}, {"stride": 4}, {"groups": 3, "padding": "valid"}],
    ids=str,
)
def test_other_convolutions_run_themselves(model, setting):
    tower, images = read_tower(model), pictures()
    tower.conv = nn.Conv2d(3, 48, 8, **{"stride": 8} | setting, bias=False).double()
    assert torch.equal(tower.patches(images), tower.conv(images))


def test_hooks_on_gradients_run(model):
    seen, tower = [], read_tower(model)
    handle = model.visual.conv1.register_full_backward_hook(lambda *given: seen.append(given))
    for expected in (1, 1):
        tower.patches(pictures().requires_grad_()).sum().backward()
        assert len(seen) == expected
        handle.remove()


def test_gradients_are_those_of_the_convolution(model):
    conv, given = model.visual.conv1, [pictures().requires_grad_() for _ in range(2)]
    for images, patches in zip(given, (conv(given[0]), read_tower(model).patches(given[1])), strict=True):
        images.grad, *_ = torch.autograd.grad(patches.square().sum(), images)
    torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-12, atol=1e-12)


# Positions ------------------------------------------------------------------------------------------------------------


def interpolated(trained, grid):
    planes = trained.permute(2, 0, 1)[None]
    return F.interpolate(planes, size=grid, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)


@every_grid
@pytest.mark.parametrize("trained", [(4, 4), (2, 9), (1, 1)], ids=str)
def test_positions_are_resized_bicubically(trained, grid):
    position = noise(*trained, 6)
    want = interpolated(position, grid)
    torch.testing.assert_close(resize_positions(position, grid), want, rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = resize_positions(position.to(dtype), grid)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), interpolated(position.to(dtype).double(), grid), rtol=0, atol=1e-5)
    assert torch.equal(resize_positions(position, trained), position)


def test_autocast_does_not_lower_positions():
    position = noise(4, 4, 6).float()
    want = resize_positions(position, (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_positions(position, (3, 5)), want)


def test_weights_are_uploaded_once_and_for_every_mode():
    resizing.cache_clear()
    position = noise(4, 4, 6).requires_grad_()
    with torch.inference_mode():
        want = resize_positions(position, (3, 5))
    kept = resizing(4, 5, 0.0, torch.float64, torch.device("cpu"))
    found = resize_positions(position, (3, 5))
    assert torch.equal(found, want)
    found.sum().backward()
    torch.testing.assert_close(position.grad.sum(), torch.tensor(90.0, dtype=torch.float64))
    assert resizing(4, 5, 0.0, torch.float64, torch.device("cpu")) is kept
    assert resizing.cache_info().currsize == 2


def test_what_is_traced_is_not_kept():
    resizing.cache_clear()
    for given in ({}, {"allow_non_fake_inputs": True}):
        position = noise(4, 4, 6)
        with FakeTensorMode(**given) as mode:
            position = position if given else mode.from_tensor(position)
            assert resize_positions(position, (3, 5)).shape == (3, 5, 6)
    compiled = torch.compile(resize_positions, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(noise(4, 4, 6), (3, 5)), interpolated(noise(4, 4, 6), (3, 5)))
    assert resizing.cache_info().currsize == 0


@torch.no_grad()
def test_positions_that_change_in_place_are_seen(model):
    tower, twin, patches = read_tower(model), copy.deepcopy(model), noise(1, 48, 3, 5)
    ops = operations("eager")
    tower.embed(patches, ops)
    for each in (model, twin):
        each.visual.positional_embedding.mul_(2)
    found = tower.embed(patches, ops)
    position = interpolated(twin.visual.positional_embedding[1:].unflatten(0, (4, 4)), (3, 5)).flatten(0, 1)
    tokens = torch.cat(
        [twin.visual.class_embedding[None] + twin.visual.positional_embedding[:1], patches[0].flatten(1).T + position]
    )
    torch.testing.assert_close(found[0], twin.visual.ln_pre(tokens), rtol=1e-10, atol=1e-10)
