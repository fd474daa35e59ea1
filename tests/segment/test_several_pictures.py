"""Lists of pictures: one result each, equal to that of the picture on its own, from passes that they share."""

import itertools
import re

import numpy as np
import pytest
import torch
from miniatures import scene

import rfclip

NAMES = "cat, grass, sky"
QUICK = {"cache": False, "templates": ["a {}.".format]}
pytestmark = pytest.mark.filterwarnings("ignore:rfclip-tiny")


@pytest.fixture(scope="module")
def pictures():
    """Of several sizes, so that windows and grids differ, and one size twice."""
    return [scene(1), scene(2, 64, 40), scene(3, 130, 90), scene(4, 64, 40), scene(5, 25, 200)]


@pytest.fixture(scope="module")
def model():
    return rfclip.load_model()


@pytest.mark.parametrize(
    "method", ["rf-clip", "released", "maskclip", "naclip", "pearl", "clip-surgery", "cliptrase", "gem"]
)
def test_equal_to_one_at_a_time(model, pictures, method):
    """By methods that see windows, whole pictures, squares and crops, and by rules that ask for image embeddings."""
    with rfclip.Segmenter(model, method=method, **QUICK) as segmenter:
        together = segmenter(pictures, NAMES, probabilities=True)
        alone = [segmenter(picture, NAMES, probabilities=True) for picture in pictures]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-4)
        assert (one.labels == other.labels).mean() > 0.995


def test_windows_of_one_size_share_passes(model, pictures):
    with rfclip.Segmenter(model, **QUICK) as segmenter:
        passes, dense = [], segmenter._method.dense
        segmenter._method.dense = lambda tokens, images=None: passes.append(len(tokens)) or dense(tokens, images)
        corners = [len(segmenter._see(picture).corners) for picture in pictures]
        segmenter(pictures, NAMES)
        assert passes == [sum(corners)]
        passes.clear()
        segmenter.batch = corners[0] + 1
        segmenter(pictures, NAMES)
        assert max(passes) == corners[0] + 1 and sum(passes) == sum(corners)


def test_any_iterable(model, pictures):
    """Also of different kinds of pictures, and one without end, of which no more is read than shares a pass."""
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield pictures[number % 2]

    with rfclip.Segmenter(model, **QUICK, batch=16) as segmenter:
        assert segmenter([], NAMES) == []
        assert segmenter((picture for picture in pictures[:2]), NAMES) == segmenter(pictures[:2], NAMES)
        mixed = [np.asarray(pictures[0]), torch.from_numpy(np.array(pictures[0])).movedim(-1, 0)]
        assert segmenter(mixed, NAMES) == [segmenter(pictures[0], NAMES)] * 2
        results = segmenter.stream(endless(), NAMES)
        assert not read
        first = [next(results) for _ in range(5)]
        assert len(read) < 12 and first[:2] == segmenter(pictures[:2], NAMES)
        with pytest.raises(ValueError, match="threshold=2"):
            segmenter.stream(endless(), NAMES, threshold=2)


def test_a_bad_picture_is_named(model, pictures):
    """The results before it are given first."""
    with rfclip.Segmenter(model, **QUICK) as segmenter:
        results = segmenter.stream([*pictures[:2], np.zeros((2, 3, 4, 5)), pictures[3]], NAMES)
        assert [next(results), next(results)] == segmenter(pictures[:2], NAMES)
        with pytest.raises(ValueError, match=re.escape("image 2: image: got an array (2, 3, 4, 5)")):
            next(results)
        with pytest.raises(FileNotFoundError, match="image 1: no such image: gone.png"):
            segmenter([pictures[0], "gone.png"], NAMES)
        with pytest.raises(FileNotFoundError, match="^no such image: gone.png"):
            segmenter("gone.png", NAMES)
        with pytest.raises(ValueError, match="give a Segmenter a list of them"):
            segmenter(np.zeros((2, 8, 8, 3), np.uint8), NAMES)
        with pytest.raises(ValueError, match="got an object of class int"):
            segmenter(5, NAMES)


def test_progress(model, pictures, capsys):
    with rfclip.Segmenter(model, **QUICK) as segmenter:
        segmenter(pictures, NAMES)
        assert capsys.readouterr() == ("", "")
        segmenter(pictures, NAMES, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "segmenting" in shown.err and "100%" in shown.err


@pytest.mark.parametrize("memory_limit", [1 << 30, 1 << 16])
def test_confidence(model, memory_limit):
    """The mean probability of a class over its pixels."""
    picture = scene(1, 90, 70)
    with rfclip.Segmenter(model, **QUICK, memory_limit=memory_limit) as segmenter:
        found = segmenter(picture, "cat, kitten; grass; sky; bus", probabilities=True, threshold=0.6)
        assert (found.labels == found.nothing).any() and len(found.present) > 1
        for index, dense in enumerate(found.probabilities):
            mask = found.labels == index
            assert found.confidence[index] == pytest.approx(dense[mask].mean() if mask.any() else np.nan, nan_ok=True)
        assert segmenter.segment(picture, [("cat",), ("sky",)]).confidence is None
