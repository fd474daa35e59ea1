"""The kernels from windows to pixels: average_windows, upsample_argmax and pamr."""

import pytest
import torch
from kernel_cases import DEVICE, check, dtypes, inside_nan, randn

import rfclip_kernels
from rfclip import reference
from rfclip_kernels import upsample

WINDOWS = {  # K, patch grid, window, size, corners
    "one": (3, (2, 3), (8, 8), (8, 8), [(0, 0)]),
    "uneven": (2, (3, 2), (6, 6), (8, 11), [(0, 0), (0, 5), (2, 0), (1, 3), (2, 5)]),
    "smaller than the grid": (5, (7, 5), (4, 4), (5, 4), [(1, 0), (0, 0)]),
    "one row of pixels": (1, (1, 1), (1, 1), (1, 3), [(0, 2), (0, 0), (0, 1)]),
    "tiles along every axis": (
        9,
        (2, 1),
        (3, 70),
        (4, 131),
        [(top, left) for left in (0, 30, 61) for top in (0, 1)],
    ),
    "wider than a block": (1, (2, 3), (3, 130), (3, 140), [(0, 0), (0, 10)]),
    "taller than wide": (2, (3, 2), (9, 4), (11, 7), [(0, 0), (2, 3), (2, 0), (0, 3)]),
    "wider than tall": (3, (2, 5), (4, 11), (4, 11), [(0, 0)]),
}
SIZES = [(7, 9), (4, 5), (1, 9), (8, 1), (3, 131)]


@dtypes
@pytest.mark.parametrize("case", WINDOWS)
def test_average_windows(case, dtype):
    K, grid, window, size, corners = WINDOWS[case]
    logits = randn(len(corners), K, *grid, seed=9, dtype=dtype)
    want = reference.average_windows(logits.double(), corners, window, size)
    check(rfclip_kernels.average_windows(inside_nan(logits), corners, window, size), want, torch.float32)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.enable_grad])
def test_corners_are_uploaded_once_for_every_mode(first):
    upsample._uploaded.cache_clear()
    _, grid, window, size, corners = WINDOWS["uneven"]
    logits = randn(len(corners), 2, *grid, seed=9, dtype=torch.float32)
    want = reference.average_windows(logits.double(), corners, window, size)
    for mode in (first, torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            check(rfclip_kernels.average_windows(logits, corners, window, size), want, torch.float32)
    assert upsample._uploaded.cache_info()[:2] == (3, 1)  # hits and misses
    assert not upsample._uploaded(tuple(corners), logits.device).is_inference()


@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("threshold", [None, 0.0, 0.5, 1.0], ids=str)
def test_upsample_argmax(size, threshold, dtype):
    names = torch.tensor([2, 0, 1, 2, 0, 3], device=DEVICE)
    logits = randn(len(names), 3, 4, seed=10, dtype=dtype)
    shares = reference.class_probabilities(logits.double(), size, 3.0, names, 4)
    best, second = shares.topk(2, dim=0).values
    clear = best - second > 1e-4
    if threshold is not None:
        clear &= (best - threshold).abs() > 1e-4
    want = reference.upsample_argmax(logits.double(), size, 3.0, names, threshold)
    got = rfclip_kernels.upsample_argmax(inside_nan(logits), size, 3.0, names, threshold)
    assert got.dtype == torch.int32
    assert clear.double().mean() > 0.9
    assert torch.equal(got[clear], want[clear])


def test_the_lowest_of_equal_classes_wins():
    logits = torch.cat([randn(1, 3, 4, seed=10) - 9, randn(1, 3, 4, seed=11).expand(3, -1, -1)])
    for names, lowest in (([0, 3, 1, 2], 1), ([3, 2, 2, 1], 1), ([0, 5, 5, 5], 5)):
        got = rfclip_kernels.upsample_argmax(logits, (5, 7), 9.0, torch.tensor(names, device=DEVICE))
        assert got.unique().tolist() == [lowest]


@pytest.mark.parametrize("count", [3, 5, 7, 11, 49])
def test_a_probability_equal_to_the_threshold_counts(count):
    """That of equal logits is one over their number, as float32 has it."""
    logits, names = torch.ones(count, 2, 2, device=DEVICE), torch.arange(count, device=DEVICE)
    share = (1 / torch.tensor(count, dtype=torch.float32)).item()
    assert not rfclip_kernels.upsample_argmax(logits, (3, 4), 9.0, names, share).any()
    above = rfclip_kernels.upsample_argmax(logits, (3, 4), 9.0, names, share * (1 + 2e-7))
    assert (above == -1).all()


@dtypes
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (5, 8), (2, 70)], ids=str)
@pytest.mark.parametrize("dilations", [(1,), (2, 1), (1, 8, 16)], ids=str)
def test_pamr(size, dilations, dtype):
    image, mask = (randn(2, channels, *size, seed=seed, dtype=dtype) for channels, seed in ((3, 11), (2, 12)))
    for iterations in (0, 1, 3):
        want = reference.pamr(image.double(), mask.double(), iterations, dilations)
        check(rfclip_kernels.pamr(inside_nan(image), inside_nan(mask), iterations, dilations), want, dtype)


def test_pamr_takes_two_dtypes():
    image, mask = randn(1, 3, 6, 6, seed=11), randn(1, 2, 6, 6, seed=12, dtype=torch.float16)
    want = reference.pamr(image.double(), mask.double(), 2, (1,))
    check(rfclip_kernels.pamr(image, mask, 2, (1,)), want, torch.float16)
