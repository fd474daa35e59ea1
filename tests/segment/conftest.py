"""The shipped model, a segmenter on it, and a picture for them."""

import pytest
from miniatures import SCENE
from PIL import Image

import rfclip
from rfclip import Segmenter


@pytest.fixture(scope="module")
def model():
    return rfclip.load_model()


@pytest.fixture
def segmenter(model):
    with Segmenter(model) as segmenter:
        yield segmenter


@pytest.fixture(scope="module")
def picture():
    """A picture of 130 x 200 pixels, whose windows overlap unevenly."""
    return Image.fromarray(SCENE.image[:130])
