"""A small model, a picture that makes its tokens distract, and their explanation."""

import pytest
from PIL import Image
from small_models import DIMS, pictures, small_clip

from rfclip import RefocusConfig
from rfclip.explanation import explain


@pytest.fixture
def model():
    model = small_clip()
    model.visual.image_mean, model.visual.image_std = (0.5,) * 3, (0.25,) * 3
    return model


@pytest.fixture
def picture():
    """24 x 40 pixels, hence 3 x 5 patches, some of which are bright and so distract."""
    pixels = pictures(count=1, height=24, width=40)[0] * 0.25 + 0.5
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.fixture
def seen():
    """`explain` on the picture at its own size, in all four blocks unless told otherwise."""

    def seen(model, picture, **options):
        config = RefocusConfig(DIMS, tau=3.0)
        return explain(model, picture, config, short_side=24, **{"layers": [1, 2, 3, 4], **options})

    return seen
