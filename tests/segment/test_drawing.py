"""Masks, overlays and their legends: which colour a class has, and that it is the colour that one sees."""

import colorsys
import hashlib

import numpy as np
import pytest
from PIL import Image

from rfclip.segment.classes import shipped_list, title
from rfclip.segment.drawing import as_seen, class_colours, outlined
from rfclip.segment.result import Segmentation
from rfclip.tiny.scenes import CLASSES, make_scene

NAMES = ("dog", "cat", "grass", "background")


def hue(colour):
    return colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))[0]


def quarters(image):
    """A segmentation of four classes, a quarter each."""
    labels = np.zeros(image.size[::-1], np.uint8)
    labels[: image.height // 2, image.width // 2 :] = 1
    labels[image.height // 2 :, : image.width // 2] = 2
    labels[image.height // 2 :, image.width // 2 :] = 3
    return Segmentation(image, labels, NAMES)


def test_masks_and_overlays():
    labels = np.zeros((60, 90), np.uint8)
    labels[:30], labels[30:, :30] = 2, 255
    result = Segmentation(Image.new("RGB", (90, 60), "gray"), labels, ("a", "b", "c"))
    mask = result.mask()
    assert mask.mode == "P"
    assert np.array_equal(np.asarray(mask), labels)
    colours = result.palette
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
    """Even of many classes, from the black that stands for no class, and from the gray of the background."""
    names = [f"class {number}" for number in range(254)]
    colours = np.array([(0, 0, 0), *class_colours(["background", *names]).values()], int)
    apart = np.abs(colours[:, None] - colours).max(axis=-1) + 999 * np.eye(256, dtype=int)
    assert apart.min() >= 8
    few = colours[:22]
    assert (np.abs(few[:, None] - few).max(axis=-1) + 999 * np.eye(22, dtype=int)).min() >= 20
    assert len(class_colours(map(str, range(3000)))) == 3000  # which then repeat


def test_the_background_is_gray():
    assert class_colours(NAMES)["background"] == (128, 128, 128)
    mask = Segmentation(Image.new("RGB", (2, 2)), np.full((2, 2), 3, np.uint8), NAMES).mask()
    assert mask.convert("RGB").getpixel((0, 0)) == (128, 128, 128)


def test_a_class_keeps_its_colour():
    """With other classes, in another order, as other classes come and go; a colour taken already goes to no other."""
    known = ["dog", "cactus", "octopus", "sailboat", "grass", "sky"]
    alone = {name: class_colours([name])[name] for name in known}
    assert len(set(alone.values())) == len(known)
    for names in (known, known[::-1], CLASSES, [title(names) for names in shipped_list("voc20")]):
        colours = class_colours(names)
        assert [name for name in set(known) & set(names) if colours[name] != alone[name]] == []
    assert class_colours(["Dog"])["Dog"] == alone["dog"]
    strangers = [hashlib.md5(bytes([number])).hexdigest() for number in range(40)]
    first = class_colours(strangers)
    assert len(set(first.values())) == 40
    assert {name: class_colours([*strangers, *known])[name] for name in strangers} == first


@pytest.mark.parametrize("picture", ["scene", "white", "black"])
def test_a_legends_swatch_is_the_colour_seen(picture):
    """A class's mean colour in an overlay is its swatch, however light the picture, with the hue of the mask."""
    image = Image.fromarray(make_scene(3).image) if picture == "scene" else Image.new("RGB", (120, 120), picture)
    result = quarters(image)
    whole = result.overlay()
    overlay = np.asarray(result.overlay(legend=False)).astype(float)
    swatches = {colour for _, colour in whole.crop((0, image.height, *whole.size)).getcolors(1 << 20)}
    for index, colour in enumerate(result.palette):
        seen, swatch = overlay[result.labels == index], as_seen(colour)
        assert swatch in swatches
        assert np.abs(seen.mean(axis=0) - swatch).max() <= 2
        assert np.abs(seen - swatch).mean() <= 12
        if colour != (128, 128, 128):
            assert hue(seen.mean(axis=0)) == pytest.approx(hue(colour), abs=0.01)
    if picture == "scene":  # which is still seen below
        gray = np.asarray(image.convert("L"))
        for index in range(4):
            area = result.labels == index
            assert np.corrcoef(gray[area], overlay[area].mean(axis=-1))[0, 1] > 0.95


def test_colours_given():
    """On the page a class keeps the colour that it had before."""
    result = Segmentation(Image.new("RGB", (8, 8)), np.zeros((8, 8), np.uint8), ("dog",), colours=((1, 2, 3),))
    assert result.mask().getpalette()[:3] == [1, 2, 3]
    assert result.overlay(alpha=1, legend=False).getpixel((0, 0)) == (1, 2, 3)


def test_contours():
    """White lines with black edges where labels change, and nothing elsewhere."""
    result = quarters(Image.new("RGB", (90, 60), "gray"))
    plain, drawn = (np.asarray(result.overlay(legend=False, contours=wanted)) for wanted in (False, True))
    changed = (plain != drawn).any(axis=-1)
    assert not changed[:28, :43].any() and not changed[32:, 48:].any()
    assert {tuple(pixel) for pixel in drawn[changed]} == {(255, 255, 255), (0, 0, 0)}
    for labels in (result.labels, result.labels.T):
        line = np.asarray(outlined(Image.new("RGB", labels.shape[::-1], "gray"), labels))
        across = line[labels.shape[0] // 4].tolist()
        at = across.index([255] * 3)
        assert labels[0, at - 1] != labels[0, at]
        assert across[at - 1] == across[at + 1] == [0] * 3
    one = Segmentation(result.image, np.zeros((60, 90), np.uint8), NAMES)
    assert one.overlay(contours=True) == one.overlay()


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 1)])
def test_tiny_pictures(size):
    labels = np.zeros(size[::-1], np.uint8)
    labels[-1, -1] = 1
    result = Segmentation(Image.new("RGB", size), labels, NAMES)
    assert result.overlay(legend=False, contours=True).size == size


def test_an_overlay_without_any_class():
    result = Segmentation(Image.new("RGB", (300, 60), "gray"), np.full((60, 300), 255, np.uint8), ("a",))
    assert result.overlay().getcolors() == [(300 * 60, (128, 128, 128))]
