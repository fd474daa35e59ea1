"""What a segmentation offers: masks, overlays, shares and colours."""

import numpy as np
import pytest
from PIL import Image

from rfclip.segment.result import Segmentation, palette


def test_segmentation_outputs():
    labels = np.zeros((60, 90), np.uint8)
    labels[:30], labels[30:, :30] = 2, 255
    result = Segmentation(Image.new("RGB", (90, 60), "gray"), labels, ("a", "b", "c"))
    assert result.shares == pytest.approx({"a": 1 / 3, "b": 0, "c": 1 / 2})
    mask = result.mask()
    assert mask.mode == "P"
    assert np.array_equal(np.asarray(mask), labels)
    colours = palette(3)
    seen = np.asarray(mask.convert("RGB"))
    assert tuple(seen[0, 0]) == colours[2]
    assert tuple(seen[40, 60]) == colours[0]
    assert tuple(seen[40, 0]) == (0, 0, 0)
    overlay = result.overlay(alpha=1)
    assert overlay.width >= 240
    left = (overlay.width - 90) // 2
    assert overlay.getpixel((left + 5, 5)) == colours[2]
    assert overlay.getpixel((left + 5, 50)) == (128, 128, 128)
    legend = {colour for _, colour in overlay.crop((0, 60, *overlay.size)).getcolors(1 << 20)}
    assert {colours[0], colours[2]} <= legend
    assert colours[1] not in legend
    plain = result.overlay(alpha=0.25, legend=False)
    assert plain.size == (90, 60)
    for place, colour in (((5, 5), colours[2]), ((60, 50), colours[0]), ((5, 50), (128, 128, 128))):
        assert plain.getpixel(place) == pytest.approx([0.75 * 128 + 0.25 * channel for channel in colour], abs=1)


def test_colours_of_classes_differ():
    """Even of many classes, and from the black that stands for no class."""
    colours = np.array([(0, 0, 0), *palette(255)], int)
    apart = np.abs(colours[:, None] - colours).max(axis=-1) + 999 * np.eye(256, dtype=int)
    assert apart.min() >= 8
    assert apart[:20, :20].min() >= 50
    assert palette(300)[256:] == palette(44)


def test_an_overlay_without_any_class():
    result = Segmentation(Image.new("RGB", (300, 60), "gray"), np.full((60, 300), 255, np.uint8), ("a",))
    assert result.overlay().getcolors() == [(300 * 60, (128, 128, 128))]


def test_more_classes_than_a_mask_holds():
    labels = np.full((2, 2), 300, np.uint16)
    result = Segmentation(Image.new("RGB", (2, 2)), labels, tuple(str(i) for i in range(400)))
    assert result.nothing == 65535
    assert result.shares["300"] == 1
    with pytest.raises(ValueError, match="400 classes: an indexed picture holds at most 255"):
        result.mask()


def test_colours_differ():
    assert len(set(palette(255))) == 255
