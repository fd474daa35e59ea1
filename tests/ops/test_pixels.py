"""From the logits of windows to the classes of pixels, and their refinement, against brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import assert_matches, differs, dtypes, score_dtype
from helpers import rand, randn
from oracles.operations import brute_averaged, brute_pamr, brute_probabilities

from rfclip.ops import reference

WINDOWS = {  # K, patch grid, window, size, corners
    "one": (3, (2, 3), (8, 8), (8, 8), [(0, 0)]),
    "uneven": (2, (3, 2), (6, 6), (8, 11), [(0, 0), (0, 5), (2, 0), (1, 3), (2, 5)]),
    "smaller than the grid": (2, (7, 5), (4, 4), (5, 4), [(1, 0), (0, 0)]),
    "one row of pixels": (1, (1, 1), (1, 1), (1, 3), [(0, 2), (0, 0), (0, 1)]),
    "one column of pixels": (1, (2, 1), (1, 1), (2, 1), [(1, 0), (0, 0)]),
    "taller than wide": (2, (3, 2), (9, 4), (11, 7), [(0, 0), (2, 3), (2, 0), (0, 3)]),
    "wider than tall": (3, (2, 5), (4, 11), (4, 11), [(0, 0)]),
}
windows = pytest.mark.parametrize("case", WINDOWS)


@dtypes()
@windows
def test_average_windows(impl, case, dtype):
    K, grid, window, size, corners = WINDOWS[case]
    logits = randn(len(corners), K, *grid, seed=9, dtype=dtype)
    want = brute_averaged(logits, corners, window, size)
    assert_matches(impl.average_windows(logits, corners, window, size), want, score_dtype(dtype))


def test_one_window_is_resized_as_pytorch_does(impl):
    logits = randn(1, 2, 14, 10, seed=9)
    want = F.interpolate(logits, size=(56, 56), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(impl.average_windows(logits, [(0, 0)], (56, 56), (56, 56)), want)


PICTURES = {  # class of each name, size of the logits, size of the picture
    "larger": ([0, 2, 1, 2, 0], (3, 4), (7, 9)),
    "smaller": ([1, 0, 1], (11, 9), (4, 5)),
    "one row": ([2, 0, 1], (1, 6), (1, 9)),
    "one column": ([0, 1], (5, 1), (8, 1)),
    "one name": ([0], (3, 3), (5, 4)),
    "a class without names": ([3, 0, 3], (2, 2), (3, 5)),
}
pictures = pytest.mark.parametrize("case", PICTURES)


@dtypes()
@pictures
def test_class_probabilities(impl, case, dtype):
    names, before, size = PICTURES[case]
    logits, class_of_name, classes = randn(len(names), *before, seed=10, dtype=dtype), torch.tensor(names), 4
    want = brute_probabilities(logits, size, 3.0, names, classes)
    arguments = (logits, size, 3.0, class_of_name, classes)
    tolerance = 3e-6 if dtype != torch.float64 else None
    got = impl.class_probabilities(*arguments)
    assert_matches(got, want, score_dtype(dtype), tolerance)
    for rows in (range(size[0] - 1, size[0]), range(size[0])[: size[0] // 2 + 1], range(0, size[0], 3)):
        part = impl.class_probabilities(*arguments, rows)
        torch.testing.assert_close(part, got[:, rows.start : rows.stop : rows.step])


@pytest.mark.parametrize("size", [(7, 9), (40, 23), (5, 80), (1, 1)], ids=str)
def test_probabilities_are_those_of_logits_resized_as_pytorch_does(impl, size):
    logits = randn(3, 11, 13, seed=10)
    want = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].softmax(dim=0)
    got = [
        impl.class_probabilities(logits, size, 1.0, torch.arange(3), 3, range(top, min(top + 4, size[0])))
        for top in range(0, size[0], 4)
    ]
    torch.testing.assert_close(torch.cat(got, dim=1), want)


@dtypes()
@pictures
@pytest.mark.parametrize("threshold", [None, 0.0, 0.6, 1.0], ids=str)
def test_upsample_argmax(impl, monkeypatch, case, dtype, threshold):
    names, before, size = PICTURES[case]
    logits, class_of_name = randn(len(names), *before, seed=10, dtype=dtype), torch.tensor(names)
    probabilities = brute_probabilities(logits, size, 3.0, names, 4)
    best, want = probabilities.max(dim=0)
    clear = best - probabilities.topk(2, dim=0).values[1] > 1e-4
    if threshold is not None:
        want[best < threshold] = -1
        clear &= ((best - threshold).abs() > 1e-4) | (best == threshold)
    assert clear.double().mean() > 0.95
    got = impl.upsample_argmax(logits, size, 3.0, class_of_name, threshold)
    assert got.dtype == torch.int32
    assert torch.equal(got[clear].long(), want[clear])
    monkeypatch.setattr(reference, "BAND", 1)  # one row per band
    assert torch.equal(impl.upsample_argmax(logits, size, 3.0, class_of_name, threshold), got)


def test_the_lowest_of_equal_classes_wins(impl):
    plane = randn(1, 3, 4, seed=10)
    logits = torch.cat([plane - 1, plane, plane, plane])
    for names, lowest in (([0, 3, 1, 2], 1), ([3, 2, 2, 1], 1), ([0, 5, 5, 5], 5)):
        assert impl.upsample_argmax(logits, (5, 7), 9.0, torch.tensor(names)).unique().tolist() == [lowest]
    assert impl.upsample_argmax(logits, (5, 7), 0.0, torch.tensor([4, 3, 2, 6])).unique().tolist() == [2]
    assert impl.upsample_argmax(logits, (5, 7), 9.0, torch.tensor([0, 3, 1, 2]), 0.34).unique().tolist() == [-1]


@dtypes()
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (5, 8)], ids=str)
@pytest.mark.parametrize("dilations", [(1,), (2, 1), (1, 8, 16), (np.int64(2),)], ids=str)
def test_pamr(impl, size, dilations, dtype):
    image, mask = rand(2, 3, *size, seed=11).to(dtype), rand(2, 2, *size, seed=12).to(dtype)
    for iterations in (0, 1, 3):
        want = brute_pamr(image, mask, iterations, dilations)
        if min(size) > 1:  # in a line, a place beyond the border is the pixel itself, which then outweighs the others
            assert differs(want, mask) == (iterations > 0)
        tolerance = 3e-6 if dtype == torch.float32 else None
        assert_matches(impl.pamr(image, mask, iterations, dilations), want, dtype, tolerance)


def test_pamr_of_a_constant_mask_and_of_a_flat_picture(impl):
    mask = rand(1, 1, 5, 6, seed=12)
    torch.testing.assert_close(impl.pamr(rand(1, 3, 5, 6, seed=11), torch.ones_like(mask)), torch.ones_like(mask))
    padded = F.pad(mask, (1,) * 4, mode="replicate")
    mean = (F.avg_pool2d(padded, 3, stride=1) * 9 - mask) / 8
    torch.testing.assert_close(impl.pamr(torch.full((1, 1, 5, 6), 0.3, dtype=mask.dtype), mask, 1, (1,)), mean)


def test_pamr_takes_two_dtypes_and_defaults_to_the_papers(impl):
    image, mask = rand(1, 3, 9, 9, seed=11), rand(1, 2, 9, 9, seed=12)
    got = impl.pamr(image.float(), mask.half())
    assert got.dtype == torch.float16
    assert_matches(got, brute_pamr(image.float(), mask.half(), 10, (8, 16)), torch.float16)
