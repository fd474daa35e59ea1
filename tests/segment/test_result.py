"""What a segmentation offers: shares, and masks within their limits. How it is drawn: test_drawing.py."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import supervision
from matplotlib.path import Path as MatplotlibPath
from PIL import Image
from pycocotools.coco import COCO

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


# What other libraries take --------------------------------------------------------------------------------------------


def labelled(labels, classes=("a", "b", "c"), confidence=None):
    labels = np.asarray(labels, np.uint8)
    return Segmentation(Image.new("RGB", labels.shape[::-1], "gray"), labels, classes, confidence=confidence)


@pytest.fixture(params=[0, 1, 2], ids=["speckled", "patches", "row"])
def noisy(request):
    """Labels with holes, islands in holes, and pixels that touch at corners only."""
    generator = np.random.default_rng(request.param)
    size = [(17, 23), (9, 8), (1, 40)][request.param]
    small = generator.choice([0, 1, 255], size)
    scale = 1 if request.param != 1 else 5
    return labelled(small.repeat(scale, 0).repeat(scale, 1), confidence=np.array([0.5, 0.25, np.nan]))


def test_masks_by_name(noisy):
    assert np.array_equal(noisy["b"], noisy.labels == 1) and noisy["b"].dtype == bool
    assert not noisy["c"].any() and list(noisy) == ["a", "b", "c"] and "c" in noisy and "d" not in noisy
    with pytest.raises(KeyError, match="did you mean 'dog'"):
        labelled([[0]], ("dog",))["dogs"]
    with pytest.raises(KeyError, match="the classes are a, b, c"):
        noisy["zebra"]
    assert np.array_equal(labelled([[0, 1, 2]], ("bed", "sky", "bed"))["bed"], [[True, False, True]])


def test_equality(noisy):
    assert noisy == replace(noisy) and noisy != 5
    other = noisy.labels.copy()
    other[0, 0] = 2
    assert noisy != replace(noisy, labels=other)
    assert noisy != replace(noisy, classes=("a", "b", "d"))
    assert noisy != replace(noisy, image=Image.new("RGB", noisy.image.size, "red"))
    assert noisy != replace(noisy, labels=noisy.labels[:, :-1], image=noisy.image.crop((0, 0, 1, 1)))


def test_what_it_looks_like():
    text = repr(labelled([[1, 1, 1, 0], [1, 1, 255, 255]]))
    assert text == "<Segmentation of 4 x 2 pixels: b 62.5 %, a 12.5 %>"
    assert "nothing" in repr(labelled([[255]])) and "3 more" in repr(labelled([list(range(8))], tuple("abcdefgh")))
    shown = Image.open(io.BytesIO(labelled([[1, 1, 1, 0]])._repr_png_()))
    assert shown.tobytes() == labelled([[1, 1, 1, 0]]).overlay().tobytes()


def test_files(noisy, tmp_path):
    paths = noisy.save(tmp_path / "photo.v2")
    assert [path.name for path in paths] == ["photo.v2.mask.png", "photo.v2.overlay.png", "photo.v2.json"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert np.array_equal(np.asarray(Image.open(paths[0])), noisy.labels)
    record = json.loads(paths[2].read_text())
    assert record == noisy.record() and (record["width"], record["height"]) == noisy.image.size
    assert [entry["confidence"] for entry in record["classes"]] == [0.5, 0.25, None]
    assert [entry["share"] for entry in record["classes"]] == list(noisy.shares.values())
    assert {entry["confidence"] for entry in labelled([[0]]).record()["classes"]} == {None}


def test_polygons_hold_just_the_pixels(noisy):
    """Their outer rings less their holes, by matplotlib's test of points, are the mask."""
    centres = np.stack(np.meshgrid(*(np.arange(side) + 0.5 for side in noisy.image.size)), axis=-1).reshape(-1, 2)
    found = noisy.polygons()
    assert list(found) == list(noisy) and not found["c"]
    for name, polygons in found.items():
        inside = np.zeros(len(centres), int)
        for outer, *holes in polygons:
            inside += MatplotlibPath(outer).contains_points(centres)
            for hole in holes:
                inside -= MatplotlibPath(hole).contains_points(centres)
        assert np.array_equal(inside.reshape(noisy.labels.shape), noisy[name])


def test_polygons_of_a_ring():
    """An outline and a hole, without the points on straight lines: corners are cut by half a pixel."""
    labels = np.zeros((6, 7), int)
    labels[2:4, 2:5] = 1
    ((outer, hole),) = labelled(labels).polygons()["a"]
    assert {tuple(point) for point in outer} == {
        (0.0, 0.5), (0.5, 0.0), (6.5, 0.0), (7.0, 0.5), (7.0, 5.5), (6.5, 6.0), (0.5, 6.0), (0.0, 5.5)
    }  # fmt: skip
    assert len(hole) == 8 and hole.min(axis=0).tolist() == [2, 2] and hole.max(axis=0).tolist() == [5, 4]


def test_coco(noisy):
    """pycocotools reads them as annotations and as results, and finds the masks in them."""
    found = noisy.coco(image_id=7)
    data = COCO()
    data.dataset = {
        "images": [{"id": 7, "width": noisy.image.width, "height": noisy.image.height}],
        "categories": [{"id": index, "name": name} for index, name in enumerate(noisy)],
        "annotations": [each | {"id": number} for number, each in enumerate(json.loads(json.dumps(found)), 1)],
    }
    data.createIndex()
    results = data.loadRes([{key: each[key] for key in each if key != "bbox"} for each in found])
    assert [each["category_id"] for each in found] == [0, 1]
    for each, result in zip(data.loadAnns(data.getAnnIds()), results.loadAnns(results.getAnnIds()), strict=True):
        mask = noisy.labels == each["category_id"]
        assert np.array_equal(data.annToMask(each), mask) and np.array_equal(results.annToMask(result), mask)
        assert each["area"] == result["area"] == mask.sum() and each["bbox"] == list(result["bbox"])
        rows, columns = np.nonzero(mask)
        left, top, width, height = each["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
        assert each["score"] == noisy.confidence[each["category_id"]]
    assert "score" not in labelled([[0]]).coco()[0] and labelled([[255]]).coco() == []


def test_supervision(noisy):
    found = noisy.to_supervision()
    assert found.class_id.tolist() == [0, 1] and found["class_name"].tolist() == ["a", "b"]
    assert found.confidence.tolist() == [0.5, 0.25]
    assert np.array_equal(found.mask, [noisy["a"], noisy["b"]])
    drawn = supervision.MaskAnnotator().annotate(np.asarray(noisy.image).copy(), found)
    assert drawn.shape == (*noisy.labels.shape, 3)
    assert len(labelled([[255]]).to_supervision()) == 0


def test_transformers(noisy):
    found = noisy.to_transformers()
    assert [(each["label"], each["score"]) for each in found] == [("a", 0.5), ("b", 0.25)]
    for each in found:
        assert np.array_equal(np.asarray(each["mask"]), 255 * noisy[each["label"]])
    assert labelled([[0]]).to_transformers()[0]["score"] is None
