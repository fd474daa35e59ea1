"""What a segmentation offers: shares, and masks within their limits. How it is drawn: test_drawing.py."""

import numpy as np
import pytest
from PIL import Image

from rfclip.segment.result import Segmentation


def test_shares():
    labels = np.zeros((60, 90), np.uint8)
    labels[:30], labels[30:, :30] = 2, 255
    result = Segmentation(Image.new("RGB", (90, 60), "gray"), labels, ("a", "b", "c"))
    assert result.shares == pytest.approx({"a": 1 / 3, "b": 0, "c": 1 / 2})


def test_more_classes_than_a_mask_holds():
    labels = np.full((2, 2), 300, np.uint16)
    result = Segmentation(Image.new("RGB", (2, 2)), labels, tuple(str(i) for i in range(400)))
    assert result.nothing == 65535
    assert result.shares["300"] == 1
    with pytest.raises(ValueError, match="400 classes: an indexed picture holds at most 255"):
        result.mask()
